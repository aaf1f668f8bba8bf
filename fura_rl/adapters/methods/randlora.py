"""RandLoRA (arXiv 2502.00987), PEFT's own: a full-rank sum of random low-rank bases with trained diagonal scales."""

from peft import RandLoraConfig

from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=RandLoraConfig,
    summary="diagonal scales of random low-rank bases",
    paper="arXiv 2502.00987",
    paper_learning_rate=1e-4,
    rate_of="its paper (Qwen2, Phi-3 and LLaMA-3, commonsense)",
    limits="the budget falls as r grows; the random bases are stored in every checkpoint",
    settings=lambda model_args: {"r": model_args.lora_r, "randlora_dropout": model_args.lora_dropout},
    capacity="r",
    capacity_grows=False,
)
