"""A tiny stand-in for a real model: the same architecture, two narrow layers, random weights, the embedded tokenizer.

`--dry_run` trains one step on it, so that a config can be tried end to end on any machine before the real model is
downloaded.
"""

from __future__ import annotations

from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, set_seed

from fura_rl.quickstart import BASE_MODEL

NARROW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that every attention kernel of the CPU engine takes
    "max_position_embeddings": 512,
    "max_window_layers": 2,
}


def architecture_of(name: str) -> PreTrainedConfig:
    """The config of a model, from its checkpoint or the hub; without a network, the default of the named family.

    Raises:
        ValueError: where the name tells no architecture either.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        plain = name.rpartition("/")[2].lower().replace("-", "").replace("_", "").replace(".", "")
        families = [kind for kind in CONFIG_MAPPING if plain.startswith(kind.replace("_", ""))]
        if not families:
            raise ValueError(
                f"model_name_or_path={name!r} cannot be reached and its name tells no architecture: {error}"
            ) from error
        return CONFIG_MAPPING[max(families, key=len)]()


def make_stand_in(name: str, output_dir: Path, dtype: str | None = None) -> Path:
    """Write the stand-in checkpoint for model `name` and return its folder."""
    config = architecture_of(name)
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    for key, value in NARROW.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * NARROW["num_hidden_layers"]
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or "float32")
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return output_dir
