"""SVD: FuRA with one block, the full-rank reparameterization that the FuRA paper compares itself with."""

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=FuraConfig,
    settings=lambda model_args: {"block_size": "full"},
    paper_learning_rate=9e-5,
    summary="one SVD per weight, right singular vectors and singular values trained",
)
