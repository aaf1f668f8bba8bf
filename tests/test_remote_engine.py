"""The trainer's side of a sync over the wire: what it holds while it sends, and what it can send again."""

import base64
import weakref

import pytest
import torch
from torch import nn

from fura_rl.sync import message, payload
from fura_rl.sync.audit import VECTORS, probe_vectors
from fura_rl.sync.engine import LazyFactors, Update
from fura_rl.sync.factors import Factors
from fura_rl.sync.probe import StaleEngineError
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.replicas import Replicas
from fura_rl.sync.transport import EngineLostError, NotKeptError, RemoteSyncError
from fura_rl.sync.weight_sync import WeightSync

WEIGHTS = 12
CHUNK = 4096  # of two weights


class Worker:
    """An engine that keeps what is staged and serves what is committed.

    `faults` are raised once each, at the chunk of that number or the call of that name.
    """

    address, payload_transport, dtype = "the engine", "inline", torch.float32
    lease_seconds, timeout = float("inf"), 5.0

    def __init__(self, faults=None):
        self.staged, self.served, self.version, self.owner = {}, {}, 0, None
        self.commits, self.paused = [], False
        self.faults = dict(faults or {})

    def call(self, method, info=None, **_):
        if fault := self.faults.pop(method, None):
            raise fault
        if method == "fura_claim":
            self.owner = info.get("owner")
        if method == "fura_replies":
            return (
                [{}]
                if self.owner is None
                else [{"w0": [pack(torch.full((VECTORS,), float(self.version))), pack(torch.ones(VECTORS)), 0.0]}]
            )
        if method == "fura_update" and info.get("commit"):
            self.call("commit")
            if not self.staged:
                return [self.status() | {"error": "never staged here"}]
            assert sorted(self.staged) == list(range(info["chunk_count"]))
            chunks = [payload.decode(*self.staged[index]) for index in sorted(self.staged)]
            self.served, self.version = {name: f for chunk in chunks for name, f in chunk.items()}, info["version"]
            self.commits.append(self.version)
        elif method == "fura_update":
            if fault := self.faults.pop(info["index"], None):
                raise fault
            if info["index"] == 0:
                self.staged = {}
            self.staged[info["index"]] = base64.b64decode(info["source"]["inline"]), info["checksum"]
        return [self.status()]

    def status(self):
        return {"error": None, "pid": 1, "version": self.version, "owner": self.owner, "poisoned": None}

    def pause(self):
        self.paused = True

    def resume(self):
        self.call("resume")
        self.paused = False

    def restart(self):
        self.staged, self.served, self.version, self.owner = {}, {}, 0, None
        self.paused = False

    def stamp(self, version):
        self.call("stamp")

    def prompt_logprobs(self, token_ids):
        self.call("prompt_logprobs")
        if self.paused:
            raise EngineLostError("it did not answer in time")
        return torch.full((len(token_ids) - 1,), -float(self.version))

    def wait_until_up(self, timeout):
        pass


def pack(tensor):
    return base64.b64encode(tensor.numpy().tobytes()).decode()


