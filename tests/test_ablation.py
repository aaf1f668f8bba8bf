"""Ablations: spec, cells and equal options, the table recomputed from raw files, the page, a real small sweep."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import matplotlib.image
import pytest
from conftest import REPOSITORY

from fura_rl.ablation import sweep
from fura_rl.ablation.cell import RESULT
from fura_rl.ablation.report import write_report
from fura_rl.ablation.results import collect
from fura_rl.ablation.spec import (
    Cell,
    load_spec,
    matched_settings,
    scored_splits,
    search_cells,
    table_cells,
    training_options,
)
from fura_rl.config import parse_arguments
from fura_rl.evaluation.run_folder import RunFolder

SPEC = f"""
base: {REPOSITORY}/configs/quickstart.yaml
adapters: [fura, {{adapter: lora, label: lora-wide, adapter_kwargs: {{r: 40}}, learning_rates: [1.0e-3]}}]
learning_rates: [1.0e-3, 3.0e-3]
seeds: [0, 1]
baseline: fura
settings: {{max_steps: 2, per_device_train_batch_size: 32}}
scoring: {{max_problems: 20, num_samples: 4, k: [1, 4]}}
"""
ENVIRONMENT = {"versions": {"torch": "1"}, "commit": "abc", "device": "cpu", "cpu_threads": 2}
CELL_ENVIRONMENT = {"versions": {"torch": "2.9"}, "commit": "cafe", "device": "a machine", "cpu_threads": 3}


def write(folder, text=SPEC):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.yaml").write_text(text)
    return folder / "spec.yaml"


def test_every_shipped_ablation_is_sound():
    files = sorted((REPOSITORY / "configs" / "ablation").glob("*.yaml"))
    assert files
    for file in files:
        spec = load_spec(file)
        assert len(spec.seeds) >= 5
        assert all(len(spec.rates_of(entry)) >= 4 for entry in spec.adapters)
        for cell in search_cells(spec)[:: len(spec.choosing_seeds)]:
            parse_arguments(training_options(spec, cell, {}, file.parent / "x"))


def test_cells_differ_in_adapter_rate_and_seed_alone(tmp_path):
    spec = load_spec(write(tmp_path))
    every = search_cells(spec)
    assert [cell.name for cell in every] == [
        *("fura/lr-0.001/seed-0", "fura/lr-0.001/seed-1", "fura/lr-0.003/seed-0", "fura/lr-0.003/seed-1"),
        *("lora-wide/lr-0.001/seed-0", "lora-wide/lr-0.001/seed-1"),
    ]
    settings = matched_settings(spec)
    resolved = [
        parse_arguments(training_options(spec, cell, settings[cell.label], tmp_path)).resolved() for cell in every
    ]
    for cell, values in zip(every, resolved, strict=True):
        assert (values["learning_rate"], values["seed"]) == (cell.learning_rate, cell.seed)
        assert values["max_steps"] == 2
        differing = {key for key in values if values[key] != resolved[0][key]}
        assert differing <= {"learning_rate", "seed", "adapter", "adapter_kwargs", "run_name", "data_seed"}
    assert settings == {"fura": {}, "lora-wide": {"r": 40}}


def test_budgets_are_matched_where_that_is_asked_for(tmp_path):
    spec = load_spec(write(tmp_path, SPEC + "match_parameters: fura\n"))
    assert matched_settings(spec) == {"fura": {}, "lora-wide": {"r": 9}}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: fura", "baseline: dora", "baseline='dora' is not one of the labels fura, lora-wide"),
        ("seeds: [0, 1]", "seeds: []", "seeds is not set"),
        ("seeds: [0, 1]", "seeds: [0, 1]\nsearch_seeds: [4, 4]", "search_seeds names 4 twice"),
        ("[fura, ", "[furra, ", r"adapter='furra' is not one of .* did you mean 'fura'\?"),
        ("learning_rates: [1.0e-3, 3.0e-3]", "", "fura has no learning_rates"),
        (
            "learning_rates: [1.0e-3, 3.0e-3]",
            "learning_rate: 1",
            r"'learning_rate' .*did you mean 'learning_rates'",
        ),
        ("max_steps: 2", "seed: 2", r"settings\.seed is what the ablation varies"),
        ("num_samples: 4", "samples: 4", r"'samples' in scoring"),
        ("label: lora-wide", "label: a/b", "label 'a/b' is no file name"),
        ("label: lora-wide", "label: fura", "label 'fura' occurs twice"),
    ],
)
def test_specs_without_meaning_are_refused(old, new, message, tmp_path):
    assert old in SPEC
    with pytest.raises(ValueError, match=message):
        load_spec(write(tmp_path, SPEC.replace(old, new)))


def fake_cell(output, cell, right, validation, rewards, **measured):
    """The raw files of a finished cell: `right[p]` of the four samples of problem p are correct."""
    folder = output / cell.name
    test = RunFolder.open(folder / "test", {"benchmark": "quickstart"}, {})
    test.append(
        {
            "pass": "sampled", "batch": 0, "problem": p, "sample": s, "correct": s < count, "status": "x",
            "answer": "1" if s < count else "2", "finish_reason": "stop", "token_ids": [], "source": "box",
        }
        for p, count in enumerate(right)
        for s in range(4)
    )  # fmt: skip
    result = {
        "trained_parameters": 10, "steps": 2, "steps_timed": 2, "phase_seconds": {"rollout": 4.0, "train": 2.0},
        "peak_memory_gib": 1.5, "payload_bytes": 4000, "rewards": rewards, "lengths": [], "probe_max_gap": 0.0,
        "scores": {"validation": {"scores": {"pass@1": {"mean": validation}}}}, **measured,
    }  # fmt: skip
    (folder / "run").mkdir()
    (folder / "run" / "environment.json").write_text(json.dumps(CELL_ENVIRONMENT))
    (folder / RESULT).write_text(json.dumps(result))


def measurements(kl, cosines):
    """What a cell measures of its trained policy."""
    spectrum = [1.0, 0.5, kl / 10]
    update = {"modules": 2, "relative_size": 0.02, "stable_rank": 3.5, "overlap": 0.25, "chance": 0.0625}
    return {
        "update_cosines": cosines,
        "evaluations": [[0, 0.2], [2, 0.2 + kl / 10]],
        "divergence": {"per_token": kl / 20, "per_completion": kl, "completions": 3},
        "update": update | {"spectrum": spectrum, "base_spectrum": [1.0, 0.8, 0.6]},
    }


@pytest.fixture
def finished(tmp_path):
    """Fura is better on validation at 0.003 and better on the test split at 0.001: only validation may choose."""
    spec, output = load_spec(write(tmp_path)), tmp_path / "out"
    right = {0.001: ([4, 4, 4], [4, 4, 4]), 0.003: ([2, 4, 0], [4, 4, 2])}
    for rate, validation in ((0.001, 0.3), (0.003, 0.6)):
        for seed in (0, 1):
            rewards, measured = [0.1, 0.2 + seed / 10], measurements(kl=0.5 + seed, cosines=[1.0, 0.9 - seed / 10])
            fake_cell(output, Cell("fura", rate, seed), right[rate][seed], validation, rewards, **measured)
    fake_cell(output, Cell("lora-wide", 0.001, 0), [0, 4, 0], 0.5, [0.1, 0.2])
    fake_cell(output, Cell("lora-wide", 0.001, 1), [2, 4, 0], 0.5, [0.1, 0.2])
    return spec, output


def test_the_table_is_what_the_raw_files_say(finished):
    spec, output = finished
    results = collect(spec, output)
    fura, lora = results.lines
    assert (fura.learning_rate, fura.at_edge) == (0.003, True), "chosen on the validation split"
    per_problem = [(2 + 4) / 8, (4 + 4) / 8, (0 + 2) / 8]
    assert fura.scores["pass@1"]["mean"] == pytest.approx(statistics.fmean(per_problem))
    assert lora.scores["pass@1"]["mean"] == pytest.approx((2 / 8 + 1 + 0) / 3)
    differences = [2 / 8 - per_problem[0], 0.0, 0 - per_problem[2]]
    assert lora.differences["pass@1"]["mean"] == pytest.approx(statistics.fmean(differences))
    assert lora.differences["pass@1"]["low"] == pytest.approx(min(differences))
    assert lora.differences["pass@1"]["high"] == pytest.approx(0.0)
    assert fura.differences == {}
    assert fura.seed_deviation["pass@1"] == pytest.approx(statistics.stdev([6 / 12, 10 / 12]))
    assert fura.phase_seconds_per_step == {"rollout": 2.0, "train": 1.0}
    assert (results.failed, results.unfinished) == ({}, [])
    assert fura.kl_per_completion == {"mean": 1.0, "deviation": pytest.approx(statistics.stdev([0.5, 1.5]))}
    assert fura.kl_per_token["mean"] == pytest.approx(0.05)
    assert fura.update_cosine["mean"] == pytest.approx(statistics.fmean([0.95, 0.9]))
    assert fura.update["stable_rank"] == {"mean": 3.5, "deviation": 0.0}
    assert fura.spectrum == pytest.approx([1.0, 0.5, 0.1])
    assert fura.evaluations == [[[0, 0.2], [2, 0.25]], [[0, 0.2], [2, 0.35]]]
    assert (lora.kl_per_token, lora.spectrum, lora.update_cosine) == (None, None, None), "run before it was measured"
    assert results.environments == [CELL_ENVIRONMENT]


def two_stage(folder, search_seeds):
    return load_spec(write(folder, SPEC + f"search_seeds: {search_seeds}\n"))


def test_search_seeds_choose_the_rate_and_take_no_part_in_the_table(tmp_path):
    """By the search seed 0.001 is best, by every score of the table's seeds 0.003 would be."""
    spec, output = two_stage(tmp_path, [7]), tmp_path / "out"
    assert [cell.seed for cell in search_cells(spec)] == [7, 7, 7]
    for rate, validation in ((0.001, 0.6), (0.003, 0.3)):
        fake_cell(output, Cell("fura", rate, 7), [0, 0, 0], validation, [0.0])
        for seed in (0, 1):
            right = [1, 2, 3] if rate == 0.001 else [4, 4, 4]
            fake_cell(output, Cell("fura", rate, seed), right, 1 - validation, [0.1, 0.2])
    fake_cell(output, Cell("lora-wide", 0.001, 7), [4, 4, 4], 0.5, [0.0])
    results = collect(spec, output)
    [fura] = results.lines
    assert (fura.label, fura.learning_rate, fura.seeds) == ("fura", 0.001, 2)
    assert fura.validation == {"0.001": 0.6, "0.003": 0.3}
    assert fura.scores["pass@1"]["mean"] == pytest.approx(6 / 12)
    assert results.unfinished == ["lora-wide/lr-0.001/seed-0", "lora-wide/lr-0.001/seed-1"]
    write_report(spec, results, output, ENVIRONMENT)
    note = "chosen with seeds 7 alone; only the chosen ones were run with seeds 0, 1"
    assert note in (output / "report.md").read_text()
    assert note in (output / "report.html").read_text()


