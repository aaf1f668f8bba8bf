"""Fault drill on a real rollout server: killed, hung, exchanged, poisoned, it recovers or says clearly what is wrong.

One server for all; tests that kill it wait for its supervisor to start it again.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
import torch
from conftest import PARITY_NATS, REPOSITORY, make_tiny_checkpoint, perturb_trained
from distributed_trainer import TOKENS, policy_of
from peft import get_peft_model
from rollout_server import child_environment
from slow_network import slow_network
from test_weight_sync import check_that_a_sync_drops_the_cache
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import ModelConfig
from vllm import SamplingParams

from fura_rl.adapters.registry import peft_config_for
from fura_rl.rollout_client import RolloutClient, ServerSampler
from fura_rl.sync import probe
from fura_rl.sync.engine import Update
from fura_rl.sync.factors import Factors
from fura_rl.sync.http_transport import HttpTransport
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.transport import EngineLostError, OwnedByAnotherError, RemoteSyncError
from fura_rl.sync.weight_sync import WeightSync

pytestmark = pytest.mark.slow

RECOVERY_SECONDS = 30
PROMPTS = [TOKENS[:n] for n in (8, 12, 16, 20)]
SAMPLING = {"n": 4, "max_tokens": 200, "temperature": 1.0, "logprobs": 0}


@pytest.fixture
def trainer(rollout_server):
    """A synced trainer: policy, sync, client."""
    client = RolloutClient(rollout_server.wait_until_up().url, connection_timeout=240.0)
    policy = policy_of("fura", rollout_server.model)
    sync = WeightSync(policy, client.engine, TOKENS, probe_every=1)
    sync.sync()
    yield policy, sync, client
    rollout_server.wait_until_up()
    client.close()


def sampled_from(policy, output, prompts, n):
    """The largest gap between the sampler's log-probs and the policy's, over every sampled token."""
    gaps = []
    for i, (completion, logprobs) in enumerate(zip(output["completion_ids"], output["logprobs"], strict=True)):
        prompt = prompts[i // n]
        scored = probe.trainer_logprobs(policy, [*prompt, *completion])[len(prompt) - 1 :]
        gaps.append(probe.max_gap(torch.tensor([entry[0] for entry in logprobs]), scored))
    return max(gaps)


def in_background(function):
    """(thread, its results): one entry of what `function` returned or raised, and when."""
    done = []

    def run():
        try:
            done.append((function(), time.monotonic()))
        except Exception as error:
            done.append((error, time.monotonic()))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, done


def test_a_server_killed_while_it_generates_gives_a_whole_batch_of_one_version(trainer, rollout_server):
    policy, sync, client = trainer
    perturb_trained(policy, 0.2, seed=1)
    sync.sync()
    many = SAMPLING | {"n": 64}  # seconds of work: the server's own metrics, which say that it generates, lag behind
    thread, done = in_background(lambda: client.generate(PROMPTS, **many))
    while not requests_are_running(rollout_server):
        assert thread.is_alive(), "the server must be killed while it generates"
    family = rollout_server.processes()
    rollout_server.api_server().kill()  # its engine is an orphan for a moment
    rollout_server.wait_until_up()
    up = time.monotonic()
    thread.join(240)
    output, finished = done[0]
    assert not isinstance(output, Exception), output
    assert finished - up < RECOVERY_SECONDS
    assert client.resampled_batches >= 1
    assert len(output["completion_ids"]) == len(PROMPTS) * many["n"]
    assert sampled_from(policy, output, PROMPTS, many["n"]) < PARITY_NATS, "all of it from the synced policy"
    assert not [process for process in family if process.is_running()], "an orphan is left"


def test_seeded_rollouts_do_not_depend_on_what_the_server_has_drawn_before(trainer):
    _, _, client = trainer

    def rollouts(seed):
        with client.drawing_from(seed):
            return client.generate([PROMPTS[0]] * 2, **SAMPLING)["completion_ids"]

    first = rollouts(7)
    client.generate(PROMPTS, **SAMPLING)
    assert rollouts(7) == first != rollouts(8)
    assert len({tuple(completion) for completion in first}) == 8, "each completion of each prompt has draws of its own"


def test_held_out_problems_are_scored_on_the_synced_version_after_a_restart_too(trainer, rollout_server):
    policy, sync, client = trainer
    perturb_trained(policy, 0.5, seed=3)
    sync.sync()
    sampler = ServerSampler(client)
    problems = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    greedy = SamplingParams(temperature=0.0, max_tokens=30)

    def scored():
        return [prompt.outputs[0].token_ids for prompt in sampler.generate(problems, greedy)]

    before = scored()
    rollout_server.kill()
    rollout_server.wait_until_up()  # with the base model's weights
    assert scored() == before
    assert client.engine.serves_last()


def test_a_quantized_policy_comes_back_whole_to_a_server_that_was_killed(rollout_server):
    """Its unadapted layers are not those of the checkpoint that the server starts with, and are sent once."""
    engine = RemoteEngine(HttpTransport(rollout_server.wait_until_up().url))
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(
        rollout_server.model, dtype=torch.float32, quantization_config=quantization
    )
    policy = get_peft_model(base, peft_config_for("lora", ModelConfig(), ["q_proj", "v_proj"], None))
    with closing(engine):
        sync = WeightSync(policy, engine, TOKENS, probe_every=1)
        first = sync.sync()
        perturb_trained(policy, 0.3, seed=1)
        second = sync.sync()
        assert max(first.probe_max_gap, second.probe_max_gap) < PARITY_NATS
        assert second.payload_bytes < first.payload_bytes, "what never moves is sent once"
        rollout_server.kill()
        engine.restore(timeout=240.0)
        served = engine.prompt_logprobs(TOKENS)
        assert probe.max_gap(served, probe.trainer_logprobs(policy, TOKENS)) < PARITY_NATS


def test_keys_and_values_that_were_cached_before_a_sync_are_dropped_by_a_server_too(trainer):
    policy, sync, client = trainer
    transport = client.engine.transport
    settings = {"temperature": 0.0, "max_tokens": 16, "logprobs": 0, "return_token_ids": True}

    def sample(prompt):
        body = {"model": client.clients[0].model, "prompt": prompt} | settings
        answer = transport.request("POST", "/v1/completions", json=body)
        [choice] = answer["choices"]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], cached

    # a block of the cache has 128 tokens, vLLM's own choice on a CPU
    check_that_a_sync_drops_the_cache(sample, policy, sync, prompt_length=150, cached_tokens=128)


def test_a_batch_that_takes_longer_than_the_limit_names_the_limit_and_the_mend(trainer, rollout_server):
    impatient = RolloutClient(rollout_server.url, connection_timeout=1.0)
    impatient.engine = trainer[2].engine
    with pytest.raises(
        EngineLostError, match=r"2048 completions .* within vllm_server_timeout=1 s: .* raise vllm_server_timeout"
    ):
        impatient.generate(PROMPTS, **SAMPLING | {"n": 512})


def test_what_is_longer_than_the_server_takes_is_refused_with_the_option_to_raise(trainer):
    _, _, client = trainer
    needed = r"of 20 tokens with max_completion_length=240 needs 260, .* takes 256: start it with --max-model-len 260"
    with pytest.raises(RemoteSyncError, match=needed):
        client.generate(PROMPTS, **SAMPLING | {"max_tokens": 240})
    problems = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with pytest.raises(RemoteSyncError, match=needed):
        ServerSampler(client).generate(problems, SamplingParams(max_tokens=240))
    with pytest.raises(RemoteSyncError, match=r"refused to sample: Request failed: 400.*temperature"):
        client.generate(PROMPTS, **SAMPLING | {"temperature": -1.0})
    assert client.resampled_batches == 0


def requests_are_running(server):
    import requests

    text = requests.get(f"{server.url}/metrics", timeout=10).text
    return any(
        line.startswith("vllm:num_requests_running") and float(line.rpartition(" ")[2]) > 0
        for line in text.splitlines()
    )


def kill_at_the_pause(server, client, monkeypatch):
    """The next sync loses its server after everything was staged, before the commit."""
    pause = client.engine.transport.pause

    def killed_mid_sync():
        monkeypatch.undo()
        server.kill()
        pause()

    monkeypatch.setattr(client.engine.transport, "pause", killed_mid_sync)


def check_that_it_recovers_in_time(rollout_server, thread, done):
    """Of a sync `in_background` that waits for its server: it ends on parity, soon after the server is up."""
    rollout_server.wait_until_up()
    up = time.monotonic()
    thread.join(240)
    report, finished = done[0]
    assert not isinstance(report, Exception), report
    assert report.probe_max_gap < PARITY_NATS
    assert finished - up < RECOVERY_SECONDS


def test_a_server_killed_between_stage_and_commit_is_brought_to_the_version_of_that_sync(
    trainer, rollout_server, monkeypatch
):
    policy, sync, client = trainer
    perturb_trained(policy, 0.2, seed=5)
    kill_at_the_pause(rollout_server, client, monkeypatch)
    killed = set(rollout_server.processes())
    thread, done = in_background(sync.sync)
    while killed & set(rollout_server.processes()):
        assert thread.is_alive(), done
        time.sleep(0.1)
    check_that_it_recovers_in_time(rollout_server, thread, done)
    assert client.engine.serves_last()
    output = client.generate(PROMPTS, **SAMPLING)
    assert sampled_from(policy, output, PROMPTS, SAMPLING["n"]) < PARITY_NATS


def test_a_server_that_comes_back_with_another_base_is_refused_by_name_and_then_recovers(
    trainer, rollout_server, tmp_path, monkeypatch
):
    policy, sync, client = trainer
    weights = rollout_server.model / "model.safetensors"
    shutil.copy(weights, tmp_path / "kept")
    other = make_tiny_checkpoint(tmp_path / "other", tied=False, seed=1) / "model.safetensors"
    perturb_trained(policy, 0.2, seed=2)
    kill_at_the_pause(rollout_server, client, monkeypatch)
    os.replace(other, weights)
    try:
        with pytest.raises(RemoteSyncError, match=r"another base model .*model\.layers\.0\.self_attn\.q_proj\.weight"):
            sync.sync()
    finally:
        os.replace(tmp_path / "kept", weights)
    rollout_server.kill()
    thread, done = in_background(sync.sync)
    time.sleep(2)
    check_that_it_recovers_in_time(rollout_server, thread, done)


def test_a_server_lost_before_anything_was_sent_is_claimed_again_and_gets_the_policy_with_the_first_sync(
    rollout_server,
):
    policy = policy_of("fura", rollout_server.wait_until_up().model)
    with closing(RolloutClient(rollout_server.url, connection_timeout=240.0)) as client:
        sync = WeightSync(policy, client.engine, TOKENS, probe_every=1)
        rollout_server.kill()
        client.engine.restore(240.0)
        assert client.engine.serves_last()
        assert sync.sync().probe_max_gap < PARITY_NATS


def test_a_server_killed_between_commit_and_resume_is_brought_back(trainer, rollout_server, monkeypatch):
    policy, sync, client = trainer
    resume = client.engine.transport.resume

    def killed():
        monkeypatch.undo()
        rollout_server.kill()
        resume()

    perturb_trained(policy, 0.2, seed=5)
    monkeypatch.setattr(client.engine.transport, "resume", killed)
    assert sync.sync().probe_max_gap < PARITY_NATS
    assert client.generate(PROMPTS, **SAMPLING)["completion_ids"]


def test_a_server_left_paused_is_a_clear_error_in_time_and_goes_on_when_it_is_asked_again(
    trainer, rollout_server, monkeypatch
):
    policy, sync, client = trainer
    impatient = RolloutClient(rollout_server.url, connection_timeout=30.0)
    impatient.engine = client.engine
    monkeypatch.setattr(client.engine.transport, "timeout", 5.0)

    def lost():
        raise EngineLostError("the word to go on was lost")

    perturb_trained(policy, 0.2, seed=6)
    started = time.monotonic()
    with monkeypatch.context() as cut_off:
        cut_off.setattr(client.engine.transport, "resume", lost)
        with pytest.raises(EngineLostError, match="the word to go on was lost"):
            sync.sync()
    assert time.monotonic() - started < RECOVERY_SECONDS
    output = impatient.generate(PROMPTS, **SAMPLING)
    assert impatient.resampled_batches == 0
    assert sampled_from(policy, output, PROMPTS, SAMPLING["n"]) < PARITY_NATS


@pytest.mark.parametrize("during", ["rollouts", "evaluation", "sync"])
def test_a_server_that_hangs_is_a_clear_error_in_time(during, trainer, rollout_server):
    policy, sync, client = trainer
    impatient = RolloutClient(rollout_server.url, connection_timeout=5.0)
    impatient.engine = client.engine
    impatient.engine.transport.timeout = 5.0
    problems, greedy = [{"prompt_token_ids": PROMPTS[0]}], SamplingParams(temperature=0.0, max_tokens=8)
    ask = {
        "rollouts": lambda: impatient.generate(PROMPTS, **SAMPLING),
        "evaluation": lambda: ServerSampler(impatient).generate(problems, greedy),
        "sync": sync.sync,
    }[during]
    perturb_trained(policy, 0.1, seed=4)
    stopped = rollout_server.processes()
    for process in stopped:
        process.suspend()
    started = time.monotonic()
    try:
        with pytest.raises(EngineLostError, match=r"was not up within 5 s.*did not answer within"):
            ask()
        assert time.monotonic() - started < RECOVERY_SECONDS
    finally:
        for process in stopped:
            process.resume()
        client.engine.transport.timeout = 240.0
    assert sync.sync().audit_gain_min == pytest.approx(1.0, abs=0.01)
    assert client.generate(PROMPTS, **SAMPLING)["completion_ids"]


def test_a_slow_network_costs_time_and_nothing_else(rollout_server):
    policy = policy_of("fura", rollout_server.model)
    with slow_network(rollout_server.port, bytes_per_second=200_000) as url:
        client = RolloutClient(url, connection_timeout=240.0, payload_transport="inline")
        sync = WeightSync(policy, client.engine, TOKENS, probe_every=1)
        report = sync.sync()
        assert report.probe_max_gap < PARITY_NATS
        assert report.seconds > report.payload_bytes / 200_000, "the network must have been slow"
        output = client.generate(PROMPTS, **SAMPLING)
        client.close()
    assert sampled_from(policy, output, PROMPTS, SAMPLING["n"]) < PARITY_NATS
    assert client.resampled_batches == 0


def test_a_network_that_trickles_is_a_clear_error_in_time(trainer, rollout_server):
    """Something arrives all the time, so that no limit between two pieces would ever end it."""
    with slow_network(rollout_server.port, bytes_per_second=400) as url:
        started = time.monotonic()
        with pytest.raises(EngineLostError, match=r"did not answer within 4 s.*or the network is slow"):
            HttpTransport(url, timeout=4.0).request("GET", "/server_info", params={"config_format": "json"})
        assert time.monotonic() - started < 8
        client = RolloutClient(rollout_server.url, connection_timeout=5.0)
        client.engine = trainer[2].engine
        client.clients[0].base_url = url
        started = time.monotonic()
        with pytest.raises(
            EngineLostError, match=r"no batch of rollouts arrived whole in 3 attempts.*vllm_server_timeout=5 s"
        ):
            client.generate(PROMPTS, **SAMPLING)
        assert time.monotonic() - started < RECOVERY_SECONDS


def test_a_payload_with_a_nan_is_refused_and_touches_nothing(trainer):
    _, sync, client = trainer
    before = client.engine.prompt_logprobs(TOKENS)
    name = "model.layers.1.mlp.down_proj.weight"
    out_features, in_features = sync.weights[name].shape
    up = torch.full((out_features, 2), float("nan"))
    update = Update(
        99, sync.version, {name: Factors("low_rank", {"up": up, "down": torch.zeros(2, in_features)})}, None
    )
    with pytest.raises(RemoteSyncError, match=rf"{name}: up is not finite"):
        client.engine.push(update)
    assert torch.equal(client.engine.prompt_logprobs(TOKENS), before)
    assert client.engine.serves_last()
    assert sync.sync().probe_max_gap < PARITY_NATS


def test_a_second_trainer_is_refused_while_the_first_lives(trainer, rollout_server):
    transport = HttpTransport(rollout_server.url)
    transport.lease_seconds = 2.0  # how long it waits for the first
    with pytest.raises(OwnedByAnotherError, match=r"belongs to trainer .* whose lease runs for another \d+ s"):
        WeightSync(policy_of("lora", rollout_server.model), RemoteEngine(transport), TOKENS)


def run_trainer_that_is_killed_in_its_pause(rollout_server):
    child = subprocess.run(
        [sys.executable, "-c", KILLED_TRAINER, rollout_server.url, str(rollout_server.model)],
        capture_output=True, text=True, timeout=300, cwd=REPOSITORY / "tests", env=child_environment(),
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr[-3000:]


def test_a_trainer_killed_between_stage_and_commit_leaves_a_server_that_the_next_one_claims(rollout_server):
    run_trainer_that_is_killed_in_its_pause(rollout_server)
    policy = policy_of("lora", rollout_server.model)
    engine = RemoteEngine(HttpTransport(rollout_server.url))
    started = time.monotonic()
    sync = WeightSync(policy, engine, TOKENS)  # waits for the dead trainer's lease
    assert 0.4 < time.monotonic() - started < KILLED_TRAINERS_LEASE + 5
    assert sync.sync().probe_max_gap < PARITY_NATS
    engine.close()


def test_a_server_whose_trainer_was_killed_in_its_pause_generates_again_without_another(rollout_server):
    rollout_server.wait_until_up()
    run_trainer_that_is_killed_in_its_pause(rollout_server)
    transport = HttpTransport(rollout_server.url, timeout=KILLED_TRAINERS_LEASE + RECOVERY_SECONDS)
    assert transport.request("GET", "/is_paused")["is_paused"]
    [before] = transport.call("fura_status")
    assert transport.prompt_logprobs(TOKENS).isfinite().all()  # waits in the server's queue
    assert not transport.request("GET", "/is_paused")["is_paused"]
    [after] = transport.call("fura_status")
    assert after | {"lease_ended": False} == before, "the version, the owner and what was staged are as they were"


KILLED_TRAINERS_LEASE = 8
KILLED_TRAINER = f"""
import os, signal, sys
from distributed_trainer import TOKENS, policy_of
from fura_rl.sync.http_transport import HttpTransport
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.weight_sync import WeightSync

transport = HttpTransport(sys.argv[1])
transport.lease_seconds = {KILLED_TRAINERS_LEASE}
pause = transport.pause
def paused_then_killed():
    pause()
    os.kill(os.getpid(), signal.SIGKILL)
transport.pause = paused_then_killed
WeightSync(policy_of("fura", sys.argv[2]), RemoteEngine(transport), TOKENS).sync()
"""
