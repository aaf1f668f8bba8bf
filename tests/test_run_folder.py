"""What a run leaves beside its checkpoints, what never gets there, and what is loaded and sent only when asked."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
import yaml
from conftest import REPOSITORY
from rollout_server import child_environment

from fura_rl import telemetry
from fura_rl.alarms import ALARMS
from fura_rl.config import parse_arguments, resolve_model
from fura_rl.metrics_file import FILE, MetricsFile
from fura_rl.quickstart import BASE_MODEL
from fura_rl.redaction import redacted
from fura_rl.report import write_record
from fura_rl.serve import command

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")
SECRET = "hf_aSecretThatNobodyMayRead"


def log(folder, steps, *, resumed_at=0, end=True):
    """Training from a step on, as transformers calls its callbacks."""
    callback = MetricsFile(folder)
    state = SimpleNamespace(is_world_process_zero=True, global_step=resumed_at)
    callback.on_train_begin(None, state, None)
    for step in steps:
        state.global_step = step
        callback.on_log(None, state, None, logs={"loss": step / 10, "grad_norm": float("nan")})
    if end:
        callback.on_train_end(None, state, None)


def logged(folder):
    return [json.loads(line)["step"] for line in (folder / FILE).read_text().splitlines()]


def test_every_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    log(tmp_path, [1, 2], end=False)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines] == [(1, 0.1, None), (2, 0.2, None)]
    assert all(line["time"] > 1e9 for line in lines)


def test_a_resumed_run_has_every_step_once(tmp_path):
    log(tmp_path, [1, 2, 3, 4, 5])
    with open(tmp_path / FILE, "a") as file:
        file.write('{"step": 6, "lo')  # a kill struck here
    log(tmp_path, [4, 5, 6], resumed_at=3)
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6]
    log(tmp_path, [1])
    assert logged(tmp_path) == [1], "a run that starts anew"


def test_an_evaluation_before_the_first_step_stays_in_the_file_of_a_resumed_run(tmp_path):
    log(tmp_path, [0, 1, 2, 3])
    log(tmp_path, [3], resumed_at=2)
    assert logged(tmp_path) == [0, 1, 2, 3]


def test_only_the_first_process_writes(tmp_path):
    MetricsFile(tmp_path).on_train_begin(None, SimpleNamespace(is_world_process_zero=False, global_step=0), None)
    assert not (tmp_path / FILE).exists()


def test_the_record_repeats_the_run_and_names_its_machine(tmp_path):
    write_record(tmp_path, parse_arguments(["--config", QUICKSTART, "--seed", "7"]).resolved())
    settings = yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())
    assert (settings["seed"], settings["adapter"], settings["alarm_patience"]) == (7, "fura", 10)
    record = json.loads((tmp_path / "environment.json").read_text())
    assert {"versions", "python", "commit", "device", "devices", "cuda", "cpu_cores", "memory_gib", "processes"} <= (
        record.keys()
    )
    assert record["versions"]["trl"].count(".") == 2


def test_a_resumed_run_keeps_what_it_ran_on_before_and_says_where_that_differs(tmp_path, caplog):
    file = tmp_path / "environment.json"
    write_record(tmp_path, {"seed": 1})
    first = json.loads(file.read_text())
    write_record(tmp_path, {"seed": 1}, resumed=True)
    assert json.loads(file.read_text())["earlier"] == [first]
    assert not caplog.text
    older = first | {"versions": first["versions"] | {"torch": "1.0"}}
    file.write_text(json.dumps(older | {"earlier": [first]}))
    write_record(tmp_path, {"seed": 1}, resumed=True)
    assert json.loads(file.read_text())["earlier"] == [first, older]
    assert f"torch 1.0 -> {first['versions']['torch']}" in caplog.text
    write_record(tmp_path, {"seed": 1})
    assert "earlier" not in json.loads(file.read_text()), "a run that starts anew"


def test_no_secret_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET[::-1])
    monkeypatch.setenv("MY_SWITCH_TOKEN", "1")
    options = ["--hub_token", SECRET, "--run_name", f"with {SECRET[::-1]} in it", "--seed", "1"]
    arguments = parse_arguments(["--config", QUICKSTART, *options])
    settings = arguments.resolved() | {"reward_funcs": ["judge(api_key='of an argument', n=2)"]}
    write_record(tmp_path, settings)
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert SECRET not in text
    assert SECRET[::-1] not in text
    assert "of an argument" not in text
    assert "n=2" in text
    assert yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())["seed"] == 1, "a switch is no secret"


def test_redaction_goes_into_everything():
    value = {"a": [{"hub_token": "x", "max_tokens": 5, "tokenizer": "y"}], "b": ("password='z'",)}
    expected = {"a": [{"hub_token": "<hub_token>", "max_tokens": 5, "tokenizer": "y"}], "b": ["password=<not shown>"]}
    assert redacted(value, {}) == expected


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_PAT", "OPENAI_KEY", "SSH_PRIVATE_KEY", "access_key", "api_key",
        "apikey", "authorization", "Proxy-Authorization", "x-api-key",
    ],
)  # fmt: skip
def test_a_secret_goes_by_many_names(name):
    assert redacted({name: SECRET}, {}) == {name: f"<{name}>"}
    assert redacted(f"with {SECRET}", {name: SECRET}) == f"with <{name}>"
    argument = name.replace("-", "_")
    assert redacted(f"judge({argument}='{SECRET}')", {}) == f"judge({argument}=<not shown>)"


def test_what_only_sounds_like_a_secret_is_recorded():
    value = {"max_tokens": "5", "tokenizer": "t", "key_column": "k", "pattern": "p", "patience": "q"}
    assert redacted(value, {"PATH": "/usr/bin", "KEYBOARD": "qwerty"}) == value


def test_a_pickle_of_the_arguments_has_no_secret_and_else_everything(tmp_path, monkeypatch):
    """transformers writes one into every checkpoint and beside every saved model."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET[::-1])
    options = ["--hub_token", SECRET, "--run_name", f"with {SECRET[::-1]} in it", "--eval_strategy", "no"]
    arguments = parse_arguments(["--config", QUICKSTART, *options]).training
    torch.save(arguments, tmp_path / "training_args.bin")
    assert not {SECRET.encode(), SECRET[::-1].encode()} & set(
        re.findall(rb"\w+", (tmp_path / "training_args.bin").read_bytes())
    )
    loaded = vars(torch.load(tmp_path / "training_args.bin", weights_only=False))
    assert {name for name, value in vars(arguments).items() if repr(loaded[name]) != repr(value)} == {
        "hub_token", "run_name",
    }  # fmt: skip
    assert arguments.hub_token == SECRET, "the run itself has it"


