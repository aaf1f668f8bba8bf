"""MiSS (arXiv 2409.15371), PEFT's own: one trained matrix shared by all shards of the input."""

from peft import MissConfig

from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=MissConfig,
    summary="one matrix shared by all shards of the input",
    paper="arXiv 2409.15371",
    paper_learning_rate=2e-5,
    rate_of="its paper (LLaMA-2-7B, mathematics)",
    limits="updates of rank r only; no scale beside the learning rate",
    settings=lambda model_args: {"r": model_args.lora_r, "miss_dropout": model_args.lora_dropout},
    capacity="r",
)
