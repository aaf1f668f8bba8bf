"""QLoRA (arXiv 2305.14314): PEFT's LoRA over a base in NF4 with double quantization."""

from peft import LoraConfig

from fura_rl.adapters.methods import lora
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=LoraConfig,
    summary="low-rank update over a 4-bit base",
    paper="arXiv 2305.14314",
    paper_learning_rate=2e-4,
    rate_of="its paper (LLaMA-7B and 13B, instructions)",
    limits="needs bitsandbytes; updates of rank r only; the policy that is trained and served has a rounded base",
    settings=lora.settings,
    capacity="r",
    load_in_4bit=True,
    quantized_base=True,
)
