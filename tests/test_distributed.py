"""A trainer of two processes (gloo, DDP and FSDP2) with one real rollout server: the same bytes, the same engine."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import PARITY_NATS, REPOSITORY, forget_cut_engines
from cut_engine import LEFT_BEHIND, METHODS
from distributed_trainer import CASES, TOKENS, policy_of, served
from peft import get_peft_model_state_dict
from rollout_server import RolloutServer, child_environment
from safetensors.torch import load_file
from test_resume import different, timeless

from fura_rl.sync.http_transport import HttpTransport
from fura_rl.sync.probe import max_gap
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.weight_sync import WeightSync

pytestmark = pytest.mark.slow

ACCELERATE = str(Path(sys.executable).parent / "accelerate")
LAUNCHERS = {"ddp": "configs/accelerate/ddp_cpu.yaml", "fsdp2": "configs/accelerate/fsdp2.yaml"}
DEEPSPEED = {kind: f"configs/accelerate/{kind}.yaml" for kind in ("zero2", "zero3")}


def launch_command(kind, *command):
    config = {**LAUNCHERS, **DEEPSPEED, "single": "configs/accelerate/cpu.yaml"}[kind]
    processes = "1" if kind == "single" else "2"
    return [ACCELERATE, "launch", "--config_file", config, "--num_processes", processes, *map(str, command)]


def launch(kind, *command):
    return run_launched(kind, *command).stdout


def run_launched(kind, *command, timeout=300):
    run = psutil.Popen(
        launch_command(kind, *command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env=child_environment(OMP_NUM_THREADS="1"),
    )  # fmt: skip
    try:
        stdout, stderr = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for process in [*run.children(recursive=True), run]:  # workers that wait for each other would outlive it
            process.kill()
        raise
    assert run.returncode == 0, stdout[-3000:] + stderr[-16000:]
    return subprocess.CompletedProcess(run.args, run.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def trained(rollout_server, tmp_path_factory):
    """Results of every case under one kind of sharding: (case, process) -> what distributed_trainer.py wrote."""
    ran = {}

    def get(kind):
        if kind not in ran:
            folder = tmp_path_factory.mktemp(kind)
            server = rollout_server
            launch(kind, "tests/distributed_trainer.py", ",".join(CASES), server.model, server.url, folder)
            ran[kind] = {
                (case, process): torch.load(folder / f"{case}-{process}.pt") for case in CASES for process in (0, 1)
            }
        return ran[kind]

    return get


@pytest.fixture
def one_thread():
    """As the launched processes have it: products of another number of threads may differ in their last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_sharded_trainer_brings_the_engine_where_a_single_process_does(
    kind, case, trained, rollout_server, one_thread
):
    result, other = (trained(kind)[case, process] for process in (0, 1))
    assert (result["kind"], result["processes"]) == ("FSDP" if kind == "fsdp2" else "MULTI_CPU", 2)
    assert (result["pieces"] > 20) == (kind == "fsdp2"), "the policy must really be sharded"
    assert max(result["gaps"]) < PARITY_NATS
    unseen = {"full": [None], "fura-core": [None] * 3 if kind == "fsdp2" else []}.get(
        case, []
    )  # no base to compare with
    assert result["gains"] == [*unseen, *[pytest.approx(1.0, abs=0.01)] * (3 - len(unseen))]
    assert other["gains"] == (result["gains"] if kind == "fsdp2" else [None] * 3)
    assert other["gaps"] == [None] * 3
    single = sync_in_one_process(case, result["trained"], rollout_server)
    assert single["payload"] == result["payload"], "the same bytes"
    assert torch.equal(single["logprobs"], result["logprobs"])
    assert single["replies"].keys() == result["replies"].keys()
    assert all(torch.equal(single["replies"][name], output) for name, output in result["replies"].items())


def sync_in_one_process(case, tensors, server):
    policy = policy_of(case, server.model)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained.keys() == tensors.keys()
    with torch.no_grad():
        moved = max(float((p - tensors[name]).abs().max()) for name, p in trained.items())
        for name, p in trained.items():
            p.copy_(tensors[name])
    assert moved > 0, "training must have changed something"
    engine = RemoteEngine(HttpTransport(server.url))
    sync = WeightSync(policy, engine, TOKENS, probe_every=1)
    assert sync.sync().probe_max_gap < PARITY_NATS
    try:
        return served(sync)
    finally:
        engine.close()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("full", "fura-core")])
