"""What the table of adapter methods holds of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import PeftConfig

if TYPE_CHECKING:
    from trl import ModelConfig


@dataclass(frozen=True)
class AdapterMethod:
    """One way to train a policy.

    `config_class` is its PEFT config, None where every weight is trained; `settings` turns TRL's `ModelConfig` (its
    `lora_*` fields) into the config's settings; `paper_learning_rate` is that of the FuRA paper's RL runs.
    """

    config_class: type[PeftConfig] | None
    settings: Callable[[ModelConfig], dict[str, Any]]
    paper_learning_rate: float
    summary: str
