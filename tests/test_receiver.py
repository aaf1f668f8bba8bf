"""An engine's side of a sync, on a live vLLM model: what is refused before a weight is touched, and what is undone."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PARITY_NATS, make_tiny_checkpoint, perturb_trained, start_llm
from peft import get_peft_model
from rollout_server import child_environment
from safetensors.torch import save
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from fura_rl.adapters.registry import peft_config_for
from fura_rl.sync import payload, vllm_model
from fura_rl.sync.base_weights import BaseWeights
from fura_rl.sync.factors import Factors
from fura_rl.sync.fingerprint import base_sample
from fura_rl.sync.fold import checkpoint_weights
from fura_rl.sync.payload import PayloadError
from fura_rl.sync.payload_source import PayloadFolderError, offered, payload_folder, read_payload
from fura_rl.sync.receiver import OwnershipError, Receiver
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.transport import RemoteSyncError
from fura_rl.sync.vllm_engine import ProcessTransport, find_model_runner
from fura_rl.sync.weight_sync import WeightSync

PROBE = list(range(5, 45))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from fura_rl.sync.vllm_engine import InProcessEngine

    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("base"), tied=True)
    return InProcessEngine(start_llm(folder)), folder


class Trainer:
    """A FuRA policy that packs its weights, and a receiver in the worker's place."""

    def __init__(self, engine, folder, owner="trainer"):
        self.engine, self.owner = engine, owner
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.policy = get_peft_model(model, peft_config_for("fura", ModelConfig(), None, None))
        self.receiver = Receiver(engine.model, BaseWeights(str(folder), None, torch.device("cpu")))

    @property
    def weights(self):
        return {w.name: w for w in checkpoint_weights(self.policy)}

    def claim(self, owner=None, lease_seconds=30.0, change=0.0, **more_tensors):
        shapes = {name: w.shape for name, w in self.weights.items()} | more_tensors
        samples = {
            name: [(r, c, v + change, slack) for r, c, v, slack in base_sample(w.read(), (0, w.shape[0]), w.shape[1])]
            for name, w in self.weights.items()
            if w.layer is not None
        }
        self.receiver.claim(owner or self.owner, lease_seconds, shapes, {}, samples)

    def factors(self):
        return {name: w.factors() for name, w in self.weights.items() if w.trained}

    def chunks(self, factors=None):
        return list(payload.encode(self.factors() if factors is None else factors, torch.float32))

    def succeeded_by(self, owner):
        """Another trainer of the same policy."""
        self.receiver.release(self.owner)
        self.owner = owner
        self.claim()

    def stage(self, version, chunks, previous=None, owner=None):
        previous = self.receiver.version if previous is None else previous
        for index, chunk in enumerate(chunks):
            self.receiver.stage(owner or self.owner, version, previous, index, chunk.data, chunk.checksum)

    def commit(self, version, count=1):
        self.receiver.commit(self.owner, version, count)

    def logprobs(self):
        self.engine.llm.reset_prefix_cache()
        return self.engine.prompt_logprobs(PROBE)


@pytest.fixture
def trainer(engine):
    trainer = Trainer(*engine)
    trainer.claim()
    trainer.stage(1, trainer.chunks())
    trainer.commit(1)  # the base model's weights, whatever the test before left
    perturb_trained(trainer.policy, 0.2, seed=0)
    return trainer


@torch.no_grad()
def expected(policy):
    ids = torch.tensor([PROBE])
    logits = policy.eval()(input_ids=ids).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def test_a_committed_version_is_what_the_engine_serves_and_staging_alone_changes_nothing(trainer):
    before = trainer.logprobs()
    trainer.stage(2, trainer.chunks())
    assert torch.equal(trainer.logprobs(), before)
    trainer.commit(2)
    assert (trainer.logprobs() - expected(trainer.policy)).abs().max() < 1e-5
    assert trainer.receiver.status()["version"] == 2


def test_a_commit_is_idempotent_and_starts_from_the_pristine_base(trainer):
    for version in (2, 3, 3):
        trainer.stage(version, trainer.chunks())
        trainer.commit(version)
        assert (trainer.logprobs() - expected(trainer.policy)).abs().max() < 1e-5


NAN = "model.layers.0.mlp.up_proj.weight"


def with_nan(factors):
    return factors | {NAN: Factors("block_columns", {"update": factors[NAN].tensors["update"] * float("nan")})}


def misshapen(factors):
    return factors | {NAN: Factors("block_columns", {"update": torch.zeros(3, 5, 5)})}


