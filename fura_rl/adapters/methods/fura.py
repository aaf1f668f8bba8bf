"""FuRA: full-rank updates, spectrally preconditioned (arXiv 2605.22869).  Column blocks, small core and S trained."""

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=FuraConfig,
    summary="block-wise SVD: small cores and singular values",
    paper="arXiv 2605.22869",
    paper_learning_rate=9e-5,
    limits="linear layers only; the budget moves in the steps of the block sizes that divide a layer",
    quantized_base=True,
)
