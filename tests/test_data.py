"""Data: every schema the field ships, local and embedded, becomes `prompt` and `answer`; bad golds are noticed."""

import json
import re

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from fura_rl.config import MathScriptArguments
from fura_rl.data import digest_of, encode_prompts, gold_text, load_splits, pick_split, prepare
from fura_rl.quickstart import BASE_MODEL, multi_step
from fura_rl.quickstart.problems import SPLITS, make_rows, split_of
from fura_rl.quickstart.tasks import TASKS

MATH = [{"problem": "1+1?", "solution": r"It is \boxed{2}.", "level": "Level 1", "type": "Algebra"}]
GSM8K = [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}]
MATH_500 = [{"problem": "1+1?", "solution": r"It is \boxed{3}.", "answer": "2", "unique_id": "test/a/1.json"}]
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
]
SCHEMAS = {"math": MATH, "gsm8k": GSM8K, "math_500": MATH_500, "dapo": DAPO}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_MODEL)


def write(folder, rows, suffix):
    path = folder / f"problems{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(script, tokenizer):
    splits = load_splits(script)
    return prepare(pick_split(splits, script.dataset_train_split, "the file"), script, tokenizer, "the file")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_from_every_kind_of_file(tmp_path, tokenizer, schema, suffix):
    script = MathScriptArguments(dataset_name=write(tmp_path, SCHEMAS[schema], suffix), prompt_template="Q: {problem}")
    [row] = load(script, tokenizer)
    assert row == {"prompt": [{"role": "user", "content": "Q: 1+1?"}], "answer": "2"}


def test_columns_map_by_setting_and_dots_reach_into_nested_ones(tmp_path, tokenizer):
    rows = [{"text": "1+1?", "meta": {"gold": "2"}, "answer": "9"}]
    script = MathScriptArguments(
        dataset_name=write(tmp_path, rows, ".jsonl"), prompt_column="text", answer_column="meta.gold"
    )
    [row] = load(script, tokenizer)
    assert row["answer"] == "2"
    assert "1+1?" in row["prompt"][0]["content"]


def test_a_tokenizer_without_chat_template_gets_plain_prompts(tmp_path):
    plain = AutoTokenizer.from_pretrained(BASE_MODEL)
    plain.chat_template = None
    script = MathScriptArguments(dataset_name=write(tmp_path, MATH, ".jsonl"), prompt_template="{problem}")
    [row] = load(script, plain)
    assert row["prompt"] == "1+1?"
    assert encode_prompts(["1+1?"], plain) == [plain("1+1?")["input_ids"]]