@pytest.mark.parametrize(
    ("search_seeds", "searched", "tabled"),
    [
        ([7], ["validation"], ["test"]),
        ([0], ["validation", "test"], ["test"]),
        ([], ["validation", "test"], ["validation", "test"]),
    ],
)
def test_a_cell_is_scored_on_the_splits_that_its_seed_is_for(search_seeds, searched, tabled, tmp_path):
    spec = two_stage(tmp_path, search_seeds)
    table = table_cells(spec, {"fura": 0.003})
    assert [cell.name for cell in table] == ["fura/lr-0.003/seed-0", "fura/lr-0.003/seed-1"]
    assert scored_splits(spec, search_cells(spec)[0]) == searched
    assert scored_splits(spec, table[1]) == tabled


def test_only_the_chosen_rate_is_run_with_every_seed_and_a_resumed_search_is_not_repeated(tmp_path, monkeypatch):
    spec, output, ran = two_stage(tmp_path, [0]), tmp_path / "out", []

    def run_cell(folder):
        name = folder.relative_to(output).as_posix()
        ran.append(name)
        if name == broken:
            return 1
        request = json.loads((folder / "cell.json").read_text())
        score = {"scores": {"pass@1": {"mean": 0.9 if "lr-0.003" in name else 0.1}}}
        (folder / RESULT).write_text(json.dumps({"scores": dict.fromkeys(request["splits"], score)}))
        return 0

    monkeypatch.setattr(sweep, "run_cell", run_cell)
    broken = "fura/lr-0.003/seed-0"
    assert [cell.name for cell in sweep.run_sweep(spec, output, 2, lambda line: None)] == [broken]
    search = ["fura/lr-0.001/seed-0", "fura/lr-0.003/seed-0", "lora-wide/lr-0.001/seed-0"]
    assert sorted(ran[:3]) == search
    assert sorted(ran[3:]) == ["fura/lr-0.001/seed-1", "lora-wide/lr-0.001/seed-1"], "a failed rate is not chosen"
    ran.clear()
    broken, told = None, []
    assert sweep.run_sweep(spec, output, 2, told.append) == []
    assert ran == ["fura/lr-0.003/seed-0", "fura/lr-0.003/seed-1"], "its score came late and changed the choice"
    assert "chosen on the validation split: fura 0.003, lora-wide 0.001" in told


