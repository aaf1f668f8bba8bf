"""Settings: YAML and command line as in TRL, the shipped files, the help, and what importing costs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from fura_rl.config import HELP_GROUPS, help_text, parse_arguments

CONFIGS = sorted(path for pattern in ("*.yaml", "q*/*.yaml") for path in (REPOSITORY / "configs").glob(pattern))
QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")
CPU = ["--use_cpu", "true", "--bf16", "false"]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    ).stdout.strip()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name + "/" + path.stem)
def test_every_shipped_config_says_what_the_run_gets(path):
    settings = yaml.safe_load(path.read_text())
    resolved = parse_arguments(["--config", str(path), *CPU]).resolved()
    for name, value in settings.items():
        actual = resolved[name]
        if name == "report_to" and value == "none":
            value = []  # transformers' reading of it
        elif name == "bf16":
            value = False  # by the command line above
        assert getattr(actual, "value", actual) == value, name


def test_evaluation_during_training_asks_nothing_of_the_group_size():
    """TRL wants evaluation batches of whole groups; held-out problems are scored otherwise."""
    options = ["--eval_strategy", "steps", "--num_generations", "16", *CPU]
    assert parse_arguments(options, default_config=QUICKSTART).training.num_generations == 16
    told = parse_arguments([*options, "--num_generations_eval", "4"], default_config=QUICKSTART).training
    assert told.num_generations_eval == 4


@pytest.mark.parametrize("name", ["fura", "svd", "lora", "full"])
def test_the_paper_recipe(name):
    """METHOD: 50 steps of 32 prompts x 8 rollouts, 1024 new tokens, no KL, no division by the deviation."""
    path = REPOSITORY / "configs" / "qwen3-1.7b" / f"{name}.yaml"
    run = parse_arguments(["--config", str(path), *CPU])
    args = run.training
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32 * 8
    assert (args.num_generations, args.max_steps, args.max_completion_length) == (8, 50, 1024)
    assert (args.beta, args.scale_rewards, args.weight_decay) == (0.0, "none", 0.0)
    assert args.learning_rate == pytest.approx(1e-5 if name == "full" else 9e-5)
    assert run.script.adapter == name


def test_the_command_line_wins_over_yaml():
    run = parse_arguments(["--config", QUICKSTART, "--learning_rate", "0.5", "--adapter=lora", *CPU])
    assert run.training.learning_rate == 0.5
    assert run.script.adapter == "lora"
    assert run.training.max_steps == yaml.safe_load(Path(QUICKSTART).read_text())["max_steps"]


def test_the_quickstart_is_read_when_no_model_is_named():
    assert parse_arguments([], default_config=QUICKSTART).model.model_name_or_path == "quickstart"
    named = parse_arguments(["--model_name_or_path", "org/model", *CPU], default_config=QUICKSTART)
    assert named.training.max_steps == -1


def test_lists_booleans_and_json():
    run = parse_arguments(
        [
            *("--config", QUICKSTART, "--adapter_target_modules", "q_proj", "v_proj", "--log_completions", "true"),
            *("--adapter_kwargs", '{"block_size": 32}', "--vllm_enable_sleep_mode", "false"),
        ]
    )
    assert run.script.adapter_target_modules == ["q_proj", "v_proj"]
    assert run.script.adapter_kwargs == {"block_size": 32}
    assert run.training.log_completions is True
    assert run.training.vllm_enable_sleep_mode is False


@pytest.mark.parametrize(
    ("line", "options", "expected"),
    [
        ("", [], None),
        ("sync_audit_every: null\n", [], None),
        ("sync_audit_every: 4\n", [], 4),
        ("sync_audit_every: null\n", ["--sync_audit_every", "0"], 0),
    ],
)
def test_audits_are_automatic_or_every_so_many_syncs(line, options, expected, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(Path(QUICKSTART).read_text() + line)
    assert parse_arguments(["--config", str(file), *options, *CPU]).training.sync_audit_every == expected


def test_help_is_short_and_complete():
    text = help_text("What it does.")
    for names in HELP_GROUPS.values():
        for name in names:
            assert f"--{name} " in text
    assert max(len(line) for line in text.splitlines()) < 180
    assert len(text.splitlines()) < 75


def test_help_brings_neither_vllm_nor_datasets():
    code = (
        "import runpy, sys; sys.argv = ['grpo_math.py', '--help']\n"
        "try: runpy.run_path('launch/grpo_math.py', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "print([m for m in ('vllm', 'datasets') if m in sys.modules])"
    )
    out = python(code)
    assert out.endswith("[]")
    assert "Rollout engine and sync:" in out


@pytest.mark.parametrize(
    ("module", "foreign"),
    [
        ("fura_rl", ("trl", "vllm", "datasets")),
        ("fura_rl.sync.fold", ("trl", "vllm", "datasets")),
        ("fura_rl.evaluation.estimators", ("trl", "vllm", "datasets")),
        ("fura_rl.quickstart.problems", ("vllm", "datasets", "trl")),
    ],
)
def test_import_borders(module, foreign):
    assert python(f"import sys, {module}; print([m for m in {foreign!r} if m in sys.modules])") == "[]"


def test_version_and_public_names():
    import fura_rl

    assert set(fura_rl.__all__) == {"FuraConfig", "FuraGRPOTrainer", "FuraModel"}
    assert all(hasattr(fura_rl, name) for name in fura_rl.__all__)


def main() -> None:
    """Prints the cost of `import fura_rl` beside that of `import peft`: medians of 5 interleaved cold processes."""
    seconds: dict[str, list[float]] = {"peft": [], "fura_rl": []}
    for _ in range(5):
        for module, values in seconds.items():
            started = time.perf_counter()
            python(f"import {module}")
            values.append(time.perf_counter() - started)
    medians = {module: sorted(values)[2] for module, values in seconds.items()}
    print({**medians, "difference": medians["fura_rl"] - medians["peft"]})


if __name__ == "__main__":
    main()
