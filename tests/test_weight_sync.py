"""Weight sync into a real vLLM engine of this process: parity after many syncs, and alarms when something is wrong."""

import pytest
import torch
from conftest import PARITY_NATS, make_tiny_checkpoint, perturb_trained, relative_error, start_llm
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import ModelConfig
from vllm import SamplingParams

from fura_rl.adapters.fura_tuner import fura_layers
from fura_rl.adapters.registry import METHODS, peft_config_for
from fura_rl.sync import audit_schedule, checkpoint_names, probe, update_watch, weight_sync
from fura_rl.sync.audit import KernelAudit
from fura_rl.sync.audit_schedule import AuditSchedule
from fura_rl.sync.base_weights import BaseWeights
from fura_rl.sync.factors import Factors
from fura_rl.sync.fold import checkpoint_weights
from fura_rl.sync.remote_engine import Follower
from fura_rl.sync.shifted_base import relative_to_start
from fura_rl.sync.update_watch import UpdateCosine
from fura_rl.sync.vllm_engine import InProcessEngine, find_model_runner
from fura_rl.sync.weight_sync import WeightSync

PROBE = list(range(5, 45))
PROMPT = "<|user|>What is 27 + 15?<|end|><|assistant|>27+15=42 \\boxed{42}"


@pytest.fixture(scope="module")
def engines(tied_checkpoint, untied_checkpoint, bfloat16_checkpoint, tmp_path_factory):
    """One live engine per checkpoint, started when first asked for."""
    one_layer = make_tiny_checkpoint(
        tmp_path_factory.mktemp("one_layer"), tied=True, dtype=torch.bfloat16, num_hidden_layers=1
    )
    folders = {
        "tied": tied_checkpoint, "untied": untied_checkpoint, "bfloat16": bfloat16_checkpoint,
        "bfloat16, one layer": one_layer,
    }  # fmt: skip
    started = {}

    def get(name):
        if name not in started:
            dtype = "bfloat16" if name.startswith("bfloat16") else "float32"
            started[name] = InProcessEngine(start_llm(folders[name], dtype, block_size=32))
        return started[name], folders[name]

    return get


def leave_out(sync, monkeypatch, skipped, times=2):
    """A fault: the engine does not write the modules for which `skipped(module)`, the first `times` times."""
    write, calls = sync.engine.model._write_module, []

    def faulty(module, *args):
        calls.append(module)
        if not (skipped(module) and calls.count(module) <= times):
            write(module, *args)

    monkeypatch.setattr(sync.engine.model, "_write_module", faulty)


def make_sync(engine, folder, adapter, targets=None, dtype=torch.float32, adapter_kwargs=None, **loading):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **loading)
    config = peft_config_for(adapter, ModelConfig(), targets, adapter_kwargs)
    policy = model if config is None else get_peft_model(model, config)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    sync = WeightSync(policy, engine, tokens, probe_every=1)
    sync.sync(everything=True)  # engines are shared between tests: start from this policy's own weights
    return policy, sync


@pytest.mark.parametrize("checkpoint", ["tied", "untied"])
@pytest.mark.parametrize("adapter", METHODS)
def test_engine_and_trainer_agree_after_many_syncs(engines, checkpoint, adapter):
    policy, sync = make_sync(*engines(checkpoint), adapter)
    start = probe.trainer_logprobs(policy, sync.proof.token_ids)
    for step in range(20):
        perturb_trained(policy, 0.05, seed=step)
        report = sync.sync()
        assert report.probe_max_gap < PARITY_NATS
        assert report.update_cosine == pytest.approx(1.0)
        assert report.audit_gain_min == pytest.approx(1.0, abs=0.01)
        assert report.version == step + 2
    moved = probe.max_gap(start, probe.trainer_logprobs(policy, sync.proof.token_ids))
    assert moved > 200 * PARITY_NATS, "it must move; HiRA's products move least"


