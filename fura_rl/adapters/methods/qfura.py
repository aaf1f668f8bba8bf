"""QFuRA: FuRA with the large core in NF4 (arXiv 2605.22869), made from a 16-bit checkpoint."""

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=FuraConfig,
    summary="FuRA over a large core in 4 bits",
    paper="arXiv 2605.22869",
    paper_learning_rate=9e-5,
    limits="needs bitsandbytes; starts at the quantized model, not at the base model; for a base that is 4-bit already "
    "use fura with load_in_4bit",
    settings=lambda model_args: {"form": "core", "quantize_core": "nf4"},
)
