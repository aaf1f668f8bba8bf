"""The fold of a slice, and of scattered rows, is that part of the fold of the whole weight, for every rule."""

import pytest
import torch
from conftest import TOLERANCE, relative_error

from fura_rl.benchmark.models import SIZES, random_model
from fura_rl.benchmark.sync import METHODS, payload_row
from fura_rl.sync import factors, payload
from fura_rl.sync.factors import RULES, Factors, fold_rows, fold_slice
from fura_rl.sync.fold import checkpoint_weights

OUT, IN, BLOCK, RANK = 48, 64, 8, 4


def make_factors(rule):
    shapes = {
        "weight": (OUT, IN),
        "update": ((IN if rule == "block_columns" else OUT) // BLOCK, BLOCK, BLOCK),
        "up": (OUT, RANK),
        "down": (RANK, IN),
        "scale": (OUT,),
    }
    return Factors(rule, {name: torch.randn(shapes[name]) for name in RULES[rule].names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [1, factors.CPU_PIECE_BYTES])
@pytest.mark.parametrize("rule", RULES)
def test_scattered_rows_are_folded_as_in_the_whole_weight(rule, piece_bytes, dtype, monkeypatch):
    monkeypatch.setattr(factors, "CPU_PIECE_BYTES", piece_bytes)
    base, adapter = torch.randn(OUT, IN).to(dtype), make_factors(rule)
    spans = [(1, 4), (13, 20), (47, 48)]

    def read(rows, columns):
        return base[slice(*rows), slice(*columns)]

    whole, parts = torch.empty(OUT, IN, dtype=dtype), torch.empty(11, IN, dtype=dtype)
    fold_slice(read, adapter, (0, OUT), (0, IN), whole)
    fold_rows(read, torch.cat([base[slice(*span)] for span in spans]), adapter, spans, parts)
    expected = torch.cat([whole[slice(*span)] for span in spans])
    assert relative_error(parts, expected) < TOLERANCE[dtype]
    assert relative_error(whole, base) > 0.1, "it must move"


@pytest.mark.parametrize("method", METHODS)
def test_payload_by_arithmetic_is_what_a_16_bit_engine_is_sent(method):
    from peft import get_peft_model

    policy = get_peft_model(random_model("tiny", torch.device("cpu"), torch.float32), METHODS[method]())
    updates = {weight.name: weight.factors() for weight in checkpoint_weights(policy) if weight.layer is not None}
    chunks = [payload.decode(chunk.data, chunk.crc32) for chunk in payload.encode(updates, torch.bfloat16)]
    sent = sum(adapter.nbytes for chunk in chunks for adapter in chunk.values())
    assert sent / 1e6 == payload_row("tiny", method)["payload_mb"]


@pytest.mark.parametrize("size", [size for size in SIZES if size in ("qwen3-1.7b", "7b")])
def test_furas_payload_on_real_shapes_is_a_few_percent_of_the_weights(size):
    assert payload_row(size, "fura")["payload_frac"] <= 0.032
