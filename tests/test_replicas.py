"""Two real servers as replicas of one engine: both are synced, both are audited, and the batch is shared out."""

from types import SimpleNamespace

import pytest
import torch
from conftest import perturb_trained
from peft import get_peft_model
from rollout_server import RolloutServer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from fura_rl.adapters.registry import peft_config_for
from fura_rl.data import encode_prompts
from fura_rl.rollout_client import RolloutClient, split
from fura_rl.sync.probe import StaleEngineError
from fura_rl.sync.replicas import Replicas
from fura_rl.sync.transport import EngineLostError, RemoteSyncError
from fura_rl.sync.weight_sync import WeightSync

PROBE = list(range(5, 45))


@pytest.fixture
def servers(rollout_server, tmp_path, monkeypatch):
    """The second one wants a token, for which the first one does not ask."""
    monkeypatch.setenv("FURA_ROLLOUT_TOKEN", "a secret of this test")
    second = RolloutServer(rollout_server.model, tmp_path / "server.log").start()
    try:
        yield [rollout_server.wait_until_up(), second.wait_until_up()]
    finally:
        second.stop()


@pytest.mark.slow
def test_every_replica_serves_the_version_that_was_synced(servers, monkeypatch):
    with monkeypatch.context() as stranger:
        stranger.setenv("FURA_ROLLOUT_TOKEN", "a guess of this test")
        with pytest.raises(RemoteSyncError, match=r"wants another token; set FURA_ROLLOUT_TOKEN to the server's"):
            RolloutClient(servers[1].url, 120.0).engine.transport.call("fura_status")
    client = RolloutClient(",".join(server.url for server in servers), 120.0)
    model = AutoModelForCausalLM.from_pretrained(servers[0].model, dtype=torch.float32)
    policy = get_peft_model(model, peft_config_for("fura", ModelConfig(), None, None))
    sync = WeightSync(policy, client.engine, PROBE, probe_every=1)
    for step in range(2):
        perturb_trained(policy, 0.1, seed=step)
        report = sync.sync()
        assert report.probe_max_gap < 1e-5
        assert report.audit_gain_min == pytest.approx(1.0, abs=0.01)
    prompts = [PROBE[:n] for n in (3, 4, 5)]
    output = client.generate(prompts, n=2, max_tokens=4, temperature=1.0, logprobs=0)
    assert output["prompt_ids"] == prompts
    assert len(output["completion_ids"]) == 6
    check_that_conversations_are_answered_as_their_prompts_are(client, servers[0].model)
    first, second = client.engine.engines
    perturb_trained(policy, 0.1, seed=9)
    deliver, before = second._deliver, second._last

    def deliver_before(message):
        before.version = message.version
        return deliver(before)

    monkeypatch.setattr(second, "_deliver", deliver_before)
    with pytest.raises(StaleEngineError, match="14 of 14 modules"):
        sync.sync()
    assert first.serves_last()
    client.close()
    assert all("secret of this test" not in server.log.read_text() for server in servers)


def check_that_conversations_are_answered_as_their_prompts_are(client, model):
    conversations = [[{"role": "user", "content": f"What is {a} + 11?"}] for a in range(3)]
    greedy = {"n": 2, "max_tokens": 4, "top_k": 1}
    said = client.chat(conversations, **greedy)
    assert said["prompt_ids"] == encode_prompts(conversations, AutoTokenizer.from_pretrained(model))
    assert said["completion_ids"] == client.generate(said["prompt_ids"], **greedy)["completion_ids"]
    assert len(said["completion_ids"]) == 6
    with client.drawing_from(1):
        drawn = [client.chat(conversations, max_tokens=8)["completion_ids"] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != client.chat(conversations, max_tokens=8)["completion_ids"]
    with pytest.raises(RemoteSyncError, match=r"refused to sample: .*400.* tokens"):
        client.chat(conversations, max_tokens=400)


def test_replicas_after_a_dead_one_are_given_back_too():
    given_back = []

    def engine(name):
        def close():
            if name == "dead":
                raise EngineLostError(name)
            given_back.append(name)

        return SimpleNamespace(dtype=torch.float32, close=close)

    with pytest.raises(EngineLostError, match="dead"):
        Replicas([engine("first"), engine("dead"), engine("last")]).close()
    assert sorted(given_back) == ["first", "last"]


def test_items_are_split_in_order_and_evenly():
    assert [list(range(7))[part] for part in split(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [part.stop - part.start for part in split(1, 3)] == [0, 0, 1]
