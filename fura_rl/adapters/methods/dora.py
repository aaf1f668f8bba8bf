"""DoRA (arXiv 2402.09353), PEFT's own: LoRA with the magnitude of each output trained apart."""

from peft import LoraConfig

from fura_rl.adapters.methods import lora
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=LoraConfig,
    summary="low-rank direction, and the magnitude of each output",
    paper="arXiv 2402.09353",
    paper_learning_rate=2e-4,
    rate_of="its paper (LLaMA-7B, commonsense)",
    limits="direction of rank r only; every forward forms the whole weight's norm, so steps are slower",
    settings=lora.settings_with(use_dora=True),
    capacity="r",
)
