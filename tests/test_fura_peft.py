"""FuRA as a PEFT method: the oracle, and what PEFT users expect of any adapter."""

import copy
import enum
import warnings

import peft.mapping
import pytest
import torch
from conftest import TOLERANCE, relative_error
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from fura_rl import FuraConfig
from fura_rl.adapters.registration import register
from fura_rl.benchmark import measure


class TwoLayers(nn.Module):
    def __init__(self, in_features=24, out_features=16, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(in_features, out_features, dtype=dtype)
        self.second = nn.Linear(out_features, 3, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_at_the_start_is_bit_for_bit_the_base_models(dtype, axis):
    base = TwoLayers(dtype=dtype)
    x = torch.randn(7, 24, dtype=dtype)
    expected = base(x)
    config = FuraConfig(target_modules=["first", "second"], block_axis=axis)
    assert torch.equal(get_peft_model(base, config)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_equals_forward_and_unmerge_restores_every_bit(dtype):
    base = TwoLayers(dtype=dtype)
    model = get_peft_model(base, FuraConfig(target_modules=["first"], init_weights=False))
    layer = model.base_model.model.first
    before = layer.base_layer.weight.detach().clone()
    x = torch.randn(7, 24, dtype=dtype)
    adapted = model(x)
    model.merge_adapter()
    assert not torch.equal(layer.base_layer.weight, before)
    assert relative_error(model(x), adapted) < TOLERANCE[dtype]
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    with model.disable_adapter():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, before, layer.base_layer.bias))


def test_two_active_adapters_add_their_updates():
    model = get_peft_model(TwoLayers(), FuraConfig(target_modules=["first"], init_weights=False))
    model.add_adapter("other", FuraConfig(target_modules=["first"], init_weights=False, block_size=4))
    layer = model.base_model.model.first
    layer.set_adapter(["default", "other"])
    x = torch.randn(7, 24)
    weight = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert relative_error(layer(x), torch.nn.functional.linear(x, weight, layer.base_layer.bias)) < 1e-5


@pytest.mark.parametrize("save_basis", [True, False])
def test_a_saved_adapter_gives_the_same_outputs_when_loaded(tmp_path, save_basis):
    base = TwoLayers()
    model = get_peft_model(
        copy.deepcopy(base), FuraConfig(target_modules=["first"], init_weights=False, save_basis=save_basis)
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(7, 24)
    assert relative_error(loaded(x), model(x)) < TOLERANCE[torch.float32]


def test_adapter_file_holds_twice_the_trained_numbers_with_the_basis_and_little_more_than_once_without(tmp_path):
    sizes = {}
    for save_basis in (True, False):
        config = FuraConfig(target_modules=["first"], save_basis=save_basis)
        model = get_peft_model(TwoLayers(256, 256), config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.save_pretrained(tmp_path / str(save_basis))
        stored = (tmp_path / str(save_basis) / "adapter_model.safetensors").stat().st_size
        sizes[save_basis] = stored / (4 * trained)
    assert sizes[True] == pytest.approx(2.0, abs=0.05)
    assert sizes[False] == pytest.approx(1.0, abs=0.1)


def test_an_adapter_without_basis_is_refused_on_another_base(tmp_path):
    model = get_peft_model(TwoLayers(), FuraConfig(target_modules=["first"], save_basis=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="do not match this base weight"):
        PeftModel.from_pretrained(TwoLayers(), tmp_path)


def test_the_basis_stays_in_float32_when_the_model_is_cast():
    model = get_peft_model(TwoLayers(), FuraConfig(target_modules=["first"]))
    core = model.base_model.model.first.fura_core["default"]
    basis = core.basis_v.clone()
    model.to(torch.bfloat16)
    assert core.delta_r.dtype == torch.bfloat16
    assert core.basis_v.dtype == torch.float32
    assert torch.equal(core.basis_v, basis)


def test_default_targets_of_qwen3_are_the_papers_seven_projections(tied_checkpoint):
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied_checkpoint), FuraConfig())
    adapted = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad and "delta_r" in name}
    projections = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m).__name__ == "FuraLinear"}
    assert projections == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted == {"fura_core"}


def test_a_block_size_that_does_not_divide_names_layer_sizes_and_mend():
    with pytest.raises(ValueError, match=r"block_size=7 does not divide in_features=24 of first; use one of 4, 6, 8"):
        get_peft_model(TwoLayers(), FuraConfig(target_modules=["first"], block_size=7))


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="nonexistent"):
        get_peft_model(TwoLayers(), FuraConfig(target_modules=["nonexistent"]))


