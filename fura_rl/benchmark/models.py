"""Model shapes to measure on: real sizes with random weights, nothing to download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512,
    },
    "3m": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 512,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064,
    },
}  # fmt: skip


def decoder_projections(hidden: int, intermediate: int, queries: int, keys: int) -> tuple[tuple[int, int], ...]:
    """(out_features, in_features) of a decoder layer's seven projections: q, k, v, o, gate, up, down.

    `queries` and `keys` are heads x head_dim.
    """
    q, k = (queries, hidden), (keys, hidden)
    return q, k, k, (hidden, queries), (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)


def projection_shapes(size: str) -> tuple[tuple[int, int], ...]:
    """`decoder_projections` of one of SIZES."""
    s = SIZES[size]
    queries, keys = (s[heads] * s["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    return decoder_projections(s["hidden_size"], s["intermediate_size"], queries, keys)


def layer_shapes(size: str) -> tuple[tuple[int, int], ...]:
    """The distinct ones of `projection_shapes`, in that order."""
    return tuple(dict.fromkeys(projection_shapes(size)))


def tied(size: str) -> bool:
    """Whether the output head is the embedding, as in the released models of these sizes."""
    return SIZES[size]["hidden_size"] < 3000


def random_model(
    size: str, device: torch.device, dtype: torch.dtype, decoder_layers: int | None = None
) -> PreTrainedModel:
    """A Qwen3 of that size with random weights; of its first `decoder_layers` only where that is given."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = {"tie_word_embeddings": tied(size), "max_position_embeddings": 4096} | SIZES[size]
    settings["num_hidden_layers"] = decoder_layers or settings["num_hidden_layers"]
    config = Qwen3Config(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM._from_config(config, dtype=dtype)