def test_rollouts_from_an_engine_that_another_sync_has_written_to_are_refused(engines):
    engine, folder = engines("tied")
    _, sync = make_sync(engine, folder, "fura")
    assert sync.version_served() == sync.version == 1
    _, other = make_sync(engine, folder, "lora")
    other.sync()
    assert other.version_served() == 2
    with pytest.raises(probe.StaleEngineError, match=r"sampled from version 2 of the policy.*to version 1"):
        sync.version_served()


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("adapter", "adapter_kwargs", "quantization", "tolerance"),
    [
        ("fura", {"form": "core"}, None, PARITY_NATS),
        ("fura", {"block_axis": "out"}, None, PARITY_NATS),
        ("fura", {"form": "core", "quantize_core": "nf4"}, None, PARITY_NATS),
        ("fura", None, NF4, PARITY_NATS),
        ("lora", None, NF4, PARITY_NATS),
        # bitsandbytes rounds the activations of an 8-bit product as well, which no engine repeats
        ("fura", None, {"load_in_8bit": True}, 0.1),
    ],
    ids=["core form", "row blocks", "QFuRA", "FuRA on a 4-bit base", "QLoRA", "FuRA on an 8-bit base"],
)
def test_the_engine_serves_folded_weights_of_every_storage(engines, adapter, adapter_kwargs, quantization, tolerance):
    from transformers import BitsAndBytesConfig

    loading = {}
    if quantization:
        options = quantization | ({"bnb_4bit_compute_dtype": "float32"} if "load_in_4bit" in quantization else {})
        loading = {"quantization_config": BitsAndBytesConfig(**options)}
    # q_proj alone is adapted, so its fused siblings and the other quantized layers must come along
    policy, sync = make_sync(
        *engines("untied"), adapter, ["q_proj", "o_proj"], adapter_kwargs=adapter_kwargs, **loading
    )
    sync.version = 0
    start = probe.trainer_logprobs(policy, sync.proof.token_ids)
    for step in range(5):
        perturb_trained(policy, 0.05, seed=step)
        assert sync.sync().probe_max_gap < tolerance
    moved = probe.max_gap(start, probe.trainer_logprobs(policy, sync.proof.token_ids))
    assert moved > 1000 * PARITY_NATS, "it must move"


def test_a_fused_module_arrives_whole_when_only_one_member_is_adapted(engines):
    policy, sync = make_sync(*engines("untied"), "fura", targets=["q_proj", "up_proj"])
    for step in range(5):
        perturb_trained(policy, 0.2, seed=step)
        report = sync.sync()
        assert report.probe_max_gap < PARITY_NATS
    attention = policy.base_model.model.model.layers[0].self_attn
    mlp = policy.base_model.model.model.layers[0].mlp
    members = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
    expected = 2 * 4 * sum(module.weight.numel() for module in members)  # 2 layers, float32
    assert report.payload_bytes == expected, "nothing but the adapted modules and their fused siblings is sent"


FROZEN_BASE = [name for name in METHODS if name not in ("full", "lift")]
SLOW = [name if name == "fura" else pytest.param(name, marks=pytest.mark.slow) for name in FROZEN_BASE]


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_whole_modules_trained_beside_an_adapter_arrive_where_nothing_is_tied(engines, module):
    engine, folder = engines("untied")
    policy, sync = make_sync(engine, folder, "lora", ["q_proj"], adapter_kwargs={"modules_to_save": [module]})
    for step in range(2):
        before = engine.prompt_logprobs(PROBE)
        perturb_trained(policy, 0.1, seed=step)
        assert sync.sync().probe_max_gap < PARITY_NATS
        assert (engine.prompt_logprobs(PROBE) - before).abs().max() > 100 * PARITY_NATS


@pytest.mark.parametrize("adapter", SLOW)
def test_a_bfloat16_base_is_bit_identical_after_a_thousand_syncs(engines, adapter):
    policy, sync = make_sync(*engines("bfloat16, one layer"), adapter, dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    sync.probe_every = 100
    for step in range(1000):
        if step % 50 == 0:
            perturb_trained(policy, 0.05, seed=step)
        sync.sync()
    for name, p in policy.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name]), name


def test_update_cosine_falls_when_the_engine_dtype_swallows_the_update(engines):
    policy, sync = make_sync(*engines("bfloat16"), "fura", dtype=torch.bfloat16)
    cosines = []
    for scale in (1e-4, 1e-1):
        for parameter in policy.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=scale / parameter.shape[-1] ** 0.5)
        cosines.append(sync.sync().update_cosine)
    assert cosines[0] < 0.6 < 0.95 < cosines[1]


