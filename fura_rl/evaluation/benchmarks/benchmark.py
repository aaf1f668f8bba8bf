"""What the table of benchmarks holds of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from fura_rl.config import MathScriptArguments
from fura_rl.evaluation.sampling import Sampling


@dataclass(frozen=True)
class Benchmark:
    """A set of problems with golds, and how the papers score it.

    Args:
        dataset_name, dataset_config, revision, split: where the problems are; of the hub a commit, not a branch.
        prompt_column, answer_column: the fields; found as in training where they are None.
        group_columns: fields by which scores are given apart as well, e.g. level and subject.
        prompt_template: text with {problem} in it; None is the training prompt.
        size: the number of problems the set must have, None where any number will do.
        greedy: whether greedy accuracy is part of the convention.
        sampling: the sampled pass of the convention; n=0 where there is none.
        convention: the headline figure and where the convention comes from.
    """

    dataset_name: str
    split: str = "test"
    dataset_config: str | None = None
    revision: str = "main"
    prompt_column: str | None = None
    answer_column: str | None = None
    group_columns: tuple[str, ...] = ()
    prompt_template: str | None = None
    size: int | None = None
    greedy: bool = True
    sampling: Sampling = field(default_factory=lambda: Sampling(n=8, temperature=1.0))
    convention: str = ""

    def script_arguments(self) -> MathScriptArguments:
        """The same data settings that a training run would use."""
        return MathScriptArguments(
            dataset_name=self.dataset_name,
            dataset_config=self.dataset_config,
            dataset_train_split=self.split,
            prompt_column=self.prompt_column,
            answer_column=self.answer_column,
            prompt_template=self.prompt_template,
        )


GREEDY_ONLY = Sampling(n=0)
AVG_AT_8 = Sampling(n=8, temperature=0.6, top_p=0.95)
GREEDY_CONVENTION = "greedy pass@1 (arXiv 2605.22869)"
AVG_CONVENTION = "avg@8 at temperature 0.6, top-p 0.95 (arXiv 2605.22869)"