def test_the_servers_command_line_shows_no_token(monkeypatch):
    monkeypatch.setenv("FURA_ROLLOUT_TOKEN", SECRET)
    words = command("model", "0.0.0.0", 8000, ["--middleware", "another.one"])
    assert SECRET not in " ".join(words)
    assert "fura_rl.serve.RequireToken" in words


def test_an_address_with_credentials_is_refused():
    with pytest.raises(ValueError, match=r"vllm_server_base_url holds credentials.*FURA_ROLLOUT_TOKEN") as caught:
        parse_arguments(["--config", QUICKSTART, "--vllm_server_base_url", "http://me:hidden@host:8000"])
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("entry", ["fura_rl", "fura_rl.config", "fura_rl.serve"])
def test_telemetry_is_off_before_a_library_could_send_any_and_on_where_it_is_asked_for(entry):
    code = (
        f"import {entry}, os, json\nfrom huggingface_hub import constants\n"
        "print(json.dumps([dict(os.environ), constants.HF_HUB_DISABLE_TELEMETRY]))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in telemetry.OFF}

    def seen(**settings):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | settings, cwd=REPOSITORY)
        return json.loads(done.stdout)

    environment, off = seen()
    assert off
    assert {name: environment[name] for name in telemetry.OFF} == telemetry.OFF
    assert seen(VLLM_NO_USAGE_STATS="0")[0]["VLLM_NO_USAGE_STATS"] == "0"


