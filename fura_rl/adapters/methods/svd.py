"""SVD: FuRA with one block, the full-rank reparameterization that the FuRA paper compares itself with."""

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=FuraConfig,
    summary="one SVD a weight: right singular vectors and singular values",
    paper="arXiv 2605.22869",
    paper_learning_rate=9e-5,
    limits="as many parameters as a square weight has: no saving, no budget to match",
    settings=lambda model_args: {"block_size": "full"},
    quantized_base=True,
)
