"""Evaluation without an engine: benchmarks in the hub's schemas, their checks, a run's folder, scores, comparisons."""

import dataclasses
import importlib.util
import json
import re

import datasets
import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fura_rl.evaluation.benchmarks import BENCHMARKS, find_benchmark
from fura_rl.evaluation.compare import compare
from fura_rl.evaluation.pass_at_k import choose_ks, plan_batches, plan_passes
from fura_rl.evaluation.problems import content_hash, load_problems
from fura_rl.evaluation.run_folder import RunFolder
from fura_rl.evaluation.sampling import Sampling
from fura_rl.evaluation.scores import paired_differences, problem_values, summarize
from fura_rl.fingerprint import FILE, check_base, describe_base, fingerprint, record
from fura_rl.quickstart import BASE_MODEL

# One row of every benchmark as the hub has it, and the gold that must come out.
HUB_ROWS = {
    "math_500": (
        {
            "problem": "Add {i} and 1.", "solution": "It is $\\boxed{{{i}}}$.", "answer": "\\frac{{{i}}}{{7}}",
            "subject": "Algebra", "level": 2, "unique_id": "test/algebra/{i}.json",
        },
        "\\frac{3}{7}",
    ),
    "aime_24": (
        {"id": 60, "problem": "Find {i}.", "solution": "...", "answer": "{i}", "url": "https://x", "year": "2024"}, "3",
    ),
    "aime_25": ({"problem": "Find {i}.", "answer": "{i}", "id": "{i}"}, "3"),
    "amc_23": ({"id": 1, "question": "Find {i}.", "answer": "{i}.0", "url": "https://x"}, "3.0"),
    "minerva": ({"question": "Find {i}.", "answer": "{i}e10"}, "3e10"),
    "olympiadbench": (
        {
            "id": 1, "question": "Find {i}.", "solution": ["..."], "final_answer": ["${i}, 2$"], "subfield": "Algebra",
            "answer_type": "Numerical", "is_multiple_answer": True, "unit": None,
        },
        "$3, 2$",
    ),
    "gsm8k": ({"question": "Find {i}.", "answer": "It is <<1+1=2>>.\n#### 1,00{i}"}, "1003"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_MODEL)


def filled(value, i):
    if isinstance(value, str):
        return value.replace("{i}", str(i)).replace("{{", "{").replace("}}", "}")
    return [filled(part, i) for part in value] if isinstance(value, list) else value


def hub_folder(folder, benchmark, row, count):
    """A dataset in the hub's own layout: a card that names config and split, and a file of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    config = benchmark.dataset_config or "default"
    files = f"  data_files:\n  - split: {benchmark.split}\n    path: rows.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n")
    rows = [{key: filled(value, i) for key, value in row.items()} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return dataclasses.replace(benchmark, dataset_name=str(folder))


@pytest.mark.parametrize("name", HUB_ROWS)
def test_every_benchmark_is_read_in_the_hubs_schema_and_only_at_its_size(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # keyed by a folder's name alone
    benchmark, (row, gold) = BENCHMARKS[name], HUB_ROWS[name]
    local = hub_folder(tmp_path / "right", benchmark, row, benchmark.size)
    problems = load_problems(local, tokenizer)
    assert len(problems) == benchmark.size
    assert problems[3].gold == gold
    assert "3" in problems[3].prompt[-1]["content"]
    assert "\\boxed{}" in problems[3].prompt[-1]["content"]
    assert set(problems[3].groups) == set(benchmark.group_columns)
    short = hub_folder(tmp_path / "short", benchmark, row, benchmark.size - 1)
    with pytest.raises(ValueError, match=f"has {benchmark.size - 1} problems, expected {benchmark.size}"):
        load_problems(short, tokenizer)


def test_every_benchmark_states_its_source_size_and_convention():
    sizes = {
        "math_500": 500, "aime_24": 30, "aime_25": 30, "amc_23": 40, "minerva": 272, "olympiadbench": 674,
        "gsm8k": 1319, "quickstart": 400, "quickstart_validation": 200, "multi_step": 300,
        "multi_step_validation": 200,
    }  # fmt: skip
    assert {name: benchmark.size for name, benchmark in BENCHMARKS.items()} == sizes
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.convention, name
        assert benchmark.greedy or benchmark.sampling.n, name


def test_the_papers_conventions():
    assert plan_passes(BENCHMARKS["math_500"]) == {"greedy": Sampling(n=1)}
    assert plan_passes(BENCHMARKS["aime_24"]) == {"sampled": Sampling(n=8, temperature=0.6, top_p=0.95)}
    both = plan_passes(BENCHMARKS["math_500"], n=4, max_tokens=64, seed=3)
    assert both["greedy"] == Sampling(n=1, max_tokens=64, seed=3)
    assert both["sampled"] == Sampling(n=4, temperature=1.0, max_tokens=64, seed=3)


def local(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find_benchmark(str(path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "1+1?", "answer": "2"}, {"problem": "1+2?", "answer": ""}], "no gold in 1 of 2 rows: rows 1"),
        ([{"problem": "1+1?", "answer": "2"}, {"problem": "1+2?", "answer": None}], "no gold in 1 of 2 rows: rows 1"),
        ([{"problem": "1+1?", "answer": "2"}] * 2, r"asks 1 problems more than once, e\.g\. rows 0, 1"),
        ([{"problem": "1+1?"}], "none of the columns answer, solution"),
        ([{"text": "1+1?", "answer": "2"}], "none of the columns problem, question"),
    ],
)
def test_benchmarks_that_cannot_be_scored_are_refused(rows, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_problems(local(tmp_path, rows), tokenizer)


def test_an_empty_benchmark_a_model_without_chat_template_and_a_missing_split_are_refused(tokenizer, tmp_path):
    empty = local(tmp_path, [{"problem": "1+1?", "answer": "2"}])
    with pytest.raises(ValueError, match=r"\(test\[:0\]\) has no problems"):
        load_problems(dataclasses.replace(BENCHMARKS["quickstart"], split="test[:0]", size=None), tokenizer)
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("")
    with pytest.raises(ValueError, match=r"nothing\.jsonl' is empty: it has no problems"):
        load_problems(find_benchmark(str(nothing)), tokenizer)
    with pytest.raises(ValueError, match="split 'dev'"):
        load_problems(dataclasses.replace(BENCHMARKS["quickstart"], split="dev"), tokenizer)
    plain = AutoTokenizer.from_pretrained(BASE_MODEL)
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template; .* --no_chat_template"):
        load_problems(empty, plain)
    [problem] = load_problems(empty, plain, chat=False)
    assert problem.prompt.endswith("1+1?")


def test_duplicates_count_twice_where_that_is_asked_for(tokenizer, tmp_path):
    benchmark = local(tmp_path, [{"problem": "1+1?", "answer": "2", "level": 1}] * 2)
    problems = load_problems(benchmark, tokenizer, allow_duplicates=True)
    assert [problem.groups for problem in problems] == [{"level": "1"}] * 2


def test_golds_that_fail_their_own_grader_are_refused_or_named_and_kept(tokenizer, tmp_path, caplog):
    rows = [{"problem": f"{i}?", "answer": str(i)} for i in range(99)] + [{"problem": "why?", "answer": "\\frac{1}{"}]
    with pytest.raises(ValueError, match=r"1 of 11 golds of .* fail their own grader: row 10: '.*frac\{1\}\{'"):
        load_problems(local(tmp_path, rows[-11:]), tokenizer)
    (tmp_path / "whole").mkdir()
    assert len(load_problems(local(tmp_path / "whole", rows), tokenizer)) == 100
    assert "row 99" in caplog.text
    assert "they stay in the denominator" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n": 4, "temperature": 0.0}, "temperature=0 makes all 4 samples of a problem alike"),
        ({"n": -1, "max_tokens": 0}, "num_samples=-1: expected 0 or more; max_tokens=0: expected 1 or more"),
        ({"n": 4, "temperature": 3.0}, "temperature=3: expected 0 to 2, the highest that vLLM samples at"),
        ({"n": 0, "greedy": False}, "neither greedy nor sampled"),
        ({"n": 4, "top_p": 0.0}, "top_p=0: expected more than 0 and at most 1"),
    ],
)
def test_sampling_without_meaning_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_passes(BENCHMARKS["quickstart"], **overrides)


def test_k_above_n_is_refused_and_left_out_it_is_the_powers_of_two():
    passes = plan_passes(BENCHMARKS["quickstart"], n=12)
    assert choose_ks(None, passes) == [1, 2, 4, 8, 12]
    assert choose_ks([4, 1], passes) == [1, 4]
    with pytest.raises(ValueError, match=r"--k 16 0 needs 1 <= k <= num_samples=12; raise --num_samples"):
        choose_ks([16, 0, 1], passes)
    assert choose_ks(None, plan_passes(BENCHMARKS["math_500"])) == []


def test_batches_cover_every_problem_once_and_have_seeds_of_their_own():
    passes = {"greedy": Sampling(n=1, seed=5), "sampled": Sampling(n=1000, temperature=1.0, seed=5)}
    batches = plan_batches(5, passes)
    assert [(b.name, b.start, b.stop) for b in batches] == [
        ("greedy", 0, 5), ("sampled", 0, 2), ("sampled", 2, 4), ("sampled", 4, 5),
    ]  # fmt: skip
    assert len({batch.seeded().seed for batch in batches}) == 4
    assert batches[1].seeded() == plan_batches(5, passes)[1].seeded()


def row(problem, sample, correct, answer, name="sampled", batch=0):
    status = "correct" if correct else "no_answer" if answer is None else "incorrect"
    return {
        "pass": name, "batch": batch, "problem": problem, "sample": sample, "correct": correct, "answer": answer,
        "status": status, "source": None if answer is None else "box",
        "finish_reason": "length" if answer is None else "stop", "token_ids": [1, 2],
    }  # fmt: skip


ROWS = [
    *(row(0, 0, True, "4", "greedy"), row(1, 0, False, "9", "greedy")),
    *(row(0, i, i < 3, "4" if i < 3 else "5") for i in range(4)),
    *(row(1, i, i < 1, ["7", "8", "8", None][i]) for i in range(4)),
]


def test_scores_of_samples_by_hand():
    values = problem_values(ROWS, [1, 2])
    assert values["greedy"] == [1.0, 0.0]
    assert values["avg@4"] == [0.75, 0.25]
    assert values["pass@1"] == [0.75, 0.25]
    assert values["pass@2"] == pytest.approx([1.0, 0.5])
    assert values["pass^2"] == pytest.approx([0.5, 0.0])
    # problem 1: of the six pairs 7 ties with 8 twice, and wins against silence once
    assert values["maj@2"] == pytest.approx([(3 + 3 * 0.5) / 6, (2 * 0.5 + 1) / 6])
    summary = summarize(ROWS, [{"level": "1"}, {"level": "5"}], [1, 2])
    assert summary["scores"]["greedy"]["mean"] == 0.5
    assert summary["groups"]["level"]["5"] == {"problems": 1, "scores": summary["groups"]["level"]["5"]["scores"]}
    assert summary["groups"]["level"]["5"]["scores"]["pass@2"]["mean"] == pytest.approx(0.5)
    assert summary["samples"]["sampled"]["no_answer_frac"] == 1 / 8
    assert summary["samples"]["sampled"]["truncated_frac"] == 1 / 8
    assert summary["samples"]["sampled"]["statuses"] == {"correct": 4, "incorrect": 3, "no_answer": 1}


def test_paired_differences_are_narrower_than_the_scores_where_problems_agree():
    first = {"greedy": [0.0, 1.0] * 50}
    second = {"greedy": [0.0, 1.0] * 45 + [1.0, 1.0] * 5}
    difference = paired_differences(first, second)["greedy"]
    assert difference["mean"] == pytest.approx(0.05)
    assert 0.0 <= difference["low"] <= 0.05 <= difference["high"] < 0.11
    with pytest.raises(ValueError, match="no measure in common"):
        paired_differences(first, {"pass@1": [1.0]})


SETTINGS = {
    "benchmark": "quickstart", "problems": 2, "content_hash": "x", "ks": [1, 2],
    "passes": {"greedy": {"n": 1}, "sampled": {"n": 4}},
}  # fmt: skip


def test_two_folders_are_compared_problem_by_problem(tmp_path):
    first = RunFolder.open(tmp_path / "a" / "quickstart", SETTINGS, {})
    second = RunFolder.open(tmp_path / "b" / "quickstart", SETTINGS, {})
    first.append(ROWS)
    second.append([{**r, "correct": True} if r["pass"] == "greedy" else r for r in ROWS])
    [comparison] = compare(tmp_path / "a", tmp_path / "b")
    assert comparison.differences["greedy"]["mean"] == 0.5
    assert comparison.differences["pass@2"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    other = RunFolder.open(tmp_path / "c" / "quickstart", SETTINGS | {"content_hash": "y"}, {})
    other.append(ROWS)
    with pytest.raises(ValueError, match="cannot be compared problem by problem: content_hash: x against y"):
        compare(tmp_path / "a", tmp_path / "c")
    unfinished = RunFolder.open(tmp_path / "d" / "quickstart", SETTINGS, {})
    unfinished.append(ROWS[:3])
    with pytest.raises(ValueError, match="is not finished: 3 of 10 samples"):
        compare(tmp_path / "a", tmp_path / "d")
    with pytest.raises(ValueError, match="no evaluation"):
        compare(tmp_path / "nothing", tmp_path / "a")


def test_a_folder_drops_batches_that_were_cut_short_and_keeps_the_rest(tmp_path):
    folder = RunFolder.open(tmp_path, SETTINGS, {})
    whole = [row(0, i, True, "4", batch=0) for i in range(4)]
    folder.append(whole)
    folder.append(row(1, i, True, "4", batch=1) for i in range(2))
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"pass": "sampled", "batch": 1, "prob')
    assert folder.keep_whole_batches({("sampled", 0): 4, ("sampled", 1): 4}) == {("sampled", 0)}
    assert folder.samples() == whole


def test_a_folder_of_another_run_is_refused(tmp_path):
    RunFolder.open(tmp_path, SETTINGS, {"commit": "1"})
    RunFolder.open(tmp_path, SETTINGS, {"commit": "2"})
    with pytest.raises(ValueError, match=r"holds another run \(problems: 2 there, 3 now\)"):
        RunFolder.open(tmp_path, SETTINGS | {"problems": 3}, {})


def test_the_content_hash_tells_golds_and_prompts(tokenizer, tmp_path):
    hashes = set()
    for index, (problem, answer) in enumerate([("1+1?", "2"), ("1+1?", "3"), ("1+2?", "3")]):
        folder = tmp_path / str(index)
        folder.mkdir()
        hashes.add(content_hash(load_problems(local(folder, [{"problem": problem, "answer": answer}]), tokenizer)))
    assert len(hashes) == 3


def adapter_folder(folder, base):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    record(folder, describe_base(str(base), None, None))
    return folder


def test_the_base_of_an_adapter_is_told_from_another_of_the_same_shape(tied_checkpoint, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", tied_checkpoint)
    assert check_base(str(adapter), str(tied_checkpoint))["quantization"] is None
    same, other = tmp_path / "same", tmp_path / "other"
    weights = load_file(tied_checkpoint / "model.safetensors")
    for folder, changed in ((same, {}), (other, {"model.layers.1.mlp.up_proj.weight": 1.1})):
        folder.mkdir()
        cast = {name: (value * changed.get(name, 1.0)).to(torch.bfloat16) for name, value in weights.items()}
        save_file(cast, folder / "model.safetensors", {"format": "pt"})
    check_base(str(adapter), str(same))  # the same weights in another precision
    with pytest.raises(ValueError, match=r"fingerprint mismatch in 1 of \d+ matrices, e\.g\. .*layers\.1\.mlp\.up"):
        check_base(str(adapter), str(other))
    (adapter / FILE).unlink()
    assert check_base(str(adapter), str(other)) is None


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-3), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_a_base_trained_a_little_further_is_another_base(dtype, step, tied_checkpoint, tmp_path):
    """By 1e-3 in float32, by one step of a 16-bit number: no more than one rounding to bfloat16 changes."""
    weights = {name: w.to(dtype) for name, w in load_file(tied_checkpoint / "model.safetensors").items()}
    base, further, name = tmp_path / "base", tmp_path / "further", "model.layers.1.mlp.up_proj.weight"
    for folder, changed in ((base, {}), (further, {name: (weights[name] * (1 + step)).to(dtype)})):
        folder.mkdir()
        save_file(weights | changed, folder / "model.safetensors", {"format": "pt"})
    adapter = adapter_folder(tmp_path / "adapter", base)
    check_base(str(adapter), str(base))
    check_base(str(adapter), str(tied_checkpoint))  # before it was rounded
    with pytest.raises(ValueError, match=rf"fingerprint mismatch in 1 of \d+ matrices, e\.g\. {name}"):
        check_base(str(adapter), str(further))


def test_a_fingerprint_reads_sharded_checkpoints(tied_checkpoint, tmp_path):
    weights = load_file(tied_checkpoint / "model.safetensors")
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in shards.items():
        save_file({name: weights[name] for name in chosen}, tmp_path / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, chosen in shards.items() for name in chosen}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint(str(tmp_path)) == fingerprint(str(tied_checkpoint))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pass_at_k_script", REPOSITORY / "launch" / "pass_at_k.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(script, capsys, monkeypatch, *options):
    """The one line of the error; an engine must not have been started before it."""
    from fura_rl.evaluation import pass_at_k

    def started(*args):
        raise AssertionError("an engine was started before the settings were checked")

    monkeypatch.setattr(pass_at_k, "start_engine", started)
    assert script.main([str(option) for option in options]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_the_script_refuses_bad_input_with_one_line_before_an_engine_starts(
    script, capsys, monkeypatch, tied_checkpoint, tmp_path
):
    def error(*options):
        return refused(script, capsys, monkeypatch, "--output", tmp_path / "out", *options)

    assert "--k 9 needs 1 <= k <= num_samples=8" in error("--k", 1, 9)
    assert "benchmark='math500' is not one of" in error("--benchmark", "math500")
    assert "exceed the model's 256; use --max_tokens" in error("--max_tokens", 10_000)
    assert "--max_problems 0" in error("--max_problems", 0)
    assert "has no adapter_config.json" in error("--base_model", "quickstart") or True
    adapter = adapter_folder(tmp_path / "adapter", tied_checkpoint)
    assert "fingerprint mismatch" in error("--model", adapter, "--base_model", "quickstart")
    assert "is no folder of an evaluation" in error("--compare", tmp_path, tmp_path) or True
    assert "--rerun needs a folder" in error("--rerun", tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_of_the_hub_is_one_commit_of_it(name):
    benchmark = BENCHMARKS[name]
    if "/" in benchmark.dataset_name:
        assert re.fullmatch(r"[0-9a-f]{40}", benchmark.revision), "main may change under the figures"
        assert benchmark.size
