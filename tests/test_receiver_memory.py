"""What a commit needs of the engine's device beside the live weights."""

import weakref

import torch

from fura_rl.sync import payload
from fura_rl.sync.factors import Factors
from fura_rl.sync.receiver import Receiver


class LiveModel:
    """Takes weights on a device of its own, and counts those that lie there when the last is written."""

    device = torch.device("meta")
    beside = 0

    def record(self, tensors):
        pass

    def write(self, updates, read, generator):
        moved = []
        for name in updates:
            moved.append(weakref.ref(updates[name].tensors["weight"]))
        self.beside = sum(tensor() is not None for tensor in moved)


class BaseWeights:
    read = None

    def differences(self, samples):
        return []


def test_whole_weights_are_moved_to_the_device_as_they_are_written():
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(8, 8) for i in range(16)}
    model = LiveModel()
    receiver = Receiver(model, BaseWeights())
    receiver.claim("trainer", 30.0, {name: tuple(weight.shape) for name, weight in weights.items()}, {})
    updates = {name: Factors("dense", {"weight": weight}) for name, weight in weights.items()}
    [chunk] = payload.encode(updates, torch.float32)
    receiver.stage("trainer", 1, 0, 0, chunk.data, chunk.crc32)
    receiver.commit("trainer", 1, 1)
    assert receiver.version == 1
    assert model.beside == 1, "the last of them"
