"""The main job through its real scripts: train, evaluate, interrupt, resume, every shipped config, the README."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_random_checkpoint
from safetensors.torch import load_file, save_file

from fura_rl.quickstart import BASE_MODEL

pytestmark = pytest.mark.slow

LAUNCH = [
    *(str(Path(sys.executable).parent / "accelerate"), "launch"),
    *("--config_file", "configs/accelerate/cpu.yaml", "launch/grpo_math.py"),
]
SHORT = ["--eval_problems", "0", "--save_steps", "2", "--max_steps", "4"]


def run(command, timeout=900):
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def accuracies(text, row):
    before, after = re.search(rf"{re.escape(row)}\s*│\s*([\d.]+) │\s*([\d.]+) │", text).groups()
    return float(before), float(after)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The whole quickstart, as `make demo` runs it: its output and its folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    return run([*LAUNCH, "--output_dir", str(folder)], timeout=1500), folder


def test_the_quickstart_lifts_held_out_accuracy(quickstart):
    text, folder = quickstart
    before, after = accuracies(text, "greedy")
    assert before < 0.5
    assert after > 0.85  # 0.9 in 9 seeds of 10; this guards against a break, not against an unlucky machine
    assert after > before
    for name in ("reward_curve.png", "adapter_model.safetensors", "resolved_config.yaml", "environment.json"):
        assert (folder / name).stat().st_size > 100, name
        assert str(folder) in text
    assert accuracies((folder / "report.txt").read_text(), "greedy") == (before, after)
    assert json.loads((folder / "report.json").read_text())["after"]["greedy"] == pytest.approx(after, abs=5e-4)
    assert all((path / "base_model_fingerprint.json").is_file() for path in (folder, *folder.glob("checkpoint-*")))
    for phase in ("rollout", "reward", "train", "sync"):
        assert phase in text


def test_every_step_logged_its_sync(quickstart):
    _, folder = quickstart
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert len(history) >= 100
    probed = [entry["sync/probe_max_gap"] for entry in history if "sync/probe_max_gap" in entry]
    assert len(probed) >= len(history) // 10
    assert max(probed) < 1e-4
    for entry in history:
        assert entry["sync/update_cosine"] == pytest.approx(1.0, abs=1e-6)
        assert entry["sync/payload_bytes"] == history[0]["sync/payload_bytes"] > 0
        assert entry["sync/seconds"] > 0


def test_pass_at_k_of_the_trained_adapter_agrees_with_the_run(quickstart, tmp_path):
    text, folder = quickstart
    command = [sys.executable, "launch/pass_at_k.py", "--model", str(folder), "--output", str(tmp_path)]
    table = run([*command, "--max_problems", "200", "--num_samples", "4", "--k", "1", "4"])
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    scores = {measure: estimate["mean"] for measure, estimate in summary["scores"].items()}
    assert scores["greedy"] == pytest.approx(accuracies(text, "greedy")[1], abs=0.02)
    assert scores["pass@1"] <= scores["pass@4"]
    assert summary["samples"]["sampled"]["count"] == 800
    assert "pass@4" in table


@pytest.mark.parametrize("adapter", ["svd", "lora", "dora", "full"])
def test_every_adapter_trains_through_the_same_path(adapter, tmp_path):
    text = run([*LAUNCH, *SHORT, "--adapter", adapter, "--output_dir", str(tmp_path), "--sync_probe_every", "1"])
    assert f"adapter {adapter}, " in text
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert all(entry["sync/probe_max_gap"] < 1e-4 for entry in history if "reward" in entry)


def test_a_model_that_vllm_takes_from_transformers_trains_too(tmp_path):
    model = make_random_checkpoint(tmp_path / "model", "smollm3")
    options = ["--config", "configs/quickstart.yaml", "--model_name_or_path", str(model), "--sync_probe_every", "1"]
    run([*LAUNCH, *SHORT, *options, "--output_dir", str(tmp_path / "run")])
    history = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "reward" in entry]
    assert len(steps) == 4
    assert all(entry["sync/probe_max_gap"] < 1e-4 for entry in steps)


def test_runs_that_start_together_do_not_take_each_others_port():
    command = [sys.executable, "launch/grpo_math.py", "--dry_run"]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=900)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said[0][-3000:] + said[1][-3000:]


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs" / "qwen3-1.7b").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_survives_a_dry_run(config):
    text = run([sys.executable, "launch/grpo_math.py", "--config", str(config), "--dry_run"])
    assert "dry run: one GRPO step done" in text


def losses(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def test_resuming_goes_on_from_the_checkpoint(tmp_path):
    run([*LAUNCH, *SHORT, "--max_steps", "2", "--output_dir", str(tmp_path)])
    before = losses(tmp_path, 2)
    run([*LAUNCH, *SHORT, "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")])
    after = losses(tmp_path, 4)
    assert after[: len(before)] == before
    assert [entry["step"] for entry in after if "reward" in entry] == [1, 2, 3, 4]


def test_a_run_whose_data_or_base_was_exchanged_under_the_same_path_is_refused(tmp_path):
    base, data, output = tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "run"
    shutil.copytree(BASE_MODEL, base)
    rows = "".join(json.dumps({"problem": f"What is {a} + 11?", "answer": str(a + 11)}) + "\n" for a in range(10, 60))
    data.write_text(rows)
    inputs = ["--config", "configs/quickstart.yaml", "--model_name_or_path", str(base), "--dataset_name", str(data)]
    command = [*LAUNCH, *SHORT, "--max_steps", "2", *inputs, "--output_dir", str(output)]
    run(command)

    def refusal():
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
        assert done.returncode != 0
        return done.stderr

    data.write_text(rows.replace("What is 10", "How much is 10"))
    assert "holds a run at step 2 with other settings: contents_of_train_set='" in refusal()
    data.write_text(rows)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert "fingerprint mismatch in 1 of" in (text := refusal())
    assert "name another output_dir to start anew" in text


def test_ctrl_c_leaves_a_checkpoint_and_no_orphan(tmp_path):
    command = [*LAUNCH, *SHORT, "--max_steps", "500", "--save_steps", "500", "--output_dir", str(tmp_path)]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=REPOSITORY, start_new_session=True)
    deadline = time.monotonic() + 300
    while "2/500" not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: launcher and run alike
    assert process.wait(120) != 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and alive(process.pid):
        time.sleep(0.5)
    assert not alive(process.pid), "an orphan is left"
    [checkpoint] = tmp_path.glob("checkpoint-*")
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert "the same command goes on from" in log.read_text()


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_readmes_python_blocks_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, "-c", block], capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_the_readmes_commands_are_known():
    from fura_rl.config import refuse_faults

    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    training = [line[line.index("launch/grpo_math.py") + 1 :] for line in lines if "launch/grpo_math.py" in line]
    assert len(training) == 6
    for options in training:
        refuse_faults([option for option in options if option != "--help"])
    targets = {line[1] for line in lines if line[:1] == ["make"]}
    makefile = (REPOSITORY / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(f"\n{target}: " in makefile for target in targets)


def test_pefts_own_tests_pass_on_fura(tmp_path):
    """PEFT's sdist holds its tests; the runner beside the project puts FuraConfig through them."""
    runner = REPOSITORY.parent / "shared" / "conformance" / "peft_conformance.py"
    if not runner.is_file():
        pytest.skip("the conformance runner is not beside this checkout")
    import peft

    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    run([*pip, "--no-build-isolation", f"peft=={peft.__version__}", "--dest", str(tmp_path)])
    [archive] = tmp_path.glob("peft-*.tar.gz")
    run(["tar", "-xzf", str(archive), "-C", str(tmp_path)])
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "PEFT_CONF_TESTS": str(tmp_path / f"peft-{peft.__version__}" / "tests"),
        "PEFT_CONF_CONFIG": "fura_rl:FuraConfig",
        "PEFT_CONF_SUITES": "custom,config,decoder,seqcls,feature,tokencls,encdec,quant",
    }
    done = subprocess.run(
        [sys.executable, str(runner), "-p", "no:cacheprovider"],
        capture_output=True, text=True, timeout=900, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed > 500