def unknown(factors):
    return factors | {"model.layers.9.mlp.up_proj.weight": Factors("block_columns", {"update": torch.zeros(8, 8, 8)})}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_nan, r"up_proj\.weight: update is not finite"),
        (misshapen, r"up_proj\.weight: update is \(3, 5, 5\), which does not fit a weight of \(96, 64\)"),
        (unknown, r"layers\.9\.mlp\.up_proj\.weight: not one of the policy's tensors"),
    ],
)
def test_a_bad_payload_is_refused_by_name_with_the_live_weights_untouched(trainer, spoil, message):
    before = trainer.logprobs()
    trainer.stage(2, trainer.chunks(spoil(trainer.factors())))
    with pytest.raises(PayloadError, match=message):
        trainer.commit(2)
    assert torch.equal(trainer.logprobs(), before)
    assert trainer.receiver.version == 1


def test_damage_gaps_and_wrong_order_are_refused(trainer):
    [chunk] = trainer.chunks()
    damaged = payload.Chunk(chunk.data[:-1] + b"\x01", chunk.checksum)
    with pytest.raises(PayloadError, match="checksum differs"):
        trainer.stage(2, [damaged])
    trainer.stage(2, [chunk])
    with pytest.raises(PayloadError, match="1 of 2 chunks did not arrive"):
        trainer.commit(2, count=2)
    with pytest.raises(PayloadError, match="made to follow version 7, but this engine serves 1"):
        trainer.stage(8, [chunk], previous=7)
    with pytest.raises(PayloadError, match="version 9 was never staged"):
        trainer.commit(9)


def test_an_entry_that_no_rule_knows_is_refused():
    data = save({"model.norm.weight|exec|code": torch.zeros(2)})
    with pytest.raises(PayloadError, match="no fold rule"):
        payload.decode(data, payload.checksum_of(data))


def test_a_second_trainer_is_refused_until_the_lease_ends(trainer):
    trainer.claim(lease_seconds=0.2)
    with pytest.raises(OwnershipError, match="belongs to trainer trainer, whose lease runs"):
        trainer.claim(owner="other")
    with pytest.raises(OwnershipError):
        trainer.stage(2, trainer.chunks(), owner="other")
    time.sleep(0.25)
    trainer.claim(owner="other")
    with pytest.raises(OwnershipError, match="belongs to trainer other"):
        trainer.commit(2)
    trainer.receiver.release("other")
    trainer.claim()


def test_another_base_model_is_refused_by_name(trainer):
    with pytest.raises(ValueError, match=r"another base model .*14 of 14 base weights differ.*q_proj\.weight"):
        trainer.claim(change=0.5)


@contextlib.contextmanager
def out_of_memory(*models, times):
    """So many folds into the second layer of each of `models` fail, with their number."""
    with pytest.MonkeyPatch.context() as patch:
        for model in models:
            patch.setattr(model, "_write_module", failing_first(model._write_module, times))
        yield


def failing_first(write, times):
    failures = []

    def fail(module, *args):
        if module.startswith("model.layers.1") and len(failures) < times:
            failures.append(module)
            raise MemoryError(f"out of memory in fold {len(failures)}")
        write(module, *args)

    return fail


def test_a_commit_that_fails_half_way_is_undone(trainer):
    trainer.stage(2, trainer.chunks())
    trainer.commit(2)
    before = trainer.logprobs()
    perturb_trained(trainer.policy, 0.2, seed=1)
    trainer.stage(3, trainer.chunks())
    with out_of_memory(trainer.engine.model, times=1), pytest.raises(MemoryError):
        trainer.commit(3)
    assert trainer.engine.model.poisoned is None
    assert trainer.receiver.version == 2
    assert torch.allclose(trainer.logprobs(), before, atol=1e-6)


def test_a_commit_that_fails_inside_a_fused_module_is_undone(trainer, monkeypatch):
    trainer.stage(2, trainer.chunks())
    trainer.commit(2)
    before = trainer.logprobs()
    perturb_trained(trainer.policy, 0.2, seed=1)
    trainer.stage(3, trainer.chunks())
    fill, failures = vllm_model.fill, []

    def half_way(region, *args):
        if region.name == "model.layers.1.mlp.up_proj.weight" and not failures:
            failures.append(region)
            raise MemoryError("out of memory in a fold")
        fill(region, *args)

    monkeypatch.setattr(vllm_model, "fill", half_way)
    with pytest.raises(MemoryError):
        trainer.commit(3)
    assert trainer.engine.model.poisoned is None
    assert torch.allclose(trainer.logprobs(), before, atol=1e-6)
    trainer.commit(3)
    assert (trainer.logprobs() - expected(trainer.policy)).abs().max() < 1e-5