def test_vllm_counts_no_usage(monkeypatch):
    from vllm.usage import usage_lib

    for name in telemetry.OFF:
        monkeypatch.delenv(name, raising=False)
    telemetry.turn_off()
    monkeypatch.setattr(usage_lib, "_USAGE_STATS_ENABLED", None)
    assert not usage_lib.is_usage_stats_enabled()


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights as pickle \(pytorch_model.bin\).*safetensors"):
        resolve_model(str(tmp_path))
    words = command("model", "127.0.0.1", 8000, [])
    assert words[words.index("--load-format") + 1] == "safetensors"


def test_a_checkpoints_own_code_runs_only_where_it_is_trusted(tmp_path):
    """Its config names a module beside it; loading must neither run it nor ask."""
    ran = tmp_path / "ran"
    settings = json.loads((Path(BASE_MODEL) / "config.json").read_text())
    settings |= {"model_type": "stranger", "auto_map": {"AutoConfig": "stranger.StrangerConfig"}}
    folder = Path(shutil.copytree(BASE_MODEL, tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "stranger.py").write_text(f"open({str(ran)!r}, 'w')\n")
    command = ["launch/grpo_math.py", "--config", QUICKSTART, "--model_name_or_path", str(folder), "--use_cpu", "true"]
    done = subprocess.run(
        [sys.executable, *command, "--output_dir", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=200, cwd=REPOSITORY, env=child_environment(), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert "trust_remote_code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not ran.exists()
    assert parse_arguments(["--config", QUICKSTART]).training.trust_remote_code is False


@pytest.mark.parametrize("reporter", ["wandb", "trackio", "tensorboard"])
def test_reporters_are_trls(reporter, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [reporter])
    assert parse_arguments(["--config", QUICKSTART, "--report_to", reporter]).training.report_to == [reporter]


def test_several_reporters_are_a_list_in_yaml(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(Path(QUICKSTART).read_text() + "\nreport_to: [tensorboard, tensorboard]\n")
    assert parse_arguments(["--config", str(config)]).training.report_to == ["tensorboard"] * 2


@pytest.mark.slow
def test_a_resumed_run_leaves_one_whole_folder(tmp_path):
    run = [
        *(sys.executable, "launch/grpo_math.py", "--eval_problems", "0", "--save_steps", "2", "--use_cpu", "true"),
        *("--per_device_train_batch_size", "16", "--log_completions", "true", "--output_dir", str(tmp_path)),
        *("--report_to", "tensorboard", "--hub_token", SECRET[::-1]),
    ]
    environment = child_environment(FURA_ROLLOUT_TOKEN=SECRET, HF_TOKEN=SECRET)
    for steps in (
        ["--max_steps", "3"],
        ["--max_steps", "4", "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")],
    ):
        done = subprocess.run(
            [*run, *steps], capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert SECRET not in done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(f"alarms/{name}" in line for name in ALARMS for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "train_runtime" in line] == [4]
    assert steps_of_tensorboard(tmp_path / "runs", "train/sync/version") == {1, 2, 3, 4}
    assert steps_of_tensorboard(tmp_path / "runs", "train/alarms/on") == {1, 2, 3, 4}
    tables = sorted((tmp_path / "completions").glob("*.parquet"))
    assert [path.stem for path in tables] == [f"completions_{step:05d}" for step in (1, 2, 3, 4)]
    table = pandas.read_parquet(tables[-1])
    assert len(table) == 16
    assert [set(pandas.read_parquet(path)["policy_version"]) for path in tables] == [{1}, {2}, {3}, {4}]
    assert {"step", "prompt", "completion", "math_reward", "advantage", "verdict"} <= set(table.columns)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files if path.parent == tmp_path}
    assert {"resolved_config.yaml", "environment.json", FILE, "reward_curve.png", "adapter_model.safetensors"} <= names
    secrets = (SECRET.encode(), SECRET[::-1].encode())
    assert not [path for path in files if any(secret in path.read_bytes() for secret in secrets)]


def steps_of_tensorboard(folder, tag):
    """The steps at which `tag` was written, over all event files; a resumed run has one of its own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = [EventAccumulator(str(file)).Reload() for file in folder.rglob("events.*")]
    return {event.step for events in found if tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