def test_a_rate_with_a_missing_seed_takes_no_part_and_failures_are_told(finished):
    spec, output = finished
    folder = output / "fura/lr-0.003/seed-1"
    (folder / RESULT).unlink()
    (folder / sweep.FAILED).write_text("exit code 1\nValueError: <boom>\n")
    results = collect(spec, output)
    assert results.lines[0].learning_rate == 0.001
    assert list(results.failed) == ["fura/lr-0.003/seed-1"]
    write_report(spec, results, output, ENVIRONMENT)
    page = (output / "report.html").read_text()
    assert "ValueError: &lt;boom&gt;" in page
    assert "Failed cells: fura/lr-0.003/seed-1" in (output / "report.md").read_text()


def test_the_report_says_what_the_results_say_and_needs_nothing_else(finished):
    spec, output = finished
    results = collect(spec, output)
    write_report(spec, results, output, ENVIRONMENT)
    page, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    for line in results.lines:
        assert f"{line.scores['pass@1']['mean']:.3f} (" in text
        assert f"{line.scores['pass@4']['mean']:.3f} (" in page
    assert not re.search(r"(?:src|href)=['\"](?!data:)", page), "nothing is loaded from elsewhere"
    assert "<script" not in page
    titles = ("on the test split", "Reward during", "Held-out pass@1 during", "KL to the base", "Spectra", "by phase")
    assert page.count("data:image/png;base64,") == 2 * len(titles)
    for title in titles:
        assert re.search(rf"<h2>[^<]*{title}", page), title
        assert re.search(rf"## .*{title}", text), title
    figures = re.findall(r"!\[.*\]\((figures/.*\.png)\)", text)
    assert len(figures) == len(titles)
    assert all((output / figure).read_bytes().startswith(b"\x89PNG") for figure in figures)
    measured_with = "commit cafe on a machine, 3 threads with torch 2.9; seeds 0, 1; 4 samples a problem"
    tables = page.count("<table")
    assert page.count(f"{measured_with}</figcaption>") == tables + len(titles), "under every table and plot"
    assert text.count(f"{measured_with}*") == tables + len(titles)
    assert "Config quickstart.yaml" in page
    assert "0.0500 ± 0.0354" in page, "KL per token"
    assert "0.250 ± 0.000 (random 0.062)" in text, "overlap"
    assert "prefers-color-scheme: dark" in page
    assert str(output) not in page + text, "no path of this machine"
    saved = json.loads((output / "results.json").read_text())
    assert saved["lines"][0]["scores"] == results.lines[0].scores


