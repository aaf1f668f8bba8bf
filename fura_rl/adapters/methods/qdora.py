"""QDoRA: PEFT's DoRA (arXiv 2402.09353) over a base in NF4 with double quantization (arXiv 2305.14314)."""

from peft import LoraConfig

from fura_rl.adapters.methods import lora
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=LoraConfig,
    summary="DoRA over a 4-bit base",
    paper="arXiv 2402.09353",
    paper_learning_rate=2e-4,
    rate_of="DoRA's paper (LLaMA-7B, commonsense)",
    limits="needs bitsandbytes; direction of rank r only; every forward dequantizes the weight a second time for its "
    "norm; the policy that is trained and served has a rounded base",
    settings=lora.settings_with(use_dora=True),
    capacity="r",
    load_in_4bit=True,
    quantized_base=True,
)
