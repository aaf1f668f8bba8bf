"""What the table of benchmarks holds of each."""

from __future__ import annotations

from dataclasses import dataclass

from fura_rl.config import MathScriptArguments


@dataclass(frozen=True)
class Benchmark:
    """A set of problems with golds.

    `size` is the number of problems the set must have, None where any number will do; the columns are found as in
    training where they are None.
    """

    dataset_name: str
    split: str = "test"
    dataset_config: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    prompt_template: str | None = None
    size: int | None = None

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