def test_of_a_prompt_with_images_the_text_is_encoded():
    """With a processor, as a vision-language model has it, whose templates give text and not tokens."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokenizer.image_token = "<image>"
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default")
    message = {"role": "user", "content": "1+1?"}
    parts = [{"type": "image", "image": None}, {"type": "text", "text": "1+1?"}]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text if p.type == 'text' else 'picture' }}{% endfor %}{% endif %}{% endfor %}"
    )
    expected = tokenizer("1+1?")["input_ids"]
    assert encode_prompts([[message], [message | {"content": parts}]], processor) == [expected] * 2


def test_system_prompt_and_template_file(tmp_path, tokenizer):
    template = tmp_path / "template.txt"
    template.write_text("Solve {problem} now.\n")
    script = MathScriptArguments(
        dataset_name=write(tmp_path, MATH, ".jsonl"), system_prompt="Be brief.", prompt_template_file=str(template)
    )
    [row] = load(script, tokenizer)
    assert row["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Solve 1+1? now."},
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_template": "no place"}, "does not contain {problem}"),
        ({"prompt_template_file": "/nowhere.txt"}, "'/nowhere.txt' does not exist"),
        ({"prompt_template": "{problem}", "prompt_template_file": "x"}, "keep one"),
        ({"answer_column": "gold"}, "answer_column='gold' is not a column"),
        ({"prompt_column": "text"}, "prompt_column='text' is not a column"),
        ({"dataset_train_split": "validation"}, "split 'validation' is not in"),
    ],
)
def test_wrong_data_settings_are_named(tmp_path, tokenizer, settings, message):
    path = write(tmp_path, MATH, ".jsonl")
    splits = load_splits(MathScriptArguments(dataset_name=path))
    script = MathScriptArguments(dataset_name=path, **settings)
    with pytest.raises(ValueError, match=message):
        prepare(pick_split(splits, script.dataset_train_split, path), script, tokenizer, path)


def test_a_dataset_without_a_gold_column_names_its_columns(tmp_path, tokenizer):
    script = MathScriptArguments(dataset_name=write(tmp_path, [{"problem": "1+1?", "level": 1}], ".jsonl"))
    with pytest.raises(ValueError, match=r"it has problem, level\. Name yours with answer_column"):
        load(script, tokenizer)


def golds_file(folder, bad, total):
    rows = [{"problem": "p", "answer": "" if i < bad else str(i)} for i in range(total)]
    return write(folder, rows, ".jsonl")


def test_up_to_one_percent_of_unreadable_golds_is_dropped_and_reported(tmp_path, tokenizer, caplog):
    rows = load(MathScriptArguments(dataset_name=golds_file(tmp_path, 2, 200)), tokenizer)
    assert len(rows) == 198
    assert "" not in rows["answer"]
    assert "2 of 200 golds (1.0%) in column 'answer'" in caplog.text
    assert "row 0: ''; row 1: ''" in caplog.text


def test_more_than_one_percent_of_unreadable_golds_is_refused_with_examples(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"3 of 200 golds \(1\.5%\).*row 0: ''.*More than 1% is refused"):
        load(MathScriptArguments(dataset_name=golds_file(tmp_path, 3, 200)), tokenizer)


def test_worked_solutions_without_a_box_are_unreadable():
    assert gold_text("The answer is 5.", worked=True) == ""
    assert gold_text("5", worked=False) == "5"


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ("... #### 1,234", "1234"),
        ("she has <<3*2=6>>6 #### 6", "6"),
        ({"ground_truth": "7"}, "7"),
        (["8"], "8"),
        (["8", "9"], ""),
        (None, ""),
        (12, "12"),
        (r"thus \boxed{1} so \boxed{\frac12}", r"\frac12"),
    ],
)
def test_gold_text(value, gold):
    assert gold_text(value, worked=False) == gold


@pytest.mark.parametrize(
    ("spec", "rows"), [("train", range(10)), ("train[:3]", range(3)), ("train[8:]", [8, 9]), ("train[50%:70%]", [5, 6])]
)
def test_splits_slice_as_in_datasets(tmp_path, spec, rows):
    path = write(tmp_path, [{"problem": "p", "answer": str(i)} for i in range(10)], ".jsonl")
    splits = load_splits(MathScriptArguments(dataset_name=path))
    assert pick_split(splits, spec, path)["answer"] == [str(i) for i in rows]


@pytest.mark.parametrize("name", ["/nowhere/data", "nowhere.jsonl"])
def test_a_missing_file_is_named(name):
    with pytest.raises(ValueError, match=f"dataset_name='{name}' does not exist"):
        load_splits(MathScriptArguments(dataset_name=name))


def test_no_dataset_is_an_error():
    with pytest.raises(ValueError, match="neither dataset_name nor datasets is set"):
        load_splits(MathScriptArguments())


def test_trls_mixtures_of_local_files(tmp_path, tokenizer):
    parts = []
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        write(tmp_path / part, [{"problem": f"{part}?", "answer": "1"}], ".jsonl")
        parts.append(DatasetConfig(path="json", data_files=str(tmp_path / part / "problems.jsonl"), split="train"))
    script = MathScriptArguments(prompt_template="{problem}")
    splits = load_splits(script, DatasetMixtureConfig(datasets=parts))
    rows = prepare(pick_split(splits, "train", "the mixture"), script, tokenizer, "the mixture")
    assert {row["prompt"][0]["content"] for row in rows} == {"a?", "b?"}


def test_quickstart_problems_are_right_and_their_splits_share_no_operands():
    splits = load_splits(MathScriptArguments(dataset_name="quickstart"))
    texts = {name: set(split["problem"]) for name, split in splits.items()}
    assert not texts["train"] & (texts["test"] | texts["validation"])
    for split in ("train", "validation", "test"):
        for row in make_rows(split, 50, seed=1):
            a, b = (int(word) for word in row["problem"].replace("?", " ").replace(".", " ").split() if word.isdigit())
            op = "+" if int(row["answer"]) == a + b else "-"
            assert int(row["answer"]) in (a + b, a - b)
            assert split_of(a, b, op) == split
            assert row["solution"].endswith(rf"\boxed{{{row['answer']}}}")


@pytest.mark.parametrize("task", TASKS)
def test_splits_of_an_embedded_task_are_disjoint_and_their_solutions_end_in_the_gold(task):
    splits = load_splits(MathScriptArguments(dataset_name=task))
    assert {name: len(split) for name, split in splits.items()} == TASKS[task].sizes
    texts = [set(split["problem"]) for split in splits.values()]
    assert len(set.union(*texts)) == sum(map(len, texts))
    for split in splits.values():
        for row in split:
            assert row["solution"].endswith(rf"\boxed{{{row['answer']}}}")


def numbers(row):
    return [int(word) for word in re.findall(r"\d+", row["problem"])]


def test_multi_step_is_tested_on_operands_that_training_never_shows():
    splits = {name: list(rows) for name, rows in load_splits(MathScriptArguments(dataset_name="multi_step")).items()}
    operands = {name: {n for row in rows for n in numbers(row)} for name, rows in splits.items()}
    assert max(operands["train"] | operands["validation"]) < min(operands["test"])
    problems = {
        name: {(*numbers(row), row["answer"]) for row in rows if row["problem"].startswith("What")}
        for name, rows in splits.items()
    }
    assert not problems["train"] & problems["validation"], "the same sum is in one split alone"


@pytest.mark.parametrize("split", SPLITS)
def test_multi_step_problems_are_worked_right_and_read_as_they_are_told(split):
    for row in multi_step.make_rows(split, 200, seed=1):
        first, second, box = row["solution"].split(" ")
        for step in (first, second):
            sum_, result = step.split("=")
            left, op, right = re.fullmatch(r"(\d+)([+-])(\d+)", sum_).groups()
            assert int(result) == int(left) + int(right) * (1 if op == "+" else -1)
        assert second.startswith(first.split("=")[1])
        told = re.sub(r"(?:buys|finds) ", "+", re.sub(r"(?:sells|loses) ", "-", row["problem"]))
        ops = "".join(re.findall(r"[+-]", told))
        assert re.sub(r"\d", "", first + second) == f"{ops[0]}={ops[1]}="
        assert multi_step.split_of(tuple(numbers(row)), ops) == split
        assert box == rf"\boxed{{{row['answer']}}}"


def test_the_digest_of_what_is_trained_on_sees_wording_answer_and_order():
    rows = [{"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}, {"prompt": "2+2?", "answer": "4"}]
    others = [
        [{**rows[0], "prompt": [{"role": "user", "content": "1+1 = ?"}]}, rows[1]],
        [{**rows[0], "answer": "3"}, rows[1]],
        rows[::-1],
    ]
    digests = [
        digest_of(Dataset.from_list([{k: str(v) for k, v in row.items()} for row in some])) for some in (rows, *others)
    ]
    assert len(set(digests)) == 4
    assert (
        digest_of(Dataset.from_list([{**row, "prompt": str(row["prompt"]), "level": 1} for row in rows])) == digests[0]
    )