def test_no_base_weight_is_gathered_for_a_sync(case, trained):
    assert all(trained("fsdp2")[case, process]["gathered"] == [] for process in (0, 1))


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_rows_that_do_not_arrive_stop_all_processes_also_where_one_alone_holds_them(kind, trained):
    failure = "StaleEngineError: weight sync failed its audit: 1 of"
    peers = failure if kind == "fsdp2" else f"PeerFailedError: process 0 of the trainer failed: {failure}"
    for process, start in enumerate((failure, peers)):
        words = trained(kind)["full", process]["stale"]
        assert words.startswith(start), words
        assert "model.layers.0.self_attn.q_proj.weight (gain" in words


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_nan_in_one_process_stops_them_all_with_its_words(kind, trained):
    here, there = (trained(kind)["fura", process]["non-finite"] for process in (0, 1))
    words = "q_proj.weight are not finite"
    assert there.startswith("FloatingPointError")
    assert here.startswith("PeerFailedError: process 1 of the trainer failed: FloatingPointError")
    assert words in here
    assert words in there


def test_two_servers_follow_a_sharded_trainer_that_gathers_once(rollout_server, tmp_path):
    """Who sends reads the policy once for both: the other process, which gathers along once, would leave it waiting."""
    second = RolloutServer(rollout_server.model, tmp_path / "server.log").start()
    try:
        urls = f"{rollout_server.url},{second.wait_until_up().url}"
        command = ["tests/distributed_trainer.py", "fura,full", rollout_server.model, urls, tmp_path]
        run_launched("fsdp2", *command)
    finally:
        second.stop()
    for case in ("fura", "full"):
        here, there = (torch.load(tmp_path / f"{case}-{process}.pt") for process in (0, 1))
        assert max(here["gaps"]) < PARITY_NATS, "the first server"
        assert max_gap(*here["logprobs"]) < PARITY_NATS, "and the second"
        assert [(status["version"], status["poisoned"]) for status in here["status"]] == [(3, None)] * 2
        assert here["gains"] == there["gains"]
        assert here["gains"][-1] == pytest.approx(1.0, abs=0.01)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize(
    ("kind", "case"), [("zero2", "fura"), ("zero2", "lora"), ("zero2", "full"), ("zero3", "lora"), ("zero3", "full")]
)
def test_a_trainer_under_deepspeed_brings_the_engine_along(kind, case, rollout_server, tmp_path):
    """One case a launch: DeepSpeed holds one engine a process."""
    launch(kind, "tests/distributed_trainer.py", case, rollout_server.model, rollout_server.url, tmp_path)
    here, there = (torch.load(tmp_path / f"{case}-{process}.pt") for process in (0, 1))
    assert (here["kind"], here["processes"]) == ("DEEPSPEED", 2)
    assert (here["pieces"] > 20) == (kind == "zero3"), "the policy must really be sharded"
    assert max(here["gaps"]) < PARITY_NATS
    assert there["gaps"] == [None] * 3
    assert here["non-finite"].startswith("PeerFailedError: process 1 of the trainer failed: FloatingPointError")


STEPS = 4


def grpo_command(kind, adapter, server, folder):
    """A GRPO run of the same 32 rollouts a step in one process or two, every step of it saved."""
    script = ["launch/grpo_math.py"] if kind != "fsdp2" else ["tests/fsdp2_on_cpu.py", "launch/grpo_math.py"]
    return [
        *script, "--config", "configs/quickstart.yaml", "--model_name_or_path", server.model, "--adapter", adapter,
        "--vllm_mode", "server", "--vllm_server_base_url", server.url, "--vllm_server_seeded", "true",
        "--lora_dropout", 0, "--use_cpu", "true", "--max_steps", STEPS, "--eval_problems", 0, "--output_dir", folder,
        "--reward_funcs", "distributed_trainer.even_letters", "--save_steps", 1, "--sync_probe_every", 1,
        "--sync_audit_every", 1, "--per_device_train_batch_size", 32 if kind == "single" else 16,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def grpo_run(rollout_server, tmp_path_factory):
    """The folder of an uninterrupted GRPO run."""
    ran = {}

    def get(kind, adapter):
        if (kind, adapter) not in ran:
            folder = tmp_path_factory.mktemp(f"{kind}-{adapter}") / "run"
            launch(kind, *grpo_command(kind, adapter, rollout_server, folder))
            ran[kind, adapter] = folder
        return ran[kind, adapter]

    return get


def training_lines(folder):
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "reward" in entry]