def test_weights_that_are_looked_at_one_by_one_look_as_they_do_together(engines, monkeypatch):
    policy, sync = make_sync(*engines("bfloat16"), "fura", dtype=torch.bfloat16)
    sizes = []
    look_at = update_watch.UpdateWatch._look_at
    monkeypatch.setattr(
        update_watch.UpdateWatch,
        "_look_at",
        lambda watch, samples: look_at(watch, samples) or sizes.append(len(samples)),
    )
    found = []
    perturb_trained(policy, 0.05, seed=1)
    for waiting_bytes in (update_watch.CPU_WAITING_BYTES, 0):
        monkeypatch.setattr(update_watch, "CPU_WAITING_BYTES", waiting_bytes)
        found.append(sync.sync())
        sync.proof.audit = KernelAudit()  # the update is counted from the base again
    assert sizes[-14:] == [1] * 14
    assert sum(sizes[:-14]) == 14
    assert len(sizes[:-14]) < 7
    together, one_by_one = found
    assert one_by_one.update_cosine == pytest.approx(together.update_cosine, abs=1e-6)
    assert one_by_one.audit_gain_min == pytest.approx(together.audit_gain_min, abs=1e-6)


@pytest.mark.parametrize("bound", [1, 2, 100])
def test_block_updates_of_one_size_are_made_together_up_to_a_bound(engines, monkeypatch, bound):
    engine, folder = engines("untied")
    policy, sync = make_sync(engine, folder, "fura")
    largest = max(layer.fura_core["default"].basis_v.nbytes for layer in fura_layers(policy))
    monkeypatch.setattr(weight_sync, "CPU_BATCH_BYTES", bound * largest)
    made, make = [], weight_sync.small_factors_together
    monkeypatch.setattr(weight_sync, "small_factors_together", lambda layers: made.append(layers) or make(layers))
    perturb_trained(policy, 1.0, seed=0)
    report = sync.sync()
    assert report.probe_max_gap < PARITY_NATS
    together = [id(layer) for layers in made for layer in layers]
    assert len(set(together)) == len(together), "each once"
    sizes = [sum(layer.fura_core["default"].basis_v.nbytes for layer in layers) for layers in made]
    assert max(sizes, default=0) <= bound * largest
    kinds = {layer.fura_core["default"].update_kind for layer in fura_layers(policy)}
    everything = len(made) == len(kinds) and set(together) == set(map(id, fura_layers(policy)))
    assert everything == (bound == 100)
    assert not sync._ahead, "made and never asked for"


def test_the_small_update_of_a_shifted_base_survives_the_16_bits_that_it_is_sent_in():
    start = Factors("low_rank", {"up": torch.randn(64, 4), "down": torch.randn(4, 48)})
    now = Factors("low_rank", {part: t + 1e-4 * torch.randn_like(t) for part, t in start.tensors.items()})
    exact = now.tensors["up"] @ now.tensors["down"] - start.tensors["up"] @ start.tensors["down"]
    sent = {part: tensor.bfloat16().float() for part, tensor in relative_to_start(now, start).tensors.items()}
    assert relative_error(sent["up"] @ sent["down"], exact) < 1e-2


def test_update_cosine_is_the_cosine():
    cosine, exact, delivered = UpdateCosine(), torch.randn(3, 4), torch.randn(3, 4)
    assert cosine.value() == 1.0
    for row in range(3):
        cosine.add(exact[row], delivered[row])
    expected = torch.nn.functional.cosine_similarity(exact.flatten(), delivered.flatten(), dim=0)
    assert cosine.value() == pytest.approx(expected.item(), rel=1e-5)


def test_the_audit_names_the_one_kernel_left_behind_by_a_small_bfloat16_update(engines, monkeypatch):
    """A relative update of 1.7e-3 in one module of fourteen moves no log-prob beyond bfloat16's own noise."""
    policy, sync = make_sync(*engines("bfloat16"), "fura", dtype=torch.bfloat16)
    for layer in fura_layers(policy):
        core = layer.fura_core["default"]
        core.fit(1.7e-3 / core.block_size**0.5 * torch.randn(core.delta_r.shape[0], *[core.block_size] * 2))
    leave_out(sync, monkeypatch, lambda module: module == "model.layers.1.self_attn.o_proj")
    with pytest.raises(
        probe.StaleEngineError, match=r"1 of 1[34] modules .*twice: model\.layers\.1\.self_attn\.o_proj"
    ):
        sync.sync()
    monkeypatch.undo()
    assert sync.sync().audit_gain_min > 0.7


