"""OLoRA (arXiv 2406.01775), PEFT's own: LoRA started at the first orthonormal directions of the weight's QR."""

from peft import LoraConfig

from fura_rl.adapters.methods import lora
from fura_rl.adapters.methods.method import AdapterMethod
from fura_rl.adapters.methods.pissa import SHIFTED_BASE

METHOD = AdapterMethod(
    config_class=LoraConfig,
    summary="low-rank factors started at a QR of the weight",
    paper="arXiv 2406.01775",
    paper_learning_rate=3e-4,
    rate_of="its author's example in PEFT (instructions)",
    limits=SHIFTED_BASE,
    settings=lora.settings_with(init_lora_weights="olora"),
    capacity="r",
    shifts_base=True,
)
