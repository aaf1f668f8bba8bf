"""Policy and engine in one storage.  vLLM's CPU engine packs its weights, so its own fallback kernel is asked for here:
with it the engine keeps them in the checkpoint's layout, as on a GPU."""

import pytest
import torch
from conftest import PARITY_NATS, REPOSITORY, leave_weights_unpacked, perturb_trained, start_llm
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from fura_rl.adapters.registry import peft_config_for
from fura_rl.config import parse_arguments
from fura_rl.run import finish, prepare_run, train
from fura_rl.sync.factors import fold_slice
from fura_rl.sync.fold import BaseSlices, checkpoint_weights
from fura_rl.sync.probe import StaleEngineError
from fura_rl.sync.single_copy import SingleCopyEngine
from fura_rl.sync.vllm_model import PoisonedEngineError
from fura_rl.sync.weight_sync import WeightSync

PROBE = list(range(3, 40))
OPTIONS = [
    *("--config", str(REPOSITORY / "configs" / "quickstart.yaml"), "--max_steps", "4", "--eval_problems", "8"),
    *("--per_device_train_batch_size", "32", "--save_steps", "2", "--learning_rate", "1e-2"),
]


@pytest.fixture(scope="module", autouse=True)
def unpacked():
    with pytest.MonkeyPatch.context() as patch:
        leave_weights_unpacked(patch)
        yield


@pytest.fixture(scope="module")
def engines(tied_checkpoint, untied_checkpoint):
    return {folder: start_llm(folder) for folder in (tied_checkpoint, untied_checkpoint)}


@pytest.fixture
def share(engines):
    """An engine on the storage that it shares with a policy; it lets the next test's policy have it."""
    made = []

    def make(folder, policy):
        made.append(SingleCopyEngine(engines[folder], policy))
        return made[-1]

    yield make
    for engine in made:
        engine.model.poisoned = None