def test_a_write_that_fails_once_is_repeated(engines, monkeypatch, caplog):
    policy, sync = make_sync(*engines("tied"), "fura")
    perturb_trained(policy, 0.2, seed=0)
    leave_out(sync, monkeypatch, lambda module: module == "model.layers.0.mlp.down_proj", times=1)
    report = sync.sync()
    assert report.audit_gain_min == pytest.approx(1.0, abs=0.01)
    assert report.probe_max_gap < PARITY_NATS
    assert "model.layers.0.mlp.down_proj" in caplog.text


def test_a_sync_of_which_nothing_arrives_is_named_stale_by_the_audit(engines, monkeypatch):
    policy, sync = make_sync(*engines("tied"), "fura")
    perturb_trained(policy, 0.2, seed=0)
    leave_out(sync, monkeypatch, lambda module: True)
    with pytest.raises(probe.StaleEngineError, match=r"14 of 14 modules .*nothing of this sync arrived"):
        sync.sync()


@pytest.fixture
def paid_audits(engines, monkeypatch):
    """A policy and a sync that is audited where `pay()` came before it, the first of them behind it, without probes."""
    monkeypatch.setattr(audit_schedule, "SMALL_COST_SECONDS", 0.0)
    policy, sync = make_sync(*engines("tied"), "fura")
    rollouts = [0.0]
    sync.audits, sync.rollout_seconds = AuditSchedule(None), lambda: rollouts[0]
    sync.probe_every = 10**9
    perturb_trained(policy, 0.2, seed=0)
    assert sync.sync().audit_gain_min == pytest.approx(1.0, abs=0.01), "nothing was audited before"

    def pay():
        rollouts[0] += 1e6

    return policy, sync, pay


def test_a_module_left_behind_by_a_sync_without_audit_is_named_at_the_next_audit(paid_audits, monkeypatch):
    policy, sync, pay = paid_audits
    leave_out(sync, monkeypatch, lambda module: module == "model.layers.1.self_attn.o_proj", times=3)
    perturb_trained(policy, 0.2, seed=1)
    report = sync.sync()
    assert report.audit_gain_min is None
    assert "sync/audit_gain_min" not in report.metrics()
    assert report.metrics()["sync/audit_seconds"] >= 0
    pay()  # and the policy moves no further: what the audit sees is the update of the sync that had none
    with pytest.raises(probe.StaleEngineError, match=r"1 of 14 modules .*twice: model\.layers\.1\.self_attn\.o_proj"):
        sync.sync()


def test_updates_of_syncs_without_audit_add_up_to_the_gain_of_the_next(paid_audits):
    policy, sync, pay = paid_audits
    for step in (1, 2, 3):
        perturb_trained(policy, 0.2, seed=step)
        assert sync.sync().audit_gain_min is None
    pay()
    assert sync.sync().audit_gain_min == pytest.approx(1.0, abs=0.01)
    assert sync.sync().audit_gain_min is None, "one payment, one audit"


@pytest.mark.parametrize("missed", [1, 2, 3])
def test_a_module_that_misses_one_of_several_syncs_is_named_at_their_audit(paid_audits, monkeypatch, missed):
    """Four steps of one direction: who holds three of them has a gain of 0.75 and is stale all the same."""
    policy, sync, pay = paid_audits
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    steps = [0.02 * torch.randn_like(parameter) for parameter in trained]
    skipped = "model.layers.1.mlp.down_proj"
    for step in range(4):
        with torch.no_grad():
            for parameter, move in zip(trained, steps, strict=True):
                parameter.add_(move)
        if step == 4 - missed:
            leave_out(sync, monkeypatch, lambda module: module == skipped, times=missed + 1)
        if step < 3:
            assert sync.sync().audit_gain_min is None
    pay()
    with pytest.raises(probe.StaleEngineError, match=rf"1 of 14 modules .*twice: {skipped}"):
        sync.sync()


