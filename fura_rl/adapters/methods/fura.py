"""FuRA: full-rank updates, spectrally preconditioned (arXiv 2605.22869).  Column blocks, small core and S trained."""

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=FuraConfig,
    settings=lambda model_args: {},
    paper_learning_rate=9e-5,
    summary="block-wise SVD, small core and singular values trained",
)
