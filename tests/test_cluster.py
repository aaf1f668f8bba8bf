"""The launchers of several processes: every accelerate config is one that accelerate takes, and what the batch script
for Slurm would start.  Slurm itself is not here: a recorder stands in for its two commands."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml"))
SCRIPT = REPOSITORY / "launch" / "slurm_grpo.sbatch"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_every_launcher_config_and_its_first_line_runs_it(path):
    config = load_config_from_file(str(path))
    raw = yaml.safe_load(path.read_text())
    assert config.num_processes == raw["num_processes"]
    assert str(config.distributed_type).endswith(raw["distributed_type"])
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# accelerate launch --config_file configs/accelerate/{path.name} ")
    assert "launch/grpo_math.py" in first


def test_every_kind_of_sharding_has_a_config():
    assert {"ddp", "fsdp2", "zero2", "zero3", "single_gpu", "cpu", "ddp_cpu"} == {path.stem for path in CONFIGS}
    stages = {path.stem: yaml.safe_load(path.read_text()).get("deepspeed_config", {}) for path in CONFIGS}
    assert (stages["zero2"]["zero_stage"], stages["zero3"]["zero_stage"]) == (2, 3)


@pytest.fixture
def submit(tmp_path):
    """Runs the batch script; gives its exit code, its srun calls (token and words of each), and its errors."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    calls.mkdir()
    recorder = (
        f'#!/bin/bash\nfile=$(mktemp -p {calls}); printf "%q " "$FURA_ROLLOUT_TOKEN" "$@" > '
        '"$file"\ncase "$*" in *serve_rollouts*) exec sleep 60;; esac\n'
        # the trainer is there until every server that it was told of has been recorded
        f'servers=$(grep -o http: <<< "$*" | wc -l); cd {calls}\n'
        "until [ $(grep -l serve_rollouts * | wc -l) -ge $servers ]; do sleep 0.1; done\n"
        # what a task of the trainer does, and what Slurm's own srun does with a SIGTERM
        '[[ -z $INTERRUPTED ]] && exit; trap "exit 137" TERM\nwhile [[ $1 != bash ]]; do shift; done\n'
        'SLURM_STEP_ID=7 "$@" & wait $!\n'
    )
    commands = {
        "srun": recorder,
        "accelerate": f"#!/bin/bash\ntouch {tmp_path}/up; until [ -e {tmp_path}/told ]; do sleep 0.1; done; exit 143\n",
        "scancel": f'#!/bin/bash\necho "$@" > {tmp_path}/told\n',
        "scontrol": f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol\n'
        '[[ $* == "show job"* ]] || { printf "%s\\n" n0 n1 n2 n3; exit; }\necho "$INTERRUPTED"\n'
        f"[[ $INTERRUPTED != *CANCELLED ]] || touch {tmp_path}/told\n",  # whose steps Slurm itself ends
    }
    for name, text in commands.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)

    def run(*options, **variables):
        environment = os.environ | {
            "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
            "SLURM_JOB_NODELIST": "n[0-3]", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "1", "ACTIVATE": "/dev/null",
            "OUTPUT_DIR": str(tmp_path / "out"), "MODEL": "org/model",
        }  # fmt: skip
        environment |= {"INTERRUPTED": ""} | variables
        job = subprocess.Popen(
            ["bash", str(SCRIPT), *options], env=environment, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        while environment["INTERRUPTED"] and not (tmp_path / "up").exists():
            time.sleep(0.1)
        if environment["INTERRUPTED"]:
            job.terminate()
        _, errors = job.communicate(timeout=60)
        return job.returncode, [shlex.split(path.read_text()) for path in calls.iterdir()], errors

    return run


def option(words, name):
    return (
        next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), None)
        or (words[words.index(name) + 1])
    )


def test_slurm_starts_servers_and_a_trainer_that_knows_them(submit):
    code, calls, errors = submit("--config", "mine.yaml", "--seed", "3", TENSOR_PARALLEL="4", TRAINER_NODES="3")
    assert code == 0, errors
    servers = sorted((c for c in calls if "launch/serve_rollouts.py" in c), key=lambda words: option(words, "--port"))
    [trainer] = [c for c in calls if "launch/grpo_math.py" in c]
    names = ("CUDA_VISIBLE_DEVICES", "--nodelist", "--port", "--model")
    assert [tuple(option(words, name) for name in names) for words in servers] == [
        ("0,1,2,3", "n3", "8000", "org/model"), ("4,5,6,7", "n3", "8001", "org/model"),
    ]  # fmt: skip
    assert all(option(s, "--tensor-parallel-size") == "4" for s in servers)
    assert (option(trainer, "--nodelist"), option(trainer, "--num_machines")) == ("n0,n1,n2", "3")
    assert option(trainer, "--num_processes") == "24"
    assert option(trainer, "--vllm_server_base_url") == "http://n3:8000,http://n3:8001"
    assert option(trainer, "--config") == "mine.yaml"
    assert "--resume_from_checkpoint" not in trainer
    assert option(trainer, "--output_dir").endswith("/out")
    [token] = {words[0] for words in calls}
    assert len(token) == 64
    assert not [word for words in calls for word in words[1:] if token in word], "a secret on a command line"


@pytest.mark.parametrize(("restarts", "last"), [("0", "another/checkpoint-3"), ("1", "latest")])
def test_a_requeued_job_goes_on_from_its_last_checkpoint(restarts, last, submit):
    named = ["--resume_from_checkpoint", "another/checkpoint-3"]
    code, calls, errors = submit("--config", "mine.yaml", *named, SLURM_RESTART_COUNT=restarts)
    assert code == 0, errors
    [trainer] = [c for c in calls if "launch/grpo_math.py" in c]
    assert trainer[len(trainer) - trainer[::-1].index(named[0])] == last, "of two, the last one counts"


def test_the_secret_can_be_given(submit):
    code, calls, errors = submit("--config", "mine.yaml", FURA_ROLLOUT_TOKEN="mine")
    assert code == 0, errors
    assert {words[0] for words in calls} == {"mine"}


def test_the_end_of_its_time_is_told_to_the_trainer_and_not_to_srun_and_the_job_goes_back_into_the_queue(
    submit, tmp_path
):
    code, calls, errors = submit("--config", "mine.yaml", INTERRUPTED="JobState=RUNNING")
    assert (tmp_path / "told").read_text().split() == ["--ctld", "--signal=TERM", "1.7"]
    assert code == 143, f"the trainer's own end, after its checkpoint: {errors}"
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 1"
    assert len(calls) == 3


def test_a_job_that_somebody_cancels_does_not_come_back(submit, tmp_path):
    code, _, errors = submit("--config", "mine.yaml", INTERRUPTED="JobState=CANCELLED")
    assert code == 143, errors
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "show job 1"


def test_slurm_reads_the_model_from_the_config(submit):
    code, calls, errors = submit("--config", "configs/qwen3-1.7b/fura.yaml", MODEL="")
    assert code == 0, errors
    assert {option(c, "--model") for c in calls if "launch/serve_rollouts.py" in c} == {"Qwen/Qwen3-1.7B"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"TRAINER_NODES": "4"}, "leaves no node for rollouts"), ({"TENSOR_PARALLEL": "3"}, "does not divide the 8 GPUs")],
)
def test_slurm_variables_that_do_not_fit_start_nothing(submit, variables, message):
    code, calls, errors = submit("--config", "mine.yaml", **variables)
    assert (code, calls) == (2, [])
    assert message in errors
