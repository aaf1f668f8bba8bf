"""Full fine-tuning: every weight of the policy is trained and no adapter is added."""

from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=None,
    settings=lambda model_args: {},
    paper_learning_rate=1e-5,
    summary="every weight trained",
)