def test_all_faults_of_a_config_come_in_one_message():
    with pytest.raises(ValueError, match=r"basis='pca' is not one of.*block_size=0.*needs form='core'"):
        FuraConfig(quantize_core="nf4", basis="pca", block_size=0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"basis": "qr"}, "no singular values to keep apart, so singular_values='train'"),
        ({"basis": "random", "singular_values": "merge_trained"}, "use form='core'"),
        ({"basis": "qr", "singular_values": "merge_trained", "save_basis": False}, "use save_basis=True"),
        ({"basis": "qr", "singular_values": "merge_trained", "form": "core", "train_core": "large"}, "use train_core"),
        ({"train_core": "large"}, "holds no large core"),
        ({"form": "core", "train_core": "both", "singular_values": "merge_frozen"}, "use 'train', 'freeze' or 'split'"),
        ({"quantize_core": "nf4"}, "needs form='core'"),
        ({"quantize_core": "nf4", "form": "core", "train_core": "large"}, "freezes the large core"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "use target_modules"),
        ({"block_size_pattern": {"q_proj": -1}}, r"block_size_pattern\['q_proj'\]=-1"),
        ({"block_axis_pattern": {"q_proj": "rows"}}, r"block_axis_pattern\['q_proj'\]='rows'"),
        (
            {"block_size_pattern": None},
            r"block_size_pattern=None is not a dict from module names to values; leave it out",
        ),
        ({"block_axis_pattern": ["q_proj"]}, r"block_axis_pattern=\['q_proj'\] is not a dict"),
        (
            {"block_size_pattern": {"*_proj": 8}, "block_axis_pattern": {"(q|k_proj": "out"}},
            r"block_size_pattern, '\*_proj', is no .*nothing to repeat.*; .*block_axis_pattern, '\(q\|k_proj', is no",
        ),
        ({"block_size_pattern": {"(?i)q_proj": 8}}, "global flags not at the start"),
        ({"target_modules": "*_proj"}, r"target_modules, '\*_proj', is no regular expression .* e\.g\. '\.\*_proj'"),
        ({"exclude_modules": "layers.[0"}, r"exclude_modules, 'layers\.\[0', is no regular"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        FuraConfig(**settings)


def test_modules_fura_cannot_adapt_are_refused_by_name():
    model = nn.Sequential()
    model.add_module("table", nn.Embedding(5, 4))
    with pytest.raises(TypeError, match=r"table is a Embedding; FuRA adapts linear layers"):
        get_peft_model(model, FuraConfig(target_modules=["table"]))


def test_non_finite_base_weights_are_refused():
    model = TwoLayers()
    model.first.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="first has non-finite values"):
        get_peft_model(model, FuraConfig(target_modules=["first"]))


def test_weights_whose_norm_overflows_are_finite_all_the_same():
    model = TwoLayers(dtype=torch.float16)
    model.first.weight.data.fill_(6e4)
    assert torch.linalg.vector_norm(model.first.weight).isinf()
    get_peft_model(model, FuraConfig(target_modules=["first"]))


def test_adapting_a_layer_takes_a_fraction_of_it_beyond_the_adapter():
    model = TwoLayers(4096, 1024, dtype=torch.bfloat16)
    policies = []
    peak = measure.peak_bytes(
        lambda: policies.append(get_peft_model(model, FuraConfig(target_modules=["first"]))), torch.device("cpu")
    )
    core = policies[0].base_model.model.first.fura_core["default"]
    adapter = sum(t.nbytes for t in core.state_dict().values())
    assert peak - adapter < model.first.weight.nbytes / 2


def test_prime_dimensions_warn_and_rank_deficient_blocks_are_counted():
    with pytest.warns(UserWarning, match="in_features=13 has no factor pair"):
        get_peft_model(TwoLayers(13, 16), FuraConfig(target_modules=["first"]))
    model = TwoLayers()
    model.first.weight.data[:, 0] = 0
    with pytest.warns(UserWarning, match="1 block directions have no pretrained column"):
        get_peft_model(model, FuraConfig(target_modules=["first"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(TwoLayers(), FuraConfig(target_modules=["first"]))


def test_a_name_or_a_prefix_that_another_package_has_is_refused():
    class Kind(enum.StrEnum):
        TAKEN, NEW = "FURA", "SOME_OTHER"

    class OtherConfig(PeftConfig):
        pass

    class OtherTuner(BaseTuner):
        prefix = "fura_"

    before = dict(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    with pytest.raises(KeyError, match="another package has registered a PEFT method called 'FURA'"):
        register(Kind.TAKEN, OtherConfig, OtherTuner)
    with pytest.raises(KeyError, match="the parameter prefix 'fura_' belongs to another"):
        register(Kind.NEW, OtherConfig, OtherTuner)
    assert before == peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