def policy_of(adapter, folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = peft_config_for(adapter, ModelConfig(), None, None)
    return model if config is None else get_peft_model(model, config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", ["fura", "svd", "lora", "dora", "pissa", "oft", "hira", "randlora", "miss"])
def test_one_copy_serves_rollouts_and_training_in_turn(share, tied_checkpoint, untied_checkpoint, adapter, tied):
    folder = tied_checkpoint if tied else untied_checkpoint
    policy = policy_of(adapter, folder)
    base = {weight.name: weight.parameter.detach().clone() for weight in checkpoint_weights(policy)}
    engine = share(folder, policy)
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    of_engine = {p.untyped_storage().data_ptr() for p in engine.model.model.parameters()}
    for step in range(4):
        perturb_trained(policy, 0.1, seed=step)
        report = sync.sync()
        assert report.probe_max_gap < PARITY_NATS
        assert report.audit_gain_min is None or report.audit_gain_min == pytest.approx(1.0, abs=0.01)
        engine.restore()
        for weight in checkpoint_weights(policy):
            assert weight.parameter.untyped_storage().data_ptr() in of_engine, weight.name
            assert torch.equal(weight.parameter, base[weight.name]), weight.name


@pytest.mark.parametrize("adapter", ["fura", "lora", "dora", "hira"])
def test_a_fold_in_place_is_the_fold_into_another_tensor(bfloat16_checkpoint, adapter):
    policy = policy_of(adapter, bfloat16_checkpoint, torch.bfloat16)
    base = {weight.name: weight.parameter.detach().clone() for weight in checkpoint_weights(policy)}
    sync = WeightSync(policy, SingleCopyEngine(start_llm(bfloat16_checkpoint, "bfloat16"), policy), PROBE)
    perturb_trained(policy, 0.1, seed=0)
    sync.sync()
    for weight in checkpoint_weights(policy):
        if weight.trained:
            pristine, (rows, columns) = base[weight.name], weight.shape
            expected = torch.empty_like(pristine)
            weight.parameter.data, live = pristine, weight.parameter.data  # DoRA's scale is that of its base
            fold_slice(BaseSlices(pristine), weight.factors(), (0, rows), (0, columns), expected)
            weight.parameter.data = live
            assert torch.equal(live, expected), weight.name


@pytest.mark.parametrize("times", [1, 2])
def test_a_failing_probe_is_sent_once_more_from_the_base_weights(share, tied_checkpoint, monkeypatch, times):
    policy = policy_of("dora", tied_checkpoint)  # its scale is made from the base weights
    engine = share(tied_checkpoint, policy)
    sync = WeightSync(policy, engine, PROBE, probe_every=1, audit_every=0)
    sync.sync()
    perturb_trained(policy, 0.2, seed=0)
    write, skipped = engine.model._write_module, []

    def skips(module, *args):
        if module == "model.layers.1.self_attn.o_proj" and len(skipped) < times:
            skipped.append(module)
        else:
            write(module, *args)

    monkeypatch.setattr(engine.model, "_write_module", skips)
    if times == 1:
        assert sync.sync().probe_max_gap < PARITY_NATS
    else:
        with pytest.raises(
            StaleEngineError, match=r"an audit finds 1 of 14 modules stale: .*layers\.1\.self_attn\.o_proj"
        ):
            sync.sync()
    engine.restore()
    assert sync.sync().probe_max_gap < PARITY_NATS, "and the policy has its base weights"


def test_the_engine_refuses_to_generate_while_the_policy_has_its_weights(share, tied_checkpoint):
    policy = policy_of("fura", tied_checkpoint)
    engine = share(tied_checkpoint, policy)
    sync = WeightSync(policy, engine, PROBE)
    sync.sync()
    policy(torch.tensor([PROBE]))  # takes them back unasked
    with pytest.raises(PoisonedEngineError, match="the policy's base weights while the policy computes; sync it again"):
        engine.model.model(None)
    perturb_trained(policy, 0.1, seed=0)
    assert sync.sync().audit_gain_min == pytest.approx(1.0, abs=0.01)
    assert engine.model.poisoned is None


def test_a_push_that_fails_gives_the_policy_its_weights_back(share, tied_checkpoint, monkeypatch):
    policy = policy_of("lora", tied_checkpoint)
    engine = share(tied_checkpoint, policy)
    sync = WeightSync(policy, engine, PROBE)
    sync.sync()
    expected = policy(torch.tensor([PROBE])).logits
    write, written = engine.model._write_module, []

    def breaks(module, *args):
        if len(written) == 3:
            raise OSError("no space left")
        written.append(module)
        write(module, *args)

    perturb_trained(policy, 0.1, seed=0)
    monkeypatch.setattr(engine.model, "_write_module", breaks)
    with pytest.raises(OSError, match="no space"):
        sync.sync()
    with policy.disable_adapter():
        base = policy(torch.tensor([PROBE])).logits
    torch.testing.assert_close(base, expected)  # LoRA starts at the base
    assert engine.model.poisoned


@pytest.mark.parametrize(
    ("adapter", "dtype", "reason"),
    [
        ("qfura", torch.float32, r"q_proj\.weight is not held as the plain weight"),
        ("full", torch.float32, r"weight is trained itself, not through an adapter"),
        (
            "lora",
            torch.bfloat16,
            r"q_proj\.weight is torch\.bfloat16, the engine's torch\.float32: --dtype and --vllm_dtype differ",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(share, tied_checkpoint, adapter, dtype, reason):
    policy = policy_of(adapter, tied_checkpoint, dtype)
    with pytest.raises(ValueError, match=rf"vllm_share_weights=true, but \d+ trained weights .*{reason}"):
        WeightSync(policy, share(tied_checkpoint, policy), PROBE)


def test_a_cpu_engine_that_packs_its_weights_is_refused(tied_checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm._custom_ops._supports_onednn", True)
        llm = start_llm(tied_checkpoint)
    policy = policy_of("fura", tied_checkpoint)
    with pytest.raises(ValueError, match=r"14 trained weights .*in another layout \(an engine on a CPU packs"):
        WeightSync(policy, SingleCopyEngine(llm, policy), PROBE)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--vllm_enable_sleep_mode", "true"], "vllm_enable_sleep_mode discards them"),
        (["--vllm_mode", "server"], "vllm_mode='server' has its weights in another process"),
        (["--vllm_tensor_parallel_size", "2"], "vllm_tensor_parallel_size=2 cuts them up"),
        (["--adapter", "full"], "full fine-tuning moves the base weights"),
    ],
)
def test_settings_under_which_nothing_can_be_shared_are_refused(options, fault, tmp_path):
    arguments = [*OPTIONS, "--vllm_share_weights", "true", *options, "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=fault):
        prepare_run(parse_arguments(arguments))


@pytest.mark.slow
def test_a_run_on_one_copy_is_the_run_on_two(tmp_path):
    """Training, and held-out problems before and after it."""
    runs = {}
    for shared in ("false", "true"):
        folder = tmp_path / shared
        run = prepare_run(parse_arguments([*OPTIONS, "--vllm_share_weights", shared, "--output_dir", str(folder)]))
        train(run)
        assert finish(run) == 0
        policy = run.trainer.accelerator.unwrap_model(run.trainer.model)
        numbers = [(entry["loss"], entry["reward"]) for entry in run.trainer.state.log_history if "loss" in entry]
        runs[shared] = numbers, run.before, {name: p.detach().clone() for name, p in policy.named_parameters()}
    assert isinstance(run.trainer.weight_sync.engine, SingleCopyEngine)
    assert runs["true"][:2] == runs["false"][:2]
    assert all(torch.equal(p, runs["false"][2][name]) for name, p in runs["true"][2].items()), "base weights too"