def test_a_policy_that_was_replaced_is_probed_and_audited_at_once(paid_audits):
    policy, sync, _ = paid_audits
    perturb_trained(policy, 0.2, seed=1)
    assert sync.sync().audit_gain_min is None
    sync.version = 37
    sync.prove_next()
    perturb_trained(policy, 0.2, seed=2)
    report = sync.sync()
    assert report.audit_gain_min == pytest.approx(1.0, abs=0.01)
    assert report.probe_max_gap < PARITY_NATS
    report = sync.sync()
    assert report.audit_gain_min is None
    assert report.probe_max_gap is None


def test_stochastic_rounding_delivers_on_average_what_nearest_rounding_swallows(engines):
    policy, sync = make_sync(*engines("bfloat16"), "fura", dtype=torch.bfloat16)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1e-4 / parameter.shape[-1] ** 0.5)
    nearest = sync.sync()
    sync.rounding = "stochastic"
    first, second = (probe_after(sync) for _ in range(2))
    assert nearest.audit_gain_min is None, "nothing to audit: nearest rounding moved hardly a weight"
    assert not torch.equal(first, second), "every version draws anew"


def probe_after(sync):
    assert sync.sync().probe_max_gap < sync.proof.tolerance
    return sync.engine.prompt_logprobs(sync.proof.token_ids)


def test_a_sync_that_does_not_arrive_is_named_stale(engines, monkeypatch):
    policy, sync = make_sync(*engines("tied"), "fura")
    sync.audits.every = 0
    perturb_trained(policy, 0.2, seed=0)
    leave_out(sync, monkeypatch, lambda module: True)
    with pytest.raises(probe.StaleEngineError, match="still serves the weights of the sync before"):
        sync.sync()


def test_one_layer_left_out_of_the_sync_stops_the_run(engines, monkeypatch):
    policy, sync = make_sync(*engines("tied"), "fura")
    sync.audits.every = 0
    perturb_trained(policy, 0.2, seed=0)
    leave_out(sync, monkeypatch, lambda module: module.endswith(".mlp.down_proj"))
    with pytest.raises(probe.StaleEngineError, match=r"differ by .* nats at probe token .*a part of the weights"):
        sync.sync()


@pytest.mark.parametrize("audited_before", [True, False])
def test_a_probe_that_fails_twice_names_what_an_audit_then_finds_stale(engines, monkeypatch, audited_before):
    policy, sync = make_sync(*engines("tied"), "fura")
    sync.audits.every = 0
    if not audited_before:
        sync.proof.audit = KernelAudit()
    perturb_trained(policy, 0.2, seed=0)
    skipped = "model.layers.1.self_attn.o_proj"
    leave_out(sync, monkeypatch, lambda module: module == skipped)
    with pytest.raises(
        probe.StaleEngineError, match=rf"proof: .*once more; an audit finds 1 of 14 modules stale: {skipped}\.weight"
    ):
        sync.sync()
    assert sync.sync().probe_max_gap < PARITY_NATS


def test_a_write_that_fails_once_is_repeated_for_a_failing_probe_too(engines, monkeypatch, caplog):
    policy, sync = make_sync(*engines("tied"), "fura")
    sync.audits.every = 0
    perturb_trained(policy, 0.2, seed=0)
    leave_out(sync, monkeypatch, lambda module: module == "model.layers.0.mlp.down_proj", times=1)
    assert sync.sync().probe_max_gap < PARITY_NATS
    assert "a part of the weights did not arrive" in caplog.text
    assert "the probe is passed by the weights that were sent once more" in caplog.text


@pytest.mark.parametrize("audit_every", [0, 1])
def test_a_probe_that_fails_with_every_weight_in_its_place_says_so(engines, monkeypatch, audit_every):
    policy, sync = make_sync(*engines("tied"), "fura")
    sync.audits.every = audit_every
    perturb_trained(policy, 0.2, seed=0)
    scored, pushes, push = sync.engine.prompt_logprobs, [], sync.engine.push
    monkeypatch.setattr(sync.engine, "prompt_logprobs", lambda tokens: scored(tokens) + 0.01)
    monkeypatch.setattr(sync.engine, "push", lambda update: pushes.append(update) or push(update))
    with pytest.raises(probe.StaleEngineError, match=r"once more; an audit finds none of 14 modules stale"):
        sync.sync()
    assert len(pushes) == 2


