"""Which adapters move their base weight when they are made: what PEFT does, against what the weight sync knows of."""

import inspect
import re
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import TOLERANCE, relative_error
from peft import LoftQConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from fura_rl.adapters.registry import METHODS, peft_config_for
from fura_rl.sync.fold import checkpoint_weights
from fura_rl.sync.remote_engine import Follower
from fura_rl.sync.shifted_base import shifts_its_base
from fura_rl.sync.weight_sync import WeightSync

TARGETS = ["q_proj", "down_proj"]
TOKENS = torch.arange(3, 35)[None]
# PEFT tells them in two places, neither of them whole
ANNOTATED = {name for part in get_args(get_type_hints(LoraConfig)["init_lora_weights"]) for name in get_args(part)}
HANDLED = re.findall(r'init_lora_weights\S*? ?(?:==|startswith)\W+(\w+)"', inspect.getsource(LoraLayer.update_layer))
STARTS = sorted({name.replace("[number of iters]", "4") for name in {*ANNOTATED, *HANDLED}})
SETTINGS = {
    "corda": {"corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
    "loftq": {"loftq_config": LoftQConfig()},
}


def test_the_starts_of_lora_are_read_from_peft():
    assert {"pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "eva", "mica", "orthogonal"} <= set(STARTS)


@pytest.mark.parametrize("start", [True, False, *STARTS])
def test_the_sync_knows_which_starts_of_lora_move_the_base_weight(start, tied_checkpoint):
    if start == "loftq" and not torch.cuda.is_available():
        pytest.skip("PEFT quantizes for LoftQ on a GPU only")
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
    config = LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=start, **SETTINGS.get(start, {}))
    if start == "corda":
        preprocess_corda(model, config, run_model=lambda: model(TOKENS))
    if start == "lora_ga":
        preprocess_loraga(model, config, lambda: model(TOKENS, labels=TOKENS).loss.backward())
    check_that_the_sync_knows(model, config)


@pytest.mark.parametrize("method", METHODS)
def test_the_sync_knows_which_methods_move_the_base_weight(method, tied_checkpoint):
    config = peft_config_for(method, ModelConfig(lora_r=4), TARGETS, None)
    if config is not None:
        check_that_the_sync_knows(AutoModelForCausalLM.from_pretrained(tied_checkpoint), config)


def check_that_the_sync_knows(model, config):
    """And that it finds the checkpoint's weight again."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    policy = get_peft_model(model, config)
    adapted = [
        weight for weight in checkpoint_weights(policy) if weight.layer is not None and weight.holds_the_checkpoints
    ]
    for weight in adapted:
        moved = not torch.equal(weight.parameter, before[weight.name])
        assert shifts_its_base(weight.layer, policy.peft_config) == moved, weight.name
    sync = WeightSync(policy, Follower(torch.float32), [1, 2])
    for weight in adapted:
        found = sync._checkpoint_read(weight)(*((0, size) for size in weight.shape))
        assert relative_error(found, before[weight.name]) < TOLERANCE[torch.float32], weight.name


def test_a_base_that_was_quantized_when_the_adapter_was_made_is_refused_where_the_engine_reads_its_own(tied_checkpoint):
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tied_checkpoint), LoraConfig(target_modules=TARGETS, r=4)
    )
    policy.peft_config["default"].init_lora_weights = "loftq"  # PEFT makes it on a GPU only
    with pytest.raises(NotImplementedError, match=r"q_proj\.weight: the adapter moved its base .*vllm_mode=colocate"):
        WeightSync(policy, Follower(torch.float32), [1, 2])
