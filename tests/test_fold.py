"""The fold, for every adapter method of the table: what it serves is what the policy computes, and W is not written."""

import copy

import pytest
import torch
from conftest import TOLERANCE, perturb_trained, relative_error
from peft import OFTConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from fura_rl.adapters.registry import METHODS, peft_config_for
from fura_rl.sync.fold import checkpoint_weights, folded_weight

ADAPTERS = [name for name, method in METHODS.items() if method.config_class is not None]


def adapted_policy(checkpoint, name, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    config = (
        OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=16)
        if name == "oft"
        else peft_config_for(name, ModelConfig(), None, None)
    )
    model = get_peft_model(model, config)
    perturb_trained(model, 0.3, seed=1)
    return model.eval()


@pytest.mark.parametrize("name", [*ADAPTERS, "oft"])
def test_folded_checkpoint_computes_what_the_policy_computes(tied_checkpoint, name):
    policy = adapted_policy(tied_checkpoint, name)
    plain = AutoModelForCausalLM.from_pretrained(tied_checkpoint, dtype=torch.float32).eval()
    ids = torch.randint(5, 90, (2, 12))
    expected = policy(input_ids=ids).logits
    assert relative_error(plain(input_ids=ids).logits, expected) > 1e-2, "the adapter must change the policy"
    state = {weight.name: weight.value().clone() for weight in checkpoint_weights(policy)}
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}  # tied to the embedding
    assert not unexpected
    plain.tie_weights()
    assert relative_error(plain(input_ids=ids).logits, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", [*ADAPTERS, "oft"])
def test_base_weights_keep_every_bit_and_their_storage_over_many_folds(bfloat16_checkpoint, name):
    policy = adapted_policy(bfloat16_checkpoint, name, torch.bfloat16)
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)][:3]
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [(weight.data_ptr(), weight.detach().clone()) for weight in weights]
    for fold in range(50):
        perturb_trained(policy, 0.1, seed=fold)
        for layer in layers:
            folded_weight(layer)
    for weight, (pointer, bits) in zip(weights, before, strict=True):
        assert weight.data_ptr() == pointer
        assert torch.equal(weight, bits)
    assert not any(layer.merged for layer in layers)


def test_a_fold_of_a_merged_adapter_is_refused_except_for_fura_which_keeps_the_pristine_weight(tied_checkpoint):
    lora, fura = adapted_policy(tied_checkpoint, "lora"), adapted_policy(tied_checkpoint, "fura")
    expected = folded_weight(next(m for m in fura.modules() if isinstance(m, BaseTunerLayer)))
    for policy in (lora, fura):
        policy.merge_adapter()
    with pytest.raises(RuntimeError, match=r"call unmerge_adapter\(\) before a weight sync"):
        folded_weight(next(m for m in lora.modules() if isinstance(m, BaseTunerLayer)))
    assert torch.equal(folded_weight(next(m for m in fura.modules() if isinstance(m, BaseTunerLayer))), expected)


def test_a_failing_merge_leaves_the_base_weight_and_the_adapter_as_they_were(tied_checkpoint, monkeypatch):
    policy = adapted_policy(tied_checkpoint, "lora")
    layer = next(m for m in policy.modules() if isinstance(m, BaseTunerLayer))
    before = copy.deepcopy(layer.get_base_layer().weight.data)

    def fail(*args, **kwargs):
        layer.get_base_layer().weight.data.add_(1)
        raise FloatingPointError

    monkeypatch.setattr(layer, "merge", fail)
    with pytest.raises(FloatingPointError):
        folded_weight(layer)
    assert torch.equal(layer.get_base_layer().weight.data, before)


def test_trained_weights_beside_adapters_are_sent_too(tied_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
    config = peft_config_for("lora", ModelConfig(), ["q_proj"], {"modules_to_save": ["mlp.gate_proj"]})
    policy = get_peft_model(model, config)
    trained = {weight.name for weight in checkpoint_weights(policy) if weight.trained}
    layers = model.config.num_hidden_layers
    assert trained == {
        f"model.layers.{i}.{name}.weight" for i in range(layers) for name in ("self_attn.q_proj", "mlp.gate_proj")
    }