@pytest.mark.parametrize(
    ("checkpoint", "fault", "named"),
    [
        ("tied", "model.embed_tokens", "model.embed_tokens"),
        ("tied", "the head's own copy", "model.embed_tokens"),
        ("untied", "model.embed_tokens", "model.embed_tokens"),
        ("untied", "lm_head", "lm_head"),
        ("untied", "the head's own copy", "lm_head"),
    ],
)
def test_the_audit_names_an_embedding_or_an_output_head_left_behind_alone(
    engines, monkeypatch, checkpoint, fault, named
):
    policy, sync = make_sync(*engines(checkpoint), "full")
    perturb_trained(policy, 0.2, seed=0)
    leave_out(sync, monkeypatch, lambda module: module == fault)
    if fault == "the head's own copy":
        monkeypatch.setattr(sync.engine.model, "_repack_tied_head", lambda written: None)
    modules = {"tied": 15, "untied": 16}[checkpoint]
    with pytest.raises(
        probe.StaleEngineError, match=rf"audit: 1 of {modules} modules .*twice: {named}\.weight \(gain -?0\.0"
    ):
        sync.sync()


def test_nothing_is_sampled_from_keys_and_values_that_were_cached_before_a_sync(engines):
    engine, folder = engines("tied")
    check_that_a_sync_drops_the_cache(sampler_of(engine.llm), *make_sync(engine, folder, "fura"))


def sampler_of(llm):
    def sample(prompt):
        params = SamplingParams(temperature=0.0, max_tokens=16, logprobs=0)
        [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        [completion] = output.outputs
        entries = zip(completion.logprobs, completion.token_ids, strict=True)
        return completion.token_ids, [entry[token].logprob for entry, token in entries], output.num_cached_tokens

    return sample


def check_that_a_sync_drops_the_cache(sample, policy, sync, prompt_length=100, cached_tokens=96):
    """`sample(prompt)` gives tokens, their log-probs, and how many tokens of the prompt came from the cache."""
    sync.probe_every = 10**9  # a probe drops what is cached itself
    prompt = [5 + i % 40 for i in range(prompt_length)]
    sample(prompt)
    assert sample(prompt)[2] == cached_tokens, "the engine must cache prefixes, or nothing is shown here"
    perturb_trained(policy, 2.0, seed=1)
    assert sync.sync().probe_max_gap is None
    token_ids, served, cached = sample(prompt)
    scored = probe.trainer_logprobs(policy, [*prompt, *token_ids])[len(prompt) - 1 :]
    assert probe.max_gap(torch.tensor(served), scored) < PARITY_NATS
    assert cached == 0


def test_non_finite_weights_stop_the_run_and_the_engine_recovers(engines):
    policy, sync = make_sync(*engines("tied"), "fura")
    core = next(p for p in policy.parameters() if p.requires_grad)
    with torch.no_grad():
        core.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"q_proj\.weight are not finite"):
        sync.sync()
    with torch.no_grad():
        core.zero_()
    assert sync.sync().probe_max_gap < PARITY_NATS


@pytest.mark.parametrize("adapter", ["pissa", "olora", "milora"])
def test_the_base_weight_before_the_adapter_moved_it_is_read_where_the_policy_is(tied_checkpoint, adapter):
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
    policy = get_peft_model(model, peft_config_for(adapter, ModelConfig(lora_r=4), ["q_proj"], None))
    sync = WeightSync(policy, Follower(torch.float32), PROBE)
    name = "model.layers.1.self_attn.q_proj.weight"
    start = sync._starts[name]
    policy.to("meta")  # in place of a GPU, which refuses a product into another device's memory as well
    sync._starts[name] = start.to_device(torch.device("meta"))
    assert sync._checkpoint_read(sync._current_weights()[name])((0, 8), (0, 8)).device.type == "meta"


