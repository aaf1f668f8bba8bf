"""DoRA (arXiv 2402.09353), PEFT's own: LoRA with the magnitude of each output trained apart."""

from peft import LoraConfig

from fura_rl.adapters.methods import lora
from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=LoraConfig,
    settings=lambda model_args: lora.settings(model_args) | {"use_dora": True},
    paper_learning_rate=9e-5,
    summary="low-rank direction, magnitude trained apart",
)
