"""A trainer of two processes (gloo, DDP and FSDP2) with one real rollout server: the same bytes, the same engine."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from distributed_trainer import CASES, TOKENS, policy_of, served
from peft import get_peft_model_state_dict
from rollout_server import child_environment
from safetensors.torch import load_file

from fura_rl.sync.http_transport import HttpTransport
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.weight_sync import WeightSync

pytestmark = pytest.mark.slow

ACCELERATE = str(Path(sys.executable).parent / "accelerate")
LAUNCHERS = {"ddp": "configs/accelerate/ddp_cpu.yaml", "fsdp2": "configs/accelerate/fsdp2.yaml"}
DEEPSPEED = {kind: f"configs/accelerate/{kind}.yaml" for kind in ("zero2", "zero3")}
NATS = 1e-5


def launch(kind, *command, timeout=300):
    options = ["--config_file", (LAUNCHERS | DEEPSPEED)[kind], "--num_processes", "2"]
    done = subprocess.run(
        [ACCELERATE, "launch", *options, *map(str, command)],
        capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY, env=child_environment(OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


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
    assert max(result["gaps"]) < NATS
    unseen = {"full": [None], "fura-core": [None] * 3 if kind == "fsdp2" else []}.get(
        case, []
    )  # no base to compare with
    assert result["gains"] == [*unseen, *[pytest.approx(1.0, abs=0.01)] * (3 - len(unseen))]
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
    assert sync.sync().probe_max_gap < NATS
    try:
        return served(sync)
    finally:
        engine.close()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("full", "fura-core")])
def test_no_base_weight_is_gathered_for_a_sync(case, trained):
    assert all(trained("fsdp2")[case, process]["gathered"] == [] for process in (0, 1))


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_nan_in_one_process_stops_them_all_with_its_words(kind, trained):
    here, there = (trained(kind)["fura", process]["non-finite"] for process in (0, 1))
    words = "q_proj.weight are not finite"
    assert there.startswith("FloatingPointError")
    assert here.startswith("PeerFailedError: process 1 of the trainer failed: FloatingPointError")
    assert words in here
    assert words in there


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
    assert max(here["gaps"]) < NATS
    assert there["gaps"] == [None] * 3
    assert here["non-finite"].startswith("PeerFailedError: process 1 of the trainer failed: FloatingPointError")


@pytest.mark.parametrize("adapter", ["fura", "lora"])
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_grpo_trains_in_two_processes_on_one_server(kind, adapter, rollout_server, tmp_path):
    script = ["launch/grpo_math.py"] if kind == "ddp" else ["tests/fsdp2_on_cpu.py", "launch/grpo_math.py"]
    server = ["--vllm_mode", "server", "--vllm_server_base_url", rollout_server.url]
    launch(
        kind, *script, "--config", "configs/quickstart.yaml", "--model_name_or_path", rollout_server.model, *server,
        "--adapter", adapter, "--lora_dropout", 0, "--use_cpu", "true", "--max_steps", 3,
        "--reward_funcs", "distributed_trainer.even_letters", "--vllm_importance_sampling_correction", "true",
        "--save_steps", 3, "--eval_problems", 0, "--sync_probe_every", 1, "--output_dir", tmp_path,
        "--per_device_train_batch_size", 16,
    )  # fmt: skip
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "reward" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert all(entry["grad_norm"] > 0 for entry in steps), "it must learn something"
    assert all(entry["sync/probe_max_gap"] < NATS for entry in steps)
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-4 for entry in steps), "rollouts are the policy's"
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(policy_of(adapter, rollout_server.model))
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in expected.items()}, (
        "the checkpoint is whole"
    )