def test_what_the_cells_did_not_record_is_left_out_of_the_report(finished):
    spec, output = finished
    for file in output.rglob("environment.json"):
        file.unlink()
    for file in output.rglob(RESULT):
        unmeasured = json.loads(file.read_text())
        for key in measurements(kl=0.0, cosines=[]):
            unmeasured.pop(key, None)
        file.write_text(json.dumps(unmeasured))
    write_report(spec, collect(spec, output), output, ENVIRONMENT)
    page = (output / "report.html").read_text()
    assert "commit abc on cpu, 2 threads" in page
    assert page.count("data:image/png;base64,") == 2 * 3
    assert "<td>-</td>" in page


LIGHT_DARK = {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (500, "light")])
def test_the_report_is_drawn_by_a_real_browser(finished, width, scheme):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    spec, output = finished
    write_report(spec, collect(spec, output), output, ENVIRONMENT)
    shot = output / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},4000"]
    command = [browser, *options, *LIGHT_DARK[scheme], f"--screenshot={shot}", f"file://{output}/report.html"]
    subprocess.run(command, check=True, capture_output=True, timeout=400)
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[1] == width
    corner = pixels[2, 2].mean()
    assert corner > 0.95 if scheme == "light" else corner < 0.15
    ink = abs(pixels - pixels[2, 2]).max(axis=-1) > 0.4
    assert 0.002 < ink.mean() < 0.5, "there is text"
    assert ink[:, -4:].mean() < 0.02, "nothing runs out of the page"
    colours = {"light": (0.12, 0.47, 0.71), "dark": (0.55, 0.83, 0.78)}[scheme]
    assert (abs(pixels - colours).max(axis=-1) < 0.05).sum() > 20, "the curves of this scheme are drawn"


def test_a_folder_of_another_ablation_is_refused(finished, tmp_path):
    spec, output = finished
    sweep.open_sweep(spec, output)
    sweep.open_sweep(spec, output)
    with pytest.raises(ValueError, match="holds another ablation: seeds differ"):
        sweep.open_sweep(load_spec(write(tmp_path, SPEC.replace("[0, 1]", "[0, 2]"))), output)


