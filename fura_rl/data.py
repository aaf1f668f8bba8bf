"""Math problems for GRPO: from the hub, from TRL's mixtures, from local files or the embedded ones, in one schema.

A prepared row has two columns, what TRL and the reward need: `prompt` (chat messages where the tokenizer has a chat
template, else a string) and `answer` (the gold as the content of a box).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fura_rl.config import MathScriptArguments
from fura_rl.quickstart.tasks import TASKS
from rewards import check_golds as grade_golds
from rewards import gold_answer, last_boxed

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from trl import DatasetMixtureConfig

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "solution", "reward_model", "final_answer")
DEFAULT_TEMPLATE = "Solve the following math problem and put the final answer in \\boxed{}.\n\n{problem}"
UNREADABLE_GOLD_LIMIT_FRAC = 0.01
LOCAL_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")  # GSM8K's inline calculator annotations


@dataclass(frozen=True)
class GoldCheck:
    """How many golds of a dataset can be compared with an answer."""

    total: int
    unreadable: list[tuple[int, str]]  # row, what stood there

    @property
    def unreadable_frac(self) -> float:
        return len(self.unreadable) / self.total if self.total else 0.0


def load_splits(
    script: MathScriptArguments, mixture: DatasetMixtureConfig | None = None, revision: str | None = None
) -> DatasetDict:
    """The raw splits of `dataset_name`, at `revision` of the hub, or of TRL's `datasets` mixture.

    Raises:
        ValueError: where none is named, or a local file is missing or of an unknown kind.
    """
    from datasets import Dataset, DatasetDict, load_dataset

    name = script.dataset_name
    if mixture is not None and mixture.datasets:
        from trl import get_dataset

        return get_dataset(mixture)
    if not name:
        raise ValueError("neither dataset_name nor datasets is set; give a hub id, a local file, or 'quickstart'")
    if name in TASKS:
        task = TASKS[name]
        return DatasetDict(
            {split: Dataset.from_list(task.make_rows(split, size, 0)) for split, size in task.sizes.items()}
        )
    if (path := local_file(name)) is not None:
        return load_dataset(LOCAL_FORMATS[path.suffix], data_files={script.dataset_train_split: str(path)})
    if script.dataset_streaming:
        raise ValueError("dataset_streaming=true is not supported: every gold is checked before training starts")
    return load_dataset(name, name=script.dataset_config, revision=revision)


def local_file(name: str) -> Path | None:
    """The file that `dataset_name` is, None where it is a task, a folder or a hub id.

    Raises:
        ValueError: where it looks like a path and nothing is there, or the file is empty.
    """
    path = Path(name).expanduser()
    if path.suffix in LOCAL_FORMATS:
        if not path.is_file():
            raise ValueError(f"dataset_name={name!r} does not exist")
        if not path.stat().st_size:  # datasets ends with a bare StopIteration
            raise ValueError(f"dataset_name={name!r} is empty: it has no problems")
        return path
    if path.is_absolute() and not path.exists():
        raise ValueError(f"dataset_name={name!r} does not exist")
    return None


def pick_split(splits: DatasetDict, spec: str, source: str) -> Dataset:
    """The split named by `spec`, which may carry datasets' slicing: `test`, `train[:7500]`, `train[90%:]`.

    Raises:
        ValueError: where there is no such split.
    """
    from datasets import ReadInstruction

    name = spec.partition("[")[0]
    if name not in splits:
        raise ValueError(f"split {spec!r} is not in {source}; it has {', '.join(splits)}")
    if name == spec:
        return splits[name]
    [part] = ReadInstruction.from_spec(spec).to_absolute({name: len(splits[name])})
    return splits[name].select(range(part.from_ or 0, len(splits[name]) if part.to is None else part.to))


def prepare(dataset: Dataset, script: MathScriptArguments, tokenizer: PreTrainedTokenizerBase, source: str) -> Dataset:
    """Rows of any known schema as `prompt` and `answer`.

    Raises:
        ValueError: where a column is missing, or more than 1% of the golds cannot be read, with examples.
    """
    prompt_column = script.prompt_column or find_column(dataset, PROMPT_COLUMNS, "prompt_column", source)
    answer_column = script.answer_column or find_column(dataset, ANSWER_COLUMNS, "answer_column", source)
    for setting, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column.partition(".")[0] not in dataset.column_names:
            raise ValueError(f"{setting}={column!r} is not a column of {source}: {', '.join(dataset.column_names)}")
    template = read_template(script)
    chat = bool(getattr(tokenizer, "chat_template", None))

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        text = template.replace("{problem}", problem_text(look_up(row, prompt_column)))
        prompt = as_messages(text, script.system_prompt) if chat else text
        return {"prompt": prompt, "answer": gold_text(look_up(row, answer_column), worked=answer_column == "solution")}

    prepared = dataset.map(convert, remove_columns=dataset.column_names, desc=f"Preparing {source}")
    check = check_golds(prepared["answer"])
    report_golds(check, source, answer_column)
    if not check.unreadable:
        return prepared
    unreadable = {row for row, _ in check.unreadable}
    return prepared.select([row for row in range(len(prepared)) if row not in unreadable])


def digest_of(prepared: Dataset) -> str:
    """What is trained on, in 16 hexadecimal digits: another wording, answer or order of prepared rows is another."""
    digest = hashlib.sha256()
    for row in prepared.select_columns(["prompt", "answer"]):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def find_column(dataset: Dataset, candidates: tuple[str, ...], setting: str, source: str) -> str:
    for name in candidates:
        if name in dataset.column_names:
            return name
    raise ValueError(
        f"{source} has none of the columns {', '.join(candidates)}; it has {', '.join(dataset.column_names)}. "
        f"Name yours with {setting}"
    )


def look_up(row: dict[str, Any], column: str) -> Any:
    """The value of `column`; dots reach into nested columns (`reward_model.ground_truth`)."""
    value: Any = row
    for key in column.split("."):
        value = value[key]
    return value


def problem_text(value: Any) -> str:
    """A problem as text: the string itself, or the user message of a chat prompt (DAPO)."""
    if isinstance(value, str):
        return value
    return next((str(message["content"]) for message in reversed(value) if message.get("role") == "user"), "")


def gold_text(value: Any, worked: bool) -> str:
    """The gold as the content of a box, or "" where there is none.

    Knows DAPO's `{"ground_truth": ...}`, GSM8K's `#### 42`, worked solutions with a boxed answer, and bare answers.
    With `worked` the value is a whole solution, so without a box there is no answer in it.
    """
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if value is None:
        return ""
    text = CALCULATOR_MARK.sub("", str(value)).strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    if last_boxed(text) is not None:
        return gold_answer(text).strip()
    return "" if worked else text


def as_messages(text: str, system_prompt: str | None) -> list[dict[str, str]]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": text}]


def read_template(script: MathScriptArguments) -> str:
    """The prompt template, from the config or from its file; it must hold `{problem}`."""
    if script.prompt_template and script.prompt_template_file:
        raise ValueError("prompt_template and prompt_template_file are both set; keep one")
    if script.prompt_template_file:
        if not Path(script.prompt_template_file).is_file():
            raise ValueError(f"prompt_template_file={script.prompt_template_file!r} does not exist")
        template = Path(script.prompt_template_file).read_text().rstrip("\n")
    else:
        template = script.prompt_template or DEFAULT_TEMPLATE
    if "{problem}" not in template:
        raise ValueError(f"the prompt template {template[:60]!r} does not contain {{problem}}")
    return template


def check_golds(golds: list[str]) -> GoldCheck:
    """Grade every gold against itself, by meaning: what the reward could not read as a gold is found here."""
    verdicts = grade_golds(golds)
    rows = zip(golds, verdicts, strict=True)
    return GoldCheck(len(golds), [(row, gold) for row, (gold, verdict) in enumerate(rows) if not verdict.correct])


def report_golds(check: GoldCheck, source: str, answer_column: str) -> None:
    """Warn about unreadable golds, whose rows are dropped; refuse the dataset where they are too many."""
    if not check.total:
        raise ValueError(f"{source} has no rows")
    if not check.unreadable:
        return
    examples = "; ".join(f"row {row}: {gold[:60]!r}" for row, gold in check.unreadable[:5])
    text = (
        f"{len(check.unreadable)} of {check.total} golds ({check.unreadable_frac:.1%}) in column {answer_column!r} of "
        f"{source} cannot be read as an answer: {examples}"
    )
    if check.unreadable_frac > UNREADABLE_GOLD_LIMIT_FRAC:
        raise ValueError(f"{text}. More than {UNREADABLE_GOLD_LIMIT_FRAC:.0%} is refused; check answer_column")
    logger.warning("%s. These rows are left out", text)


def encode_prompts(
    prompts: Sequence[Any], processing_class: PreTrainedTokenizerBase | ProcessorMixin
) -> list[list[int]]:
    """Token ids of prompts that are strings or lists of chat messages; of images in them nothing."""
    from transformers import ProcessorMixin

    is_processor = isinstance(processing_class, ProcessorMixin)
    tokenizer = processing_class.tokenizer if is_processor else processing_class
    chat = functools.partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=True)
    return [
        list((tokenizer(prompt) if isinstance(prompt, str) else chat(without_images(prompt)))["input_ids"])
        for prompt in prompts
    ]


def without_images(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages of which those that are lists of parts keep their text alone."""
    return [
        message | {"content": [part for part in message["content"] if part["type"] == "text"]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
