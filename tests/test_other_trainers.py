"""FuRA beyond GRPO: TRL's SFT and DPO trainers, a vision-language model, quantized policies in the real script."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from preloaded import said
from test_end_to_end import SCRIPT, SHORT, run
from transformers import AutoModelForCausalLM

from fura_rl import FuraConfig
from fura_rl.adapters.fura_tuner import fura_layers
from fura_rl.quickstart import BASE_MODEL

pytestmark = pytest.mark.slow
OPTIONS = {
    "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "logging_steps": 1, "report_to": "none",
    "use_cpu": True, "bf16": False, "save_strategy": "no", "gradient_checkpointing": False,
}  # fmt: skip


def sums(n):
    return [(f"What is {a} + 11?", f"\\boxed{{{a + 11}}}") for a in range(10, 10 + n)]


def assert_trained(trainer, loss="loss"):
    """The loss fell, and a base weight did not move."""
    losses = [entry[loss] for entry in trainer.state.log_history if loss in entry]
    assert losses[-1] < losses[0]
    fresh = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    for layer in fura_layers(trainer.model):
        assert torch.equal(layer.base_layer.weight.cpu(), fresh.get_submodule(layer.layer_name).weight)


def test_sft(tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": question, "completion": answer} for question, answer in sums(64)]
    args = SFTConfig(output_dir=str(tmp_path), model_init_kwargs={"dtype": "float32"}, max_length=64, **OPTIONS)
    trainer = SFTTrainer(str(BASE_MODEL), args=args, train_dataset=Dataset.from_list(rows), peft_config=FuraConfig())
    trainer.train()
    assert_trained(trainer)
    trainer.save_model(str(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.arange(5, 25)[None]
    trainer.model.eval()
    assert torch.allclose(loaded(ids).logits, trainer.model(ids).logits, atol=1e-4)


def test_dpo(tmp_path):
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": q, "chosen": right, "rejected": "\\boxed{0}"} for q, right in sums(64)]
    args = DPOConfig(output_dir=str(tmp_path), model_init_kwargs={"dtype": "float32"}, max_length=64, **OPTIONS)
    trainer = DPOTrainer(str(BASE_MODEL), args=args, train_dataset=Dataset.from_list(rows), peft_config=FuraConfig())
    trainer.train()
    assert_trained(trainer)


def test_the_language_tower_of_a_vision_language_model():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63, image_seq_length=4)
    model = LlavaForConditionalGeneration(config)
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = get_peft_model(model, FuraConfig(target_modules=targets, block_axis_pattern={"(q|k|v)_proj": "out"}))
    assert len(fura_layers(model)) == 2 * 7
    assert not any("vision" in layer.layer_name for layer in fura_layers(model))
    axes = {layer.layer_name.rpartition(".")[2]: layer.fura_core["default"].axis for layer in fura_layers(model)}
    assert {name for name, axis in axes.items() if axis == "out"} == {"q_proj", "k_proj", "v_proj"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.cat([torch.full((4, 4), 63), torch.randint(3, 60, (4, 12))], dim=1)
    labels = ids.masked_fill(ids == 63, -100)
    pixels = torch.randn(4, 3, 16, 16)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    "options",
    [
        ["--load_in_4bit", "true", "--adapter_kwargs", '{"singular_values": "split"}'],
        ["--adapter_kwargs", '{"form": "core", "quantize_core": "nf4", "block_axis": "out"}'],
    ],
    ids=["FuRA on a 4-bit base, S split", "QFuRA, row blocks"],
)
def test_grpo_with_other_storage_and_settings(options, tmp_path):
    """Every sync of the run is probed, so a run that ends is a run whose engine served the folded policy."""
    assert "4 steps in" in said(SCRIPT, *SHORT, *options, "--sync_probe_every", 1, "--output_dir", tmp_path)


def test_every_benchmark_runs_on_tiny_shapes(tmp_path):
    import json
    import sys

    from conftest import REPOSITORY

    command = [sys.executable, str(REPOSITORY / "launch" / "benchmark.py"), "all", "--device", "cpu"]
    run([*command, "--sizes", "tiny", "--tokens", "64", "--repeats", "3", "--steps", "50", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert set(results) == {"layer", "convert", "model", "fold", "quantize", "sync", "step"}
    assert (tmp_path / "layer.png").stat().st_size > 10_000
    saved = {row["layer"]: row["saved_mb"] for row in results["layer"] if row["shape"] == "64->128"}
    assert saved["frozen"] == 0 < saved["fura"] < saved["paper"]


def test_a_short_soak_sees_its_run(tmp_path):
    import json
    import sys

    from conftest import REPOSITORY

    command = [sys.executable, str(REPOSITORY / "launch" / "benchmark.py"), "soak", "--device", "cpu"]
    run([*command, "--steps", "4", "--out", str(tmp_path)])
    rows = {row["what"]: row for row in json.loads((tmp_path / "benchmark.json").read_text())["results"]["soak"]}
    assert rows["trainer: memory, MB"]["most"] > 500
    assert rows["trainer: open files"]["most"] > 10
    assert rows["step, s"]["most"] > 0
    assert (tmp_path / "soak" / "soak.png").stat().st_size > 10_000