@pytest.mark.parametrize(("kind", "adapter"), [("ddp", "fura"), ("fsdp2", "fura"), ("fsdp2", "lora")])
def test_grpo_trains_in_two_processes_on_one_server(kind, adapter, grpo_run, rollout_server):
    folder = grpo_run(kind, adapter)
    steps = training_lines(folder)
    assert [entry["step"] for entry in steps] == [*range(1, STEPS + 1)]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward" in line] == [*range(1, STEPS + 1)], "by one process alone"
    assert all(entry["grad_norm"] > 0 for entry in steps), "it must learn something"
    assert all(entry["sync/probe_max_gap"] < PARITY_NATS for entry in steps), "the server must serve what is trained"
    saved = load_file(folder / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(policy_of(adapter, rollout_server.model))
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in expected.items()}, (
        "the checkpoint is whole"
    )


def test_an_engine_that_two_processes_cut_up_follows_and_is_proven_part_by_part(tied_checkpoint, tmp_path):
    forget_cut_engines()
    launch("ddp", "tests/cut_engine.py", tied_checkpoint, tmp_path)
    seen = [json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1)]
    for method in METHODS:
        assert [part[method] for part in seen] == [pytest.approx(1.0, abs=0.01)] * 2, method
    failure = f"StaleEngineError: weight sync failed its audit: 1 of 14 modules .*{re.escape(LEFT_BEHIND)}"
    assert re.match(failure, seen[1]["left behind"])
    assert re.match(f"PeerFailedError: process 1 of the trainer failed: {failure}", seen[0]["left behind"])


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_two_processes_reach_what_one_reaches(kind, grpo_run):
    """The same global batch, so the same rollouts, losses and weights, to float32 rounding."""
    single, sharded = (grpo_run(which, "fura") for which in ("single", kind))
    for one, two in zip(training_lines(single), training_lines(sharded), strict=True):
        for name in ("reward", "completions/mean_length", "entropy"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), (name, one["step"])
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    before, one, two = (
        load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")
        for folder, step in ((single, STEPS - 1), (single, STEPS), (sharded, STEPS))
    )
    for name in (name for name in one if "delta" in name):
        last_step = (one[name] - before[name]).norm()
        assert last_step > 0
        assert (one[name] - two[name]).norm() < 1e-3 * last_step, name


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_killed_run_of_two_processes_goes_on_to_the_same_bits(kind, grpo_run, rollout_server, tmp_path):
    """SIGKILL to all of its processes, the same command again."""
    folder = tmp_path / "run"
    command = launch_command(kind, *grpo_command(kind, "fura", rollout_server, folder))
    log, environment = tmp_path / "log.txt", child_environment(OMP_NUM_THREADS="1")
    with open(log, "w") as file:
        run = psutil.Popen(command, stdout=file, stderr=file, cwd=REPOSITORY, env=environment)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint-2").exists():
        assert run.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = [*run.children(recursive=True), run]  # torch gives each of its workers a process group of its own
    for process in family:
        process.kill()
    assert len(psutil.wait_procs(family, 30)[0]) > 2
    assert not (folder / f"checkpoint-{STEPS}").exists()
    launch(kind, *grpo_command(kind, "fura", rollout_server, folder))
    assert different(outcome(grpo_run(kind, "fura")), outcome(folder)) == []


def test_under_torchrun_one_process_that_is_told_to_end_ends_them_all_with_a_checkpoint(rollout_server, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    options = ["--max_steps", 500, "--save_steps", 500, "--sync_probe_every", 10]
    command = [*map(str, [*torchrun, *grpo_command("ddp", "fura", rollout_server, folder), *options])]
    with open(log, "w") as file:
        run = psutil.Popen(
            command, stdout=file, stderr=file, cwd=REPOSITORY, env=child_environment(OMP_NUM_THREADS="1")
        )
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").is_file() or len((folder / "metrics.jsonl").read_text().splitlines()) < 2:
        assert run.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)
    second = [worker for worker in run.children() if worker.environ().get("RANK") == "1"]
    second[0].terminate()
    assert run.wait(120) != 0
    [checkpoint] = folder.glob("checkpoint-*")
    text = log.read_text()
    assert f"the same command goes on from {checkpoint}" in text, text[-4000:]
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600" in text
    assert {"grpo_state_0.pt", "grpo_state_1.pt"} <= {path.name for path in checkpoint.iterdir()}


def outcome(folder):
    """What must be the same in every bit; the optimizer's file has a name of its own under FSDP."""
    last = folder / f"checkpoint-{STEPS}"
    [optimizer] = last.glob("optimizer*")
    return {
        "policy": load_file(last / "adapter_model.safetensors"),
        "optimizer": torch.load(optimizer, weights_only=True),
        "scheduler": torch.load(last / "scheduler.pt", weights_only=True),
        "history": [timeless(entry) for entry in training_lines(folder)],
    }
