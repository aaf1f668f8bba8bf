"""Faults of the machine, each brought about for real: a port that is taken, a wrong token, no memory left."""

import asyncio
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
import torch
import uvicorn
from conftest import REPOSITORY, make_tiny_checkpoint
from rollout_server import child_environment

from fura_rl import serve
from fura_rl.memory import MENDS, OutOfMemory, out_of_memory_in
from fura_rl.serve import RequireToken, check, command, environment
from fura_rl.sync.http_transport import HttpTransport
from fura_rl.sync.remote_engine import Heartbeat
from fura_rl.sync.transport import RemoteSyncError


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


DEAF_SERVER = """
import sys
from fura_rl import serve
deaf = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork(); print(); time.sleep(600)"
serve.command = lambda *_: [sys.executable, "-uc", deaf]
serve.STOP_SECONDS = 0.5
sys.exit(serve.serve("model", "127.0.0.1", serve.free_port(), [], 0))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_server_that_does_not_end_when_told_is_killed_with_its_engine(number, code):
    launcher = subprocess.Popen([sys.executable, "-c", DEAF_SERVER], stdout=subprocess.PIPE, env=child_environment())
    assert launcher.stdout.readline()
    assert launcher.stdout.readline()
    family = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == code
    left = psutil.wait_procs(family, timeout=20)[1]
    for process in left:
        process.kill()
    assert not left


SHORT_LIVED_SERVER = """
import sys
from fura_rl import serve
listen = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(1); exit(3)"
serve.command = lambda model, host, port, extra: [sys.executable, "-c", *extra, str(port)]
sys.exit(serve.serve("model", "127.0.0.1", serve.free_port(), [listen if sys.argv[1] == "serves" else "exit(3)"], 2))
"""


@pytest.mark.parametrize(("what", "restarts"), [("serves", 2), ("fails to start", 0)])
def test_a_server_is_started_again_if_it_ever_served_however_short_it_lived(what, restarts):
    words = [sys.executable, "-c", SHORT_LIVED_SERVER, what]
    done = subprocess.run(words, capture_output=True, text=True, env=child_environment(), timeout=120)
    assert done.returncode == 3
    assert done.stdout.count("the rollout server died with code 3; starting it again") == restarts, done.stdout


def test_a_server_keeps_few_compiled_products_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    assert environment([])["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    assert environment([])["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "1024"


@pytest.mark.parametrize(
    ("options", "exact"),
    [(["--dtype", "float32"], True), (["--dtype=float"], True), (["--dtype", "bfloat16"], False), ([], False)],
)
def test_a_server_of_float32_computes_in_float32_on_a_gpu_too(options, exact, monkeypatch):
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    assert environment(["--port", "1", *options]).get("TRITON_F32_DEFAULT") == ("ieee" if exact else None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is shared out by vLLM")
def test_a_cpu_server_does_not_want_the_machines_memory_for_itself():
    assert "--kv-cache-memory-bytes" in command("model", "127.0.0.1", 8000, [])
    for own in (["--gpu-memory-utilization", "0.5"], ["--kv_cache_memory_bytes=5000000"]):
        assert "--kv-cache-memory-bytes" not in command("model", "127.0.0.1", 8000, own)


def test_a_port_that_is_taken_ends_the_server_before_it_loads_a_model(taken):
    done = subprocess.run(
        [sys.executable, "launch/serve_rollouts.py", "--port", str(taken)],
        capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=child_environment(),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: port={taken} on host='127.0.0.1' cannot be listened on")
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_port_that_was_just_given_back_may_be_used(taken):
    with pytest.raises(ValueError, match="choose another --port"):
        check("127.0.0.1", taken)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    check("127.0.0.1", port)
    with pytest.raises(ValueError, match="cannot be listened on"):
        check("127.0.0.1", 70000)


def test_a_server_is_open_to_other_machines_only_with_a_token(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv("FURA_ROLLOUT_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"host='0\.0\.0\.0' lets other machines in.*FURA_ROLLOUT_TOKEN"):
        check("0.0.0.0", port)
    monkeypatch.setenv("FURA_ROLLOUT_TOKEN", "right")
    check("0.0.0.0", port)


async def behind_the_guard(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    page = scope["path"].startswith("/page")
    await send({"type": "http.response.body", "body": b"<html>" if page else b'{"reached": true}'})


@pytest.fixture
def guarded(monkeypatch):
    """The address of a server whose token is "right"."""
    monkeypatch.setenv("FURA_ROLLOUT_TOKEN", "right")
    server = uvicorn.Server(uvicorn.Config(RequireToken(behind_the_guard), port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


class PausedServer:
    """The routes of vLLM's server that a watch over its pauses asks; notes what is posted beside the question."""

    def __init__(self, paused, workers):
        self.paused, self.workers, self.done, self.looks = paused, workers, [], 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while self.looks < 3:  # a server's life: at the third look, what the first has found is done
                await asyncio.sleep(0.005)
            return
        assert dict(scope["headers"])[b"authorization"] == b"Bearer right"
        body = json.loads((await receive())["body"] or "{}")
        route = body.get("method", scope["path"])
        if route not in ("fura_status", "/is_paused"):
            self.done.append(route)
        self.looks += route == "/is_paused"
        self.paused &= route != "/resume"
        reply = {"is_paused": self.paused, "results": self.workers, "success": True}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(reply).encode()})


