"""PiSSA (arXiv 2404.02948), PEFT's own: LoRA started at the principal singular directions of the weight."""

from peft import LoraConfig

from fura_rl.adapters.methods import lora
from fura_rl.adapters.methods.method import AdapterMethod

SHIFTED_BASE = (
    "takes its start out of the base weight, so the adapter switched off is not the base model: beta > 0 is refused, "
    "and in 16 bits the start is the base model only up to rounding"
)

METHOD = AdapterMethod(
    config_class=LoraConfig,
    summary="low-rank factors started at the principal singular directions",
    paper="arXiv 2404.02948",
    paper_learning_rate=2e-5,
    rate_of="its paper (LLaMA-2-7B, mathematics)",
    limits=f"{SHIFTED_BASE}; no quantized base",
    settings=lora.settings_with(init_lora_weights="pissa"),
    capacity="r",
    shifts_base=True,
)
