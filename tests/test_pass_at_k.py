"""pass@k through the real script and engine: killed and resumed, repeated from its folder, graded again apart."""

import json
import re
import time

import pytest
from preloaded import said, started

pytestmark = pytest.mark.slow
SCRIPT = ["launch/pass_at_k.py", "--num_samples", "16", "--k", "1", "4", "16", "--max_problems", "300"]


def lines(folder):
    file = folder / "quickstart" / "samples.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unkilled")
    return said(*SCRIPT, "--output", folder), folder


def test_a_killed_run_resumes_to_the_file_of_an_unkilled_one(unkilled, tmp_path):
    _, folder = unkilled
    process = started(*SCRIPT, "--output", tmp_path, log=tmp_path / "log.txt")
    deadline = time.monotonic() + 300
    while len(lines(tmp_path)) < 300 + 2048:  # the greedy pass and the first batch
        assert process.is_alive(), (tmp_path / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join(60)
    killed = lines(tmp_path)
    assert len(killed) < 300 * 17, "the kill must come before the end"
    with open(tmp_path / "quickstart" / "samples.jsonl", "a") as file:
        file.write('{"pass": "sampled", "batch": 256, "problem": 256, "samp')  # as a kill amid a write leaves it
    before = (tmp_path / "quickstart" / "config.json").read_text()
    text = said(*SCRIPT, "--output", tmp_path)
    first_shown = int(re.search(r"sampling:.*?\| (\d+)/5100", text).group(1))
    assert first_shown >= 300 + 2048, "what was there is not sampled again"
    assert lines(tmp_path) == lines(folder)
    assert lines(tmp_path)[: len(killed)] == killed
    assert (tmp_path / "quickstart" / "config.json").read_text() == before
    summaries = [(path / "quickstart" / "summary.json").read_text() for path in (tmp_path, folder)]
    assert summaries[0] == summaries[1]


def test_an_evaluation_is_repeated_from_its_folder(unkilled, tmp_path):
    _, folder = unkilled
    said(*SCRIPT, "--rerun", folder, "--output", tmp_path)
    assert lines(tmp_path) == lines(folder)
    assert (tmp_path / "arguments.json").read_text() == (folder / "arguments.json").read_text()


def graded_apart(text, gold):
    """An independent grader for whole numbers: the last box, read by Python."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return bool(boxes) and boxes[-1].strip().lstrip("+").isdigit() and int(boxes[-1]) == int(gold)


def test_an_independent_grader_and_estimator_agree_with_the_summary(unkilled):
    text, folder = unkilled
    rows = [json.loads(line) for line in lines(folder)]
    summary = json.loads((folder / "quickstart" / "summary.json").read_text())
    assert len(rows) == 300 * 17
    verdicts = {}
    for row in rows:
        right = graded_apart(row["text"], row["gold"])
        assert right == row["correct"], row
        verdicts.setdefault((row["pass"], row["problem"]), []).append(right)
    greedy = [right for (name, _), [right, *_] in verdicts.items() if name == "greedy"]
    sampled = [rights for (name, _), rights in verdicts.items() if name == "sampled"]
    assert {len(rights) for rights in sampled} == {16}
    assert summary["scores"]["greedy"]["mean"] == pytest.approx(sum(greedy) / 300)
    assert summary["scores"]["avg@16"]["mean"] == pytest.approx(sum(map(sum, sampled)) / 4800)
    assert summary["scores"]["pass@16"]["mean"] == pytest.approx(sum(map(any, sampled)) / 300)
    assert summary["scores"]["pass^16"]["mean"] == pytest.approx(sum(map(all, sampled)) / 300)
    assert f"{summary['scores']['pass@4']['mean']:.3f}" in text
    wanted = {"pass", "prompt", "token_ids", "text", "answer", "gold", "correct", "status", "reason", "finish_reason"}
    assert all(wanted <= row.keys() for row in rows)


def test_two_runs_are_compared_and_a_foreign_folder_is_refused(unkilled, tmp_path):
    _, folder = unkilled
    compared = said("launch/pass_at_k.py", "--compare", folder, folder)
    assert re.search(r"pass@16 .*\+0\.000 .*\+0\.000 to \+0\.000", compared)
    refusal = said(*SCRIPT, "--seed", 1, "--output", folder, code=2)
    assert "holds another run (passes: " in refusal