@pytest.mark.parametrize("adapted", ["mlp.experts.down_proj", "mlp.gate.weight"])
@pytest.mark.parametrize("known", [True, False])
def test_beside_an_adapted_stack_of_experts_of_unknown_form_go_the_others_of_its_module(adapted, known, monkeypatch):
    """An engine that folds from its own checkpoint could not read them."""
    if not known:
        monkeypatch.setattr(checkpoint_names, "STACKING", [])
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    adapter = LoraConfig(target_modules=["q_proj"], target_parameters=[adapted])
    updates = []

    class Listener(Follower):
        def push(self, update):
            updates.append(update)
            return super().push(update)

    WeightSync(get_peft_model(Qwen3MoeForCausalLM(config), adapter), Listener(torch.float32), PROBE).sync()
    whole = {"mlp.experts.down_proj", "mlp.experts.gate_up_proj"} if not known and "experts" in adapted else set()
    factors = updates[0].factors
    assert set(factors) == {
        f"model.layers.{layer}.{name}" for layer in range(2) for name in {"self_attn.q_proj.weight", adapted, *whole}
    }
    dense = {name for name in factors if factors[name].rule == "dense"}
    assert dense == {f"model.layers.{layer}.{name}" for layer in range(2) for name in whole}


@pytest.mark.parametrize(
    ("adapter", "adapter_kwargs", "trained"),
    [
        ("full", None, r"15 trained weights .*embed_tokens\.weight \(fully trained\)"),
        ("fura", {"form": "core"}, r"4 trained weights .*0\.self_attn\.q_proj\.weight \(FuraLinear\)"),
        ("miss", None, r"4 trained weights .*0\.self_attn\.q_proj\.weight \(MissLinear\)"),
    ],
)
def test_factored_refuses_what_has_no_small_form(tied_checkpoint, adapter, adapter_kwargs, trained):
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
    config = peft_config_for(adapter, ModelConfig(), ["q_proj", "v_proj"], adapter_kwargs)
    policy = model if config is None else get_peft_model(model, config)
    with pytest.raises(ValueError, match=f"sync_mode=factored .*{trained}.*sync_mode=auto"):
        WeightSync(policy, Follower(torch.float32), PROBE, mode="factored")
    WeightSync(policy, Follower(torch.float32), PROBE, mode="auto")


@pytest.mark.parametrize("adapter", ["fura", "lora", "dora", "oft", "hira"])
def test_factored_takes_what_has_a_small_form(tied_checkpoint, adapter):
    model = AutoModelForCausalLM.from_pretrained(tied_checkpoint)
    policy = get_peft_model(model, peft_config_for(adapter, ModelConfig(), ["q_proj"], None))
    WeightSync(policy, Follower(torch.float32), PROBE, mode="factored")


class OwnBase:
    """An engine elsewhere, as far as it compares its own checkpoint with what the trainer samples of its base."""

    reads_the_trainers_base = False
    dtype = torch.float32

    def __init__(self, folder):
        self.base = BaseWeights(str(folder), None, torch.device("cpu"))

    def prepare(self, tensors, stacks, base_samples):
        self.different = self.base.differences(base_samples)


def test_a_server_is_told_by_any_weight_that_the_policy_does_not_adapt(tied_checkpoint, tmp_path):
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tied_checkpoint),
        peft_config_for("lora", ModelConfig(), ["q_proj", "v_proj"], None),
    )
    tensors = load_file(tied_checkpoint / "model.safetensors")
    for changed in (None, "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        save_file({name: w * 1.1 if name == changed else w for name, w in tensors.items()}, tmp_path / "m.safetensors")
        engine = OwnBase(tmp_path)
        WeightSync(policy, engine, PROBE)
        assert engine.different == ([] if changed is None else [changed])


def base_policy(folder, dtype=torch.float32, adapter="lora", adapter_kwargs=None, quantization=None):
    from transformers import BitsAndBytesConfig

    loading = {"quantization_config": BitsAndBytesConfig(**quantization)} if quantization else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **loading)
    return get_peft_model(model, peft_config_for(adapter, ModelConfig(), ["q_proj", "v_proj"], adapter_kwargs))


def differences(policy, folder, tensors):
    save_file(tensors, folder / "m.safetensors")
    engine = OwnBase(folder)
    WeightSync(policy, engine, PROBE)
    return engine.different


def checkpoint_weights_of(policy):
    return {weight.name: weight for weight in checkpoint_weights(policy)}


