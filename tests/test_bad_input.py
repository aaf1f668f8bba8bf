"""Bad input ends before an engine starts, with one clear message and a non-zero exit code, through the real script."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from trl import GRPOConfig

from fura_rl import FuraConfig
from fura_rl.adapters.registry import find_method, peft_config_for
from fura_rl.config import parse_arguments, resolve_model
from fura_rl.trainer import check_settings

SCRIPT = REPOSITORY / "launch" / "grpo_math.py"
QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")


def launch(*options, timeout=240):
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY)


def refused(done, *, code=2):
    """The one line of the error, after checking that no engine and no traceback came before it."""
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "EngineCore" not in done.stderr + done.stdout
    assert "Initializing a V1 LLM engine" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-2000:]
    return errors[0]


def test_a_missing_model_path(tmp_path):
    error = refused(launch("--config", QUICKSTART, "--model_name_or_path", "/no/such/model"))
    assert "model_name_or_path='/no/such/model' does not exist" in error


def test_a_misspelt_yaml_key(tmp_path):
    config = tmp_path / "mine.yaml"
    settings = yaml.safe_load(Path(QUICKSTART).read_text())
    settings["lerning_rate"] = settings.pop("learning_rate")
    config.write_text(yaml.safe_dump(settings))
    error = refused(launch("--config", config))
    assert f"unknown setting 'lerning_rate' in {config} (did you mean 'learning_rate'?)" in error


def test_a_dataset_without_a_gold_column(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "1+1?"}\n')
    error = refused(launch("--config", QUICKSTART, "--dataset_name", rows, "--eval_problems", 0))
    assert "none of the columns answer, solution" in error
    assert "answer_column" in error


def test_a_block_size_that_does_not_divide(tmp_path):
    error = refused(launch("--config", QUICKSTART, "--adapter_kwargs", '{"block_size": 48}', "--output_dir", tmp_path))
    assert "block_size=48 does not divide in_features=128" in error
    assert "use one of 16, 32, 64" in error


def test_target_modules_that_match_nothing(tmp_path):
    error = refused(
        launch("--config", QUICKSTART, "--adapter_target_modules", "query_key_value", "--output_dir", tmp_path)
    )
    assert "query_key_value" in error
    assert "not found" in error


def test_a_batch_that_does_not_divide_into_groups(tmp_path):
    error = refused(launch("--config", QUICKSTART, "--num_generations", 7))
    assert "7" in error
    assert "divisible" in error


def test_an_unknown_adapter():
    error = refused(launch("--config", QUICKSTART, "--adapter", "furra"))
    assert "adapter='furra' is not one of fura, svd, qfura, lora, " in error
    assert "did you mean 'fura'?" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lerning_rate", "1"], r"'lerning_rate' in the command line \(did you mean 'learning_rate'\?\)"),
        (["--config", "/no.yaml"], r"--config '/no.yaml' is not a file"),
        (["--adapter_kwargs", "{block_size: 4}"], r"adapter_kwargs='\{block_size: 4\}' is not JSON"),
        (["--eval_problems", "-1"], r"eval_problems=-1 must be at least 0"),
        (["--eval_samples", "0"], r"eval_samples=0 must be at least 1"),
    ],
)
def test_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(options, default_config=QUICKSTART)


@pytest.mark.parametrize(
    ("name", "message"),
    [(None, "is not set"), ("./nowhere", "does not exist"), ("nowhere", "does not exist"), (REPOSITORY, "config.json")],
)
def test_model_names_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_model(str(name) if name else None)


def test_settings_that_an_adapter_does_not_have():
    arguments = parse_arguments([], default_config=QUICKSTART)
    with pytest.raises(ValueError, match=r"FuraConfig has no setting 'blocksize' \(did you mean 'block_size'\?\)"):
        peft_config_for("fura", arguments.model, None, {"blocksize": 4})
    with pytest.raises(ValueError, match="adapter='full' takes no adapter_kwargs"):
        peft_config_for("full", arguments.model, None, {"r": 4})
    with pytest.raises(ValueError, match="did you mean 'lora'"):
        find_method("lorra")


@pytest.mark.parametrize(
    ("environment", "mode", "message"),
    [
        ({}, "colocate", r"FSDP shards the policy.*vllm_mode='server'"),
        ({"FSDP_VERSION": "1"}, "server", r"fsdp_version=1 flattens parameters.*use 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "server", r"fsdp_cpu_ram_efficient_loading=true.*set it to false"),
        ({}, "server", None),
    ],
)
def test_sharding_that_the_sync_cannot_read_is_refused(environment, mode, message, monkeypatch, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, use_vllm=True, vllm_mode=mode)
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_settings(args, FuraConfig())