def test_a_trainer_that_does_not_know_what_one_before_has_changed_is_told_to_start_the_engine_again(trainer):
    trainer.stage(2, with_norm(trainer))
    trainer.commit(2, count=2)
    trainer.receiver.release("trainer")
    shapes = {name: weight.shape for name, weight in trainer.weights.items() if name != NORM}
    trainer.receiver.claim("other", 30.0, shapes, {}, {})
    trainer.stage(3, trainer.chunks(), owner="other")
    with pytest.raises(PayloadError, match=rf"{NORM}: 1 weights are still .*start the engine again"):
        trainer.receiver.commit("other", 3, 1)
    trainer.receiver.claim("other", 30.0, {name: weight.shape for name, weight in trainer.weights.items()}, {}, {})
    trainer.stage(3, trainer.chunks(), owner="other")
    trainer.receiver.commit("other", 3, 1)
    assert (trainer.logprobs() - expected(trainer.policy)).abs().max() < 1e-5, "put back where its place is known"


def test_a_commit_that_cannot_be_undone_leaves_the_engine_refusing_to_generate(trainer, caplog):
    trainer.stage(2, trainer.chunks())
    with out_of_memory(trainer.engine.model, times=2), pytest.raises(MemoryError, match="fold 1"):
        trainer.commit(2)
    assert "could not be put back: MemoryError('out of memory in fold 2')" in caplog.text
    assert "interrupted" in trainer.receiver.status()["poisoned"]
    trainer.stage(2, trainer.chunks())
    trainer.commit(2)
    assert (trainer.logprobs() - expected(trainer.policy)).abs().max() < 1e-5


NORM = "model.layers.0.input_layernorm.weight"  # of which FuRA changes nothing


def with_norm(trainer):
    """Two chunks, since those of one are written in no order: the norm first."""
    return trainer.chunks({NORM: Factors("dense", {"weight": torch.full((64,), 3.0)})}) + trainer.chunks()


def test_what_a_trainer_writes_in_a_commit_that_fails_is_undone_where_the_one_before_has_left_it_alone(trainer):
    trainer.stage(2, trainer.chunks())
    trainer.commit(2)
    before = trainer.logprobs()
    trainer.succeeded_by("other")
    for _ in range(2):
        trainer.stage(3, with_norm(trainer))
        with out_of_memory(trainer.engine.model, times=1), pytest.raises(MemoryError):
            trainer.commit(3, count=2)
        assert trainer.engine.model.poisoned is None
        assert torch.allclose(trainer.logprobs(), before, atol=1e-6)
    trainer.commit(3, count=2)
    assert (trainer.logprobs() - before).abs().max() > 1e-2
    trainer.succeeded_by("a third")
    trainer.stage(4, trainer.chunks())
    trainer.commit(4)
    assert torch.allclose(trainer.logprobs(), before, atol=1e-6)


def test_a_failed_commit_over_what_is_no_longer_known_leaves_the_engine_refusing_to_generate(trainer, caplog):
    for version, chunks in ((2, with_norm(trainer)), (3, trainer.chunks())):
        trainer.stage(version, chunks)
        trainer.commit(version, len(chunks))
    before = trainer.logprobs()
    trainer.stage(4, with_norm(trainer))
    with out_of_memory(trainer.engine.model, times=1), pytest.raises(MemoryError):
        trainer.commit(4, count=2)
    assert f"version 3 does not hold {NORM}" in caplog.text
    assert "interrupted" in trainer.receiver.status()["poisoned"]
    trainer.commit(4, count=2)
    assert torch.allclose(trainer.logprobs(), before, atol=1e-6)
    trainer.succeeded_by("other")
    trainer.stage(5, trainer.chunks())
    trainer.commit(5)
    assert (trainer.logprobs() - expected(trainer.policy)).abs().max() < 1e-5


def test_a_weight_that_the_engine_has_no_place_for_is_none_that_the_next_trainer_must_put_back(trainer):
    before = trainer.logprobs()
    bias = "model.layers.0.self_attn.q_proj.bias"
    trainer.claim(**{bias: (64,)})
    trainer.stage(2, trainer.chunks({bias: Factors("dense", {"weight": torch.zeros(64)})}))
    with pytest.raises(KeyError, match=r"no place for model\.layers\.0\.self_attn\.q_proj\.bias"):
        trainer.commit(2)
    assert torch.equal(trainer.logprobs(), before)
    trainer.succeeded_by("other")
    trainer.stage(2, trainer.chunks())
    trainer.commit(2)
    assert (trainer.logprobs() - expected(trainer.policy)).abs().max() < 1e-5


def test_what_is_put_back_is_rounded_as_when_it_was_loaded(engine):
    """Stochastic rounding is for what is trained."""
    from fura_rl.sync.vllm_engine import InProcessEngine

    trainer = Trainer(InProcessEngine(start_llm(engine[1], "bfloat16")), engine[1])
    loaded = trainer.logprobs()
    trainer.claim()
    perturb_trained(trainer.policy, 0.2, seed=0)
    trainer.stage(1, trainer.chunks())
    trainer.commit(1)
    trainer.succeeded_by("other")
    trainer.stage(2, trainer.chunks({NORM: Factors("dense", {"weight": trainer.receiver.base.whole(NORM)})}))
    trainer.receiver.commit("other", 2, chunk_count=1, rounding_seed=1)
    assert torch.equal(trainer.logprobs(), loaded)


