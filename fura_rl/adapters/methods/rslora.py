"""rsLoRA (arXiv 2312.03732), PEFT's own: LoRA scaled by alpha / sqrt(r), so high ranks learn as fast as low."""

from peft import LoraConfig

from fura_rl.adapters.methods import lora
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=LoraConfig,
    summary="low-rank update scaled by alpha / sqrt(r)",
    paper="arXiv 2312.03732",
    paper_learning_rate=5e-5,
    rate_of="its paper (LLaMA-2-7B, instructions)",
    limits="updates of rank r only",
    settings=lora.settings_with(use_rslora=True),
    capacity="r",
    quantized_base=True,
)
