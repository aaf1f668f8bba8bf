"""HiRA (ICLR 2025), PEFT's own: a low-rank update multiplied into the weight entry by entry, so of high rank."""

from peft import HiraConfig

from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=HiraConfig,
    summary="entry-wise product of the weight with B A",
    paper="openreview TwJrTz9cRS",
    paper_learning_rate=1e-3,
    rate_of="its code (LLaMA-3-8B, commonsense)",
    limits="entries where the weight is zero stay zero; no scale beside the learning rate",
    settings=lambda model_args: {"r": model_args.lora_r, "hira_dropout": model_args.lora_dropout},
    capacity="r",
)