class TwoWorkers(ProcessTransport):
    """Our extension twice over one model, in the place of two tensor-parallel workers."""

    def __init__(self, llm):
        from vllm.config import WeightTransferConfig

        from fura_rl.sync.vllm_backend import FactoredSyncExtension, FactoredWeightTransferEngine

        super().__init__(llm)
        runner = find_model_runner(llm)
        config = WeightTransferConfig(backend="factored")
        self.workers = [FactoredSyncExtension(), FactoredSyncExtension()]
        for worker in self.workers:
            worker.vllm_config = runner.vllm_config
            worker.weight_transfer_engine = FactoredWeightTransferEngine(
                config, runner.vllm_config, runner.device, runner.get_model()
            )

    def call(self, method, **arguments):
        return [getattr(worker, method)(**arguments) for worker in self.workers]


def test_workers_that_a_failed_commit_left_at_two_versions_are_mended_by_the_next_trainer(engine, monkeypatch):
    transport = TwoWorkers(engine[0].llm)
    first = RemoteEngine(transport)
    policy = Trainer(*engine).policy
    sync = WeightSync(policy, first, PROBE, probe_every=1)
    sync.sync()
    perturb_trained(policy, 0.2, seed=0)

    def fail(*_):
        raise MemoryError("out of memory in a fold")

    with monkeypatch.context() as starved:
        starved.setattr(transport.workers[1].weight_transfer_engine.receiver, "_write", fail)
        with pytest.raises(RemoteSyncError, match="out of memory in a fold"):
            sync.sync()
    replies = transport.call("fura_status")
    assert [reply["version"] for reply in replies] == [2, 1]
    assert all("could not commit" in reply["poisoned"] for reply in replies)
    models = [worker.weight_transfer_engine.live for worker in transport.workers]
    with out_of_memory(*models, times=1), pytest.raises(RemoteSyncError, match="out of memory in fold 1"):
        sync.sync()
    replies = transport.call("fura_status")
    assert [reply["version"] for reply in replies] == [2, 1]
    assert all(reply["poisoned"] for reply in replies), "each would go back to a version of its own"
    first.close()
    second = RemoteEngine(transport)
    assert WeightSync(policy, second, PROBE, probe_every=1).sync().probe_max_gap < PARITY_NATS
    assert second.serves_last()


KILLED_IN_AN_OFFER = """
import os, signal
from fura_rl.sync.payload_source import offered
with offered(b"left", "file"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_payload_file_of_a_trainer_that_was_killed_is_swept_and_that_of_a_living_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("FURA_SYNC_FOLDER", str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_AN_OFFER], env=child_environment(), timeout=120)
    assert killed.returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    with offered(b"living", "file") as living:
        assert left.exists(), "it could be one that its trainer is about to lock"
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))
        with offered(b"next", "file") as source:
            assert read_payload(living) == b"living"
            assert read_payload(source) == b"next"
            assert not left.exists()
    assert not list(tmp_path.iterdir())


def test_a_payload_that_cannot_be_written_for_another_reason_than_room_is_an_error_with_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv("FURA_SYNC_FOLDER", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/fura-sync-"), offered(bytes(10**7), "file"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def without_fallocate(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_payload_folder_without_room_is_named(tmp_path, monkeypatch, code):
    """Before the payload is written, or while it is, in a file system that finds no room beforehand."""
    if code is not None:
        monkeypatch.setattr(os, "posix_fallocate", without_fallocate(code))
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        monkeypatch.setenv("FURA_SYNC_FOLDER", str(tmp_path))
        with (
            pytest.raises(
                PayloadFolderError,
                match=rf"1 MB of weights do not fit into {tmp_path}, which has 0 MB free \(No space left on device\)",
            ),
            offered(bytes(10**6), "file"),
        ):
            pass
        assert not list(tmp_path.iterdir())
        with offered(b"abc", "file") as source:
            assert read_payload(source) == b"abc"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False)


def test_payload_files_are_read_from_their_folder_only_and_are_gone_afterwards(tmp_path, monkeypatch):
    with offered(b"abc", "file") as source:
        assert read_payload(source) == b"abc"
    with pytest.raises(ValueError, match="set sync_transport=inline"):
        read_payload(source)
    with offered(b"abc", "inline") as source:
        assert read_payload(source) == b"abc"
    elsewhere = tmp_path / "secret"
    elsewhere.write_bytes(b"x")
    with pytest.raises(ValueError, match="only, not"):
        read_payload({"file": str(payload_folder() / ".." / elsewhere.relative_to("/"))})