NOT_THE_CHECKPOINTS = {
    "QLoRA": (torch.float32, "lora", None, NF4),
    "QDoRA": (torch.float32, "dora", None, NF4),
    "FuRA on a 4-bit base": (torch.bfloat16, "fura", None, NF4),
    "FuRA on an 8-bit base": (torch.float32, "fura", None, {"load_in_8bit": True}),
    "LoRA on an 8-bit base": (torch.float32, "lora", None, {"load_in_8bit": True}),
    "QFuRA": (torch.float32, "fura", {"form": "core", "quantize_core": "nf4"}, None),
    "core form": (torch.float32, "fura", {"form": "core"}, None),
    "core form in bfloat16": (torch.bfloat16, "fura", {"form": "core"}, None),
}


@pytest.mark.parametrize("case", NOT_THE_CHECKPOINTS)
def test_a_policy_that_holds_a_weight_otherwise_than_its_checkpoint_fits_a_server_of_it(
    case, untied_checkpoint, tmp_path
):
    """The rest, which it holds as it was loaded, tells the base all the same."""
    policy = base_policy(untied_checkpoint, *NOT_THE_CHECKPOINTS[case])
    tensors = load_file(untied_checkpoint / "model.safetensors")
    assert differences(policy, tmp_path, tensors) == []
    for told in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"):
        changed = {name: w * 1.01 if name == told else w for name, w in tensors.items()}
        assert differences(policy, tmp_path, changed) == [told]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("served", DTYPES)
def test_one_base_in_any_dtype_is_the_same_base_and_one_trained_a_little_further_is_not(
    stored, trained, served, tied_checkpoint, tmp_path
):
    """The trainer has loaded its copy, saved as `stored`, as `trained`; the engine has another copy, saved as `served`.

    Further means by 1e-3 in float32, by one step of a 16-bit number; the coarsest of the three dtypes must see it.
    """
    original = load_file(tied_checkpoint / "model.safetensors")
    copy = {name: w.to(stored) for name, w in original.items()}
    policy = base_policy(tied_checkpoint)
    for name, weight in checkpoint_weights_of(policy).items():
        weight.parameter.data = copy[name].to(trained)
    if (stored, trained) != (torch.float16, torch.bfloat16):  # rounded twice, which is another number now and then
        assert differences(policy, tmp_path, {name: w.to(served) for name, w in original.items()}) == []
    # the very same file as the trainer's
    assert differences(policy, tmp_path, copy) == []
    step = max(1e-3, *(torch.finfo(dtype).eps / 2 for dtype in (stored, trained, served)))
    further = {name: w * (1 + step) if w.ndim == 2 else w for name, w in original.items()}
    told = differences(policy, tmp_path, {name: w.to(served) for name, w in further.items()})
    assert set(told) == {name for name, w in original.items() if w.ndim == 2}


def test_a_base_is_told_by_a_sign_a_zero_and_the_entries_that_float16_nearly_loses(tied_checkpoint, tmp_path):
    tiny = {name: w * 1e-5 for name, w in load_file(tied_checkpoint / "model.safetensors").items()}
    for served in DTYPES:
        policy = base_policy(tied_checkpoint)
        for name, weight in checkpoint_weights_of(policy).items():
            weight.parameter.data = tiny[name].to(served).half()
        assert differences(policy, tmp_path, {name: w.to(served) for name, w in tiny.items()}) == []
        assert len(differences(policy, tmp_path, {name: -w.to(served) for name, w in tiny.items()})) == len(tiny)
        assert len(differences(policy, tmp_path, {name: 0 * w.to(served) for name, w in tiny.items()})) == len(tiny)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_making_the_adapter_moved_is_compared_up_to_rounding(init, dtype, tied_checkpoint, tmp_path):
    policy = base_policy(tied_checkpoint, dtype, adapter_kwargs={"init_lora_weights": init})
    tensors = {name: w.to(dtype) for name, w in load_file(tied_checkpoint / "model.safetensors").items()}
    assert differences(policy, tmp_path, tensors) == []
    told = "model.layers.1.self_attn.q_proj.weight"
    changed = {name: w * 1.1 if name == told else w for name, w in tensors.items()}
    assert differences(policy, tmp_path, changed) == [told]


def test_an_engine_of_another_layout_is_refused_with_the_versions_read():
    with pytest.raises(RuntimeError, match=r"fura_rl reads vLLM 0\.31.*VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        find_model_runner(object())