def of_worker(version, lease_ended):
    return {"owner": "killed", "version": version, "lease_ended": lease_ended}


RESUMED = ["/reset_prefix_cache", "/resume"]


@pytest.mark.parametrize(
    ("paused", "workers", "done"),
    [
        (True, [of_worker(3, True)], RESUMED),
        (True, [of_worker(3, True), of_worker(3, True)], RESUMED),
        (True, [of_worker(3, True), of_worker(2, True)], ["fura_poison", *RESUMED]),
        (True, [of_worker(3, True), of_worker(3, False)], []),
        (False, [of_worker(3, True)], []),
    ],
    ids=["lost", "lost by two workers", "lost in the commit of one of two", "owned", "running"],
)
def test_a_server_that_is_paused_goes_on_once_its_trainers_lease_has_ended(monkeypatch, paused, workers, done):
    monkeypatch.setenv("FURA_ROLLOUT_TOKEN", "right")
    monkeypatch.setattr(serve, "PAUSE_CHECK_SECONDS", 0.01)
    server = PausedServer(paused, workers)
    life = serve.ResumeForLostTrainer(server)({"type": "lifespan", "app": server}, None, None)
    asyncio.run(asyncio.wait_for(life, 30))
    assert server.done == done


@pytest.mark.parametrize("token", ["wrong", None, "right "])
def test_a_wrong_token_is_refused_by_name_and_is_not_shown(token, guarded, monkeypatch):
    assert HttpTransport(guarded).request("POST", "/collective_rpc") == {"reached": True}
    monkeypatch.delenv("FURA_ROLLOUT_TOKEN")
    if token:
        monkeypatch.setenv("FURA_ROLLOUT_TOKEN", token)
    stranger = HttpTransport(guarded)
    for path in ("/collective_rpc", "/pause", "/v1/completions"):
        with pytest.raises(RemoteSyncError, match="wants another token; set FURA_ROLLOUT_TOKEN") as caught:
            stranger.request("POST", path)
        assert "right" not in str(caught.value)
        assert "wrong" not in str(caught.value)
    assert stranger.request("GET", "/health") == {"reached": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("right", r"error: http://127\.0\.0\.1:1 was not up within 2 s"),
        ("wrong", r"error: .*wants another token; set FURA_"),
    ],
)
def test_a_run_without_its_server_ends_with_one_message(token, message, guarded, tmp_path):
    address = "http://127.0.0.1:1" if token == "right" else guarded
    run = subprocess.run(
        [
            sys.executable, "launch/grpo_math.py", "--vllm_mode", "server", "--vllm_server_base_url", address,
            "--vllm_server_timeout", "2", "--output_dir", str(tmp_path),
        ],
        capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=child_environment(FURA_ROLLOUT_TOKEN=token),
    )  # fmt: skip
    assert run.returncode == 2
    assert re.search(message, run.stderr), run.stderr[-3000:]
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("place", ["", "/page"])
def test_a_lease_goes_on_being_renewed_after_an_answer_that_is_not_vllms(place, guarded):
    transport = HttpTransport(guarded + place)
    with pytest.raises(RemoteSyncError, match=r"answers, but not as vLLM does.*(reached|<html>)"):
        transport.call("fura_status")
    renewals = []

    def renew():
        renewals.append(1)
        transport.call("fura_renew")

    heartbeat = Heartbeat(renew, 0.01)
    deadline = time.monotonic() + 20
    while len(renewals) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    heartbeat.stop()
    assert len(renewals) >= 3