class Policy:
    """Whole weights of half a chunk each, made when asked for, except `broken` ones; `reads` notes which."""

    def __init__(self):
        self.scale = 1.0
        self.reads = []
        self.broken = ()

    def make(self, index):
        self.reads.append(index)
        if index in self.broken:
            raise ArithmeticError(f"weight {index} is broken")
        return Factors("dense", {"weight": torch.full((CHUNK // 8,), self.scale * (index + 1))})

    def update(self, version=1, **settings):
        makers = {f"w{index}": lambda index=index: self.make(index) for index in range(WEIGHTS)}
        return Update(version, version - 1, LazyFactors(makers), read=None, **settings)

    def arrived_in(self, worker):
        return len(worker.served) == WEIGHTS and all(
            bool((worker.served[f"w{index}"].tensors["weight"] == self.scale * (index + 1)).all())
            for index in range(WEIGHTS)
        )


@pytest.fixture
def policy(monkeypatch):
    monkeypatch.setattr(payload, "CHUNK_BYTES", CHUNK)
    return Policy()


@pytest.fixture
def too_large_to_keep(monkeypatch):
    monkeypatch.setattr(message, "KEPT_BYTES", 2 * CHUNK)


def test_a_policy_too_large_to_keep_is_sent_one_chunk_at_a_time(policy, monkeypatch):
    monkeypatch.setattr(message, "KEPT_BYTES", 0)
    make_chunk, alive, beside = payload.make_chunk, weakref.WeakSet(), []

    def counted(tensors):
        beside.append(len(alive))
        chunk = make_chunk(tensors)
        assert not tensors, "what was packed is given up"
        alive.add(chunk)
        return chunk

    monkeypatch.setattr(payload, "make_chunk", counted)
    worker = Worker()
    push = RemoteEngine(worker).push(policy.update())
    assert policy.arrived_in(worker)
    assert push.payload_bytes > WEIGHTS * CHUNK // 2
    assert beside == [0] * (WEIGHTS // 2), "when a chunk is made, none of those before is held"


def test_a_version_that_is_kept_is_read_once_however_often_it_is_sent(policy):
    worker = Worker({3: EngineLostError("gone")})
    engine = RemoteEngine(worker)
    engine.push(policy.update())
    assert policy.arrived_in(worker)
    worker.served = {}
    engine.resend()
    assert policy.arrived_in(worker)
    assert policy.reads == list(range(WEIGHTS))


@pytest.mark.parametrize(("fault", "commits_before_it"), [(3, []), ("stamp", [1])])
def test_an_engine_that_comes_back_is_brought_to_the_version_once(policy, fault, commits_before_it):
    worker = Worker({fault: EngineLostError("gone")})
    push = RemoteEngine(worker).push(policy.update())
    assert policy.arrived_in(worker)
    assert worker.commits == [*commits_before_it, 1]
    assert push.phases.keys() == {"fold", "stage", "commit"}
    assert min(push.phases.values()) > 0


def test_a_lost_engine_is_brought_back_though_it_cannot_be_resumed(policy, caplog):
    worker = Worker({"commit": EngineLostError("gone"), "resume": RemoteSyncError("refused")})
    RemoteEngine(worker).push(policy.update())
    assert policy.arrived_in(worker)
    assert "could not be resumed: RemoteSyncError('refused')" in caplog.text


def test_an_engine_that_was_committed_to_and_could_not_be_resumed_is_brought_back(policy):
    worker = Worker({"resume": EngineLostError("gone")})
    RemoteEngine(worker).push(policy.update())
    assert policy.arrived_in(worker)
    assert worker.commits == [1, 1]
    assert not worker.paused


@pytest.fixture
def left_paused(policy, monkeypatch):
    """An engine whose commit has arrived, and no word to go on since."""

    def lost():
        raise EngineLostError("the word to go on was lost")

    worker = Worker()
    worker.timeout = 0.1
    engine = RemoteEngine(worker)
    engine.prepare({}, {}, {})
    with monkeypatch.context() as cut_off:
        cut_off.setattr(worker, "resume", lost)
        with pytest.raises(EngineLostError, match="the word to go on was lost"):
            engine.push(policy.update())
    assert policy.arrived_in(worker)
    assert worker.paused
    return engine, worker


def test_an_engine_that_is_left_paused_serves_nothing_until_it_is_restored(left_paused):
    engine, worker = left_paused
    assert not engine.serves_last()
    engine.restore(5.0)
    assert engine.serves_last()
    assert not worker.paused


def test_an_engine_is_not_given_back_paused(left_paused):
    engine, worker = left_paused
    engine.close()
    assert not worker.paused


def test_an_engine_lost_before_anything_was_sent_is_claimed_and_gets_the_policy_with_the_first_push(policy):
    worker = Worker()
    engine = RemoteEngine(worker)
    engine.prepare({}, {}, {})
    worker.restart()
    assert not engine.serves_last()
    engine.restore(5.0)
    assert engine.serves_last()
    assert worker.commits == []
    engine.push(policy.update())
    assert policy.arrived_in(worker)


def test_an_engine_that_was_started_again_since_the_commit_is_brought_back_before_its_answer_counts(policy):
    worker = Worker()
    engine = RemoteEngine(worker)
    engine.prepare({}, {}, {})
    engine.push(policy.update())
    worker.restart()
    [reply] = engine.kernel_replies({"w0": [(0, 1)]})
    assert reply["w0"].output.tolist() == [[1.0]] * VECTORS
    worker.restart()
    assert engine.prompt_logprobs([1, 2, 3]).tolist() == [-1.0, -1.0]
    assert worker.commits == [1, 1, 1]


def test_an_engine_that_comes_back_is_asked_again(policy):
    worker = Worker()
    engine = RemoteEngine(worker)
    engine.prepare({}, {}, {})
    engine.push(policy.update())
    worker.faults = {"prompt_logprobs": EngineLostError("gone")}
    assert engine.prompt_logprobs([1, 2, 3]).tolist() == [-1.0, -1.0]
    worker.faults = {"fura_replies": EngineLostError("gone")}
    [reply] = engine.kernel_replies({"w0": [(0, 1)]})
    assert reply["w0"].output.tolist() == [[1.0]] * VECTORS
    assert worker.commits == [1, 1, 1]


def test_a_version_that_is_not_kept_is_read_again_until_it_has_arrived_and_never_later(policy, too_large_to_keep):
    worker = Worker({4: EngineLostError("gone")})
    engine = RemoteEngine(worker)
    push = engine.push(policy.update())
    assert policy.arrived_in(worker)
    assert WEIGHTS * CHUNK // 2 < push.payload_bytes < WEIGHTS * CHUNK, "counted once"
    policy.scale = 2.0  # a training step
    with pytest.raises(NotKeptError, match=r"version 1 cannot be sent to the engine again.* GiB are not kept"):
        engine.resend()


def test_an_engine_that_has_lost_what_is_not_kept_is_named_with_the_way_out(policy, too_large_to_keep):
    worker = Worker()
    engine = RemoteEngine(worker)
    engine.prepare({}, {}, {})
    engine.push(policy.update())
    worker.restart()
    named = r"version 1 cannot be sent to the engine again, .*resume from the last checkpoint"
    with pytest.raises(NotKeptError, match=named):
        engine.prompt_logprobs([1, 2, 3])


class LeftBehind(Worker):
    """Acknowledges every version and computes with the first."""

    first = None

    def call(self, method, info=None, spans=None, **_):
        if method == "fura_replies":
            return [{name: self.reply(name, spans[name]) for name in spans}]
        answer = super().call(method, info)
        self.first = self.first or self.served
        return answer

    def reply(self, name, spans):
        weight = torch.cat([self.first[name].tensors["weight"][slice(*span)] for span in spans])
        output = probe_vectors(weight.shape[1], weight.device) @ weight.mT
        return [pack(output), pack(torch.ones_like(output)), 0.0]


def test_a_stale_module_of_a_version_that_is_not_kept_is_named_as_such(monkeypatch):
    monkeypatch.setattr(message, "KEPT_BYTES", 0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    sync = WeightSync(model, RemoteEngine(LeftBehind()), [1, 2], probe_every=100, score=lambda *_: -torch.ones(1))
    sync.sync()
    with torch.no_grad():
        model[1].weight.add_(0.1)
    with pytest.raises(
        StaleEngineError,
        match=r"1 of 1 modules .* sent, once, and version 2 cannot be sent to the engine again, .*: 1\.weight \(gain",
    ):
        sync.sync()


@pytest.mark.parametrize("fault", [RemoteSyncError("refused"), EngineLostError("gone")])
def test_processes_that_gather_along_find_their_counterpart_in_every_weight_once(policy, too_large_to_keep, fault):
    """A trainer in pieces: who sends must read on though the engine has failed, and cannot read a second time."""
    with pytest.raises(type(fault)):
        RemoteEngine(Worker({4: fault})).push(policy.update(read_once=True))
    assert policy.reads == list(range(WEIGHTS))


@pytest.mark.parametrize("several", [False, True])
def test_a_failure_is_not_hidden_by_one_of_the_rest_that_is_read_after_it(policy, several, caplog):
    worker = Worker({2: RemoteSyncError("refused")})
    engine = Replicas([RemoteEngine(worker), RemoteEngine(Worker())]) if several else RemoteEngine(worker)
    policy.broken = (9,)
    with pytest.raises(RemoteSyncError, match="refused"):
        engine.push(policy.update(read_once=True))
    assert policy.reads == list(range(10))
    assert "weight 9 is broken" in caplog.text


def test_what_was_refused_leaves_the_version_before_to_be_sent_again(policy):
    worker = Worker()
    engine = RemoteEngine(worker)
    engine.push(policy.update(1))
    worker.faults[2] = RemoteSyncError("refused")
    policy.scale = 2.0
    with pytest.raises(RemoteSyncError, match="refused"):
        engine.push(policy.update(2))
    worker.served = {}
    engine.resend()
    policy.scale = 1.0
    assert policy.arrived_in(worker)
    assert worker.version == 1


@pytest.mark.parametrize("lost", ["between two syncs", "in a sync"])
def test_an_engine_that_comes_back_from_nothing_gets_what_was_sent_before_too(policy, lost):
    """In chunks of their own, made when they are needed; an engine that was not lost gets only what moves."""
    worker = Worker()
    engine = RemoteEngine(worker)
    engine.push(policy.update(1))
    constant = Policy()
    sent_before = {f"c{index}": lambda index=index: constant.make(index) for index in range(WEIGHTS)}
    settings = {"sent_before": LazyFactors(sent_before)}
    if lost == "in a sync":
        worker.faults[3] = EngineLostError("gone")
        engine.push(policy.update(2, **settings))
    else:
        engine.push(policy.update(2, **settings))
        engine.resend()
        assert constant.reads == []
        worker.restart()
        assert engine.restore(timeout=5.0)
    assert constant.reads == list(range(WEIGHTS))
    assert worker.served.keys() == {f"{kind}{index}" for kind in "wc" for index in range(WEIGHTS)}
    assert worker.commits[-1] == worker.version == 2


@pytest.mark.parametrize("read_once", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_replicas_are_sent_one_reading_of_a_policy_in_pieces(policy, monkeypatch, read_once, kept):
    """Its other processes gather along once a sync, whatever the number of engines: a second reading would hang."""
    if not kept:
        monkeypatch.setattr(message, "KEPT_BYTES", 2 * CHUNK)
    workers = [Worker(), Worker({2: EngineLostError("gone")}), Worker()]
    engines = Replicas([RemoteEngine(worker) for worker in workers])
    push = engines.push(policy.update(read_once=read_once))
    assert all(map(policy.arrived_in, workers))
    assert push.payload_bytes > 3 * WEIGHTS * CHUNK // 2
    if kept or read_once:
        assert policy.reads == list(range(WEIGHTS))
    assert engines.engines[0]._last.can_be_sent == kept, "nothing too large is held from sync to sync"
