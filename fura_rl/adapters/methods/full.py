"""Full fine-tuning: every weight of the policy is trained and no adapter is added."""

from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=None,
    summary="every weight",
    paper="-",
    paper_learning_rate=1e-5,
    limits="no adapter to switch off: with beta > 0 TRL keeps a second copy of the model; no quantized base",
)