@pytest.mark.parametrize("phase", MENDS)
def test_an_allocation_that_fails_names_the_phase_and_the_mend(phase):
    with pytest.raises(OutOfMemory) as caught, out_of_memory_in(phase):
        torch.empty(2**50)
    assert str(caught.value).startswith(f"out of memory in the {phase}: {MENDS[phase]}. The allocator says: ")
    assert "\n" not in str(caught.value)


def test_the_innermost_phase_is_named_and_other_errors_pass():
    outer, inner = out_of_memory_in("training step"), out_of_memory_in("rollouts")
    with pytest.raises(OutOfMemory, match="in the rollouts"), outer, inner:
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="other"), out_of_memory_in("rollouts"):
        raise RuntimeError("other")
    with pytest.raises(OutOfMemory), out_of_memory_in("rollouts"):
        raise MemoryError


@contextmanager
def no_more_memory(spare_bytes):
    """The kernel gives this process `spare_bytes` more address space and then none."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + spare_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def starved_run(folder):
    """Run in a process of its own: a trainer whose policy has large layers, left without memory in two phases."""
    from datasets import Dataset

    from fura_rl import FuraConfig, FuraGRPOTrainer
    from fura_rl.grpo_config import FuraGRPOConfig

    rows = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(8)]
    trainer = FuraGRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [float(len(text) % 2) for text in completions],
        args=FuraGRPOConfig(
            output_dir=f"{folder}-out", num_generations=4, per_device_train_batch_size=8, use_cpu=True, bf16=False,
            use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.05, vllm_max_model_length=128,
            max_completion_length=64, report_to="none", max_steps=1,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=FuraConfig(target_modules=["up_proj"], block_size=64),
    )  # fmt: skip
    trainer.train()
    spare = 8 * 2**20

    def attempt(action):
        try:
            action()
            print("no error", flush=True)
        except OutOfMemory as error:
            print(error, flush=True)

    trainer.sync_weights()
    with no_more_memory(spare):
        attempt(lambda: trainer.vllm_generation.generate([list(range(5, 60))] * 8, None, 4))
    with no_more_memory(spare):
        attempt(trainer.sync_weights)


@pytest.mark.slow
def test_memory_that_runs_out_in_a_generation_and_in_a_fold(tmp_path):
    """Layers of 2^18 x 64 weights take 64 MB, which the kernel refuses at a limit that the test sets."""
    folder = make_tiny_checkpoint(tmp_path / "wide", tied=True, num_hidden_layers=1, intermediate_size=2**18)
    code = f"from test_faults import starved_run; starved_run({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=300, cwd=REPOSITORY,
        env=child_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    messages = [line for line in done.stdout.splitlines() if line.startswith(("out of memory", "no error"))]
    assert [message.partition(":")[0] for message in messages] == [
        "out of memory in the rollouts", "out of memory in the weight sync",
    ]  # fmt: skip
