"""What a commit needs of the engine's device beside the live weights."""

import weakref

import pytest
import torch

from fura_rl.sync import payload
from fura_rl.sync.factors import Factors, as_matrix
from fura_rl.sync.receiver import Receiver


class LiveModel:
    """Takes weights on a device of its own, and counts those that lie there when the last is written."""

    device = torch.device("meta")
    beside = 0
    written = ()
    poisoned = None

    def record(self, tensors, stacks):
        self.owners = tensors

    def check_places(self, names):
        pass

    def write(self, updates, read, generator):
        moved = []
        for name in updates:
            moved.append(weakref.ref(updates[name].tensors["weight"]))
        self.beside = sum(tensor() is not None for tensor in moved)
        self.written = list(updates)


class BaseWeights:
    """Reads whole weights, and counts those that are there when the last is read."""

    read = None

    def __init__(self, weights):
        self.weights, self.given, self.beside = weights, [], 0

    def differences(self, samples):
        return []

    def __contains__(self, name):
        return name in self.weights

    def whole(self, name):
        weight = self.weights[name].clone()
        self.given.append(weakref.ref(weight))
        self.beside = sum(tensor() is not None for tensor in self.given)
        return weight


WEIGHTS = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(8, 8) for i in range(16)}


def commit(receiver, owner, weights, version, known=WEIGHTS):
    receiver.claim(owner, 30.0, {name: tuple(weight.shape) for name, weight in known.items()}, {}, {})
    updates = {name: Factors("dense", {"weight": as_matrix(weight)}) for name, weight in weights.items()}
    [chunk] = payload.encode(updates, torch.float32)
    receiver.stage(owner, version, None, 0, chunk.data, chunk.checksum)
    receiver.commit(owner, version, 1)


def test_whole_weights_are_moved_to_the_device_as_they_are_written():
    model = LiveModel()
    receiver = Receiver(model, BaseWeights(WEIGHTS))
    commit(receiver, "trainer", WEIGHTS, 1)
    assert receiver.version == 1
    assert model.beside == 1, "the last of them"


def test_base_weights_that_a_trainer_before_has_changed_are_read_as_they_are_written():
    model, base = LiveModel(), BaseWeights(WEIGHTS)
    receiver = Receiver(model, base)
    commit(receiver, "first", WEIGHTS, 1)
    assert not base.given
    receiver.release("first")
    [own, *left_over] = WEIGHTS
    commit(receiver, "second", {own: WEIGHTS[own]}, 1)
    assert model.written == [*sorted(left_over), own]
    assert len(base.given) == len(left_over), "each is read once"
    assert base.beside == 1, "the last of them"


def test_weights_of_another_trainer_that_the_checkpoint_does_not_hold_are_refused_with_nothing_written():
    stack = "model.layers.0.mlp.experts.down_proj"
    model = LiveModel()
    receiver = Receiver(model, BaseWeights(WEIGHTS))
    first = WEIGHTS | {stack: torch.randn(4, 8, 8)}
    commit(receiver, "first", first, 1, first)
    receiver.release("first")
    model.written = ()
    with pytest.raises(payload.PayloadError, match=rf"{stack}: 1 weights are still those of another trainer"):
        commit(receiver, "second", WEIGHTS, 1, first)
    assert model.written == ()
    commit(receiver, "second", first, 2, first)
    assert set(model.written) == set(first)
