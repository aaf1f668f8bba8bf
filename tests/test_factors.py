"""The fold of a slice, and of scattered rows, is that part of the fold of the whole weight, for every rule."""

import pytest
import torch
from conftest import TOLERANCE, relative_error

from fura_rl.benchmark.models import SIZES, random_model
from fura_rl.benchmark.sync import METHODS, payload_row
from fura_rl.sync import factors, payload
from fura_rl.sync.factors import RULES, Factors, cut_to_rows, fold_slice, stacked
from fura_rl.sync.fold import BaseSlices, checkpoint_weights

OUT, IN, BLOCK, RANK, EXPERTS = 48, 64, 8, 4, 3


def make_factors(rule):
    shapes = {
        "weight": (OUT, IN),
        "update": ((IN if rule == "block_columns" else OUT) // BLOCK, BLOCK, BLOCK),
        "up": (OUT, RANK),
        "down": (RANK, IN),
        "scale": (OUT,),
    }
    if rule == "stacked_low_rank":
        shapes |= {"up": (EXPERTS, OUT // EXPERTS, RANK), "down": (EXPERTS, RANK, IN)}
    return Factors(rule, {name: torch.randn(shapes[name]) for name in RULES[rule].names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [1, factors.CPU_PIECE_BYTES])
@pytest.mark.parametrize("rule", RULES)
def test_scattered_rows_of_several_weights_are_folded_as_in_the_whole_weights(rule, piece_bytes, dtype, monkeypatch):
    monkeypatch.setattr(factors, "CPU_PIECE_BYTES", piece_bytes)
    bases, adapters = (
        [BaseSlices(torch.randn(OUT, IN).to(dtype)) for _ in range(3)],
        [make_factors(rule) for _ in "abc"],
    )
    spans = (1, 4), (13, 20), (47, 48)
    wholes = []
    for read, adapter in zip(bases, adapters, strict=True):
        wholes.append(torch.empty(OUT, IN, dtype=dtype))
        fold_slice(read, adapter, (0, OUT), (0, IN), wholes[-1])
        assert relative_error(wholes[-1], read.base) > 0.1, "it must move"
    cut = stacked([cut_to_rows(*both, spans, IN) for both in zip(bases, adapters, strict=True)])
    rows, parts = torch.stack([read.rows(spans) for read in bases]), torch.empty(3, 11, IN, dtype=dtype)
    fold_slice(lambda *_: rows, cut, (0, 11), (0, IN), parts)
    expected = torch.stack([torch.cat([whole[slice(*span)] for span in spans]) for whole in wholes])
    assert relative_error(parts, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("piece_bytes", [1, factors.CPU_PIECE_BYTES])
def test_column_blocks_fold_into_a_weight_that_lies_column_by_column(piece_bytes, monkeypatch):
    monkeypatch.setattr(factors, "CPU_PIECE_BYTES", piece_bytes)
    base, adapter = BaseSlices(torch.randn(OUT, IN)), make_factors("block_columns")
    by_rows, by_columns, fused = torch.empty(OUT, IN), torch.empty(IN, OUT).mT, torch.zeros(IN, 2 * OUT).mT
    for out in (by_rows, by_columns, fused[:OUT]):
        fold_slice(base, adapter, (0, OUT), (0, IN), out)
    for out in (by_columns, fused[:OUT]):
        assert relative_error(out, by_rows) < TOLERANCE[torch.float32]
    assert fused[OUT:].eq(0).all()
    still = Factors("block_columns", {"update": torch.zeros_like(adapter.tensors["update"])})
    fold_slice(base, still, (0, OUT), (0, IN), by_columns)
    assert torch.equal(by_columns, base.base), "an adapter that has not moved changes no bit"


@pytest.mark.parametrize("method", METHODS)
def test_payload_by_arithmetic_is_what_a_16_bit_engine_is_sent(method):
    from peft import get_peft_model

    policy = get_peft_model(random_model("tiny", torch.device("cpu"), torch.float32), METHODS[method]())
    updates = {weight.name: weight.factors() for weight in checkpoint_weights(policy) if weight.layer is not None}
    chunks = [payload.decode(chunk.data, chunk.checksum) for chunk in payload.encode(updates, torch.bfloat16)]
    sent = sum(adapter.nbytes for chunk in chunks for adapter in chunk.values())
    assert sent / 1e6 == payload_row("tiny", method)["payload_mb"]


@pytest.mark.parametrize("size", [size for size in SIZES if size in ("qwen3-1.7b", "7b")])
def test_furas_payload_on_real_shapes_is_a_few_percent_of_the_weights(size):
    assert payload_row(size, "fura")["payload_frac"] <= 0.032