def test_finished_cells_are_not_run_again_and_one_failure_does_not_stop_the_rest(tmp_path, monkeypatch):
    spec, output, ran, told = load_spec(write(tmp_path)), tmp_path / "out", [], []

    def run_cell(folder):
        ran.append(folder.relative_to(output).as_posix())
        if "seed-1" in folder.name:
            return 1
        (folder / RESULT).write_text(json.dumps({"scores": {"validation": {"scores": {"pass@1": {"mean": 0.5}}}}}))
        return 0

    monkeypatch.setattr(sweep, "run_cell", run_cell)
    failed = sweep.run_sweep(spec, output, 2, told.append)
    assert len(ran) == 6
    assert sorted(cell.name for cell in failed) == sorted(name for name in ran if name.endswith("seed-1"))
    ran.clear()
    sweep.run_sweep(spec, output, 1, told.append)
    assert all(name.endswith("seed-1") for name in ran)
    assert len(ran) == 3
    assert "6 cells, 3 done already" in told


SMALL = f"""
base: {REPOSITORY}/configs/quickstart.yaml
adapters: [fura, lora]
learning_rates: [3.0e-3]
seeds: [0]
baseline: lora
match_parameters: fura
settings: {{max_steps: 4, save_steps: 1, per_device_train_batch_size: 16, logging_steps: 1}}
scoring: {{max_problems: 16, num_samples: 2, k: [1, 2]}}
"""


def ablate(spec, output):
    command = [sys.executable, "launch/ablate.py", str(spec), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=1800)
    logs = [file.read_text()[-3000:] for file in output.rglob("log.txt")]
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + "\n".join(logs)
    return done.stdout


def scores(output):
    results = json.loads((output / "results.json").read_text())
    return [(line["label"], line["scores"], line["differences"], line["rewards"]) for line in results["lines"]]


MEASURED = f"""
base: {REPOSITORY}/configs/quickstart.yaml
adapters: [full]
learning_rates: [1.0e-3]
seeds: [0]
baseline: full
settings:
  max_steps: 4
  per_device_train_batch_size: 16
  eval_strategy: steps
  eval_steps: 2
  eval_on_start: true
  eval_problems: 16
  eval_samples: 2
  dataset_eval_split: validation
scoring: {{max_problems: 16, num_samples: 2, k: [1, 2]}}
"""


@pytest.mark.slow
def test_a_real_cell_measures_its_policy(tmp_path):
    ablate(write(tmp_path, MEASURED), tmp_path / "out")
    raw = json.loads((tmp_path / "out/full/lr-0.001/seed-0" / RESULT).read_text())
    assert [step for step, _ in raw["evaluations"]] == [0, 2, 4]
    assert 1e-6 < raw["divergence"]["per_token"] < raw["divergence"]["per_completion"]
    assert raw["divergence"]["completions"] == 16
    assert raw["update"]["modules"] == 7 * 4
    assert 0 < raw["update"]["relative_size"] < 0.5
    assert set(raw["phase_seconds"]) == {"rollout", "reward", "sync", "evaluation", "train"}
    assert len(raw["update_cosines"]) == raw["steps"] + 1, "a sync a step, and one for the last evaluation"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 6
    recorded = json.loads((tmp_path / "out/full/lr-0.001/seed-0/run/environment.json").read_text())
    assert f"commit {recorded['commit']} on" in page


@pytest.mark.slow
def test_a_killed_sweep_gives_the_table_of_an_unkilled_one(tmp_path):
    spec = write(tmp_path, SMALL)
    told = ablate(spec, tmp_path / "whole")
    assert "[2/2]" in told
    killed = tmp_path / "killed"
    command = [sys.executable, "launch/ablate.py", str(spec), "--output", str(killed)]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY, start_new_session=True)
    deadline = time.monotonic() + 1200
    while not (killed / "fura/lr-0.003/seed-0/run/checkpoint-2/trainer_state.json").is_file():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    assert not list(killed.rglob(RESULT))
    shutil.copytree(tmp_path / "whole" / "lora", killed / "lora", dirs_exist_ok=True)  # it would only be run once more
    assert "2 cells, 1 done already" in ablate(spec, killed)
    assert scores(killed) == scores(tmp_path / "whole")
    lines = json.loads((killed / "results.json").read_text())["lines"]
    first_steps = {tuple(line["rewards"][0][:1]) for line in lines}
    assert len(first_steps) == 1, "the same prompts and rollouts at the first step, whatever the adapter"
    assert abs(lines[0]["trained_parameters"] / lines[1]["trained_parameters"] - 1) < 0.1
