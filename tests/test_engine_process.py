"""Factored sync into engines in other processes: one worker, and two that share every layer (tensor parallelism)."""

import os
from contextlib import closing, contextmanager

import pytest
import torch
from conftest import (
    PARITY_NATS,
    check_that_two_updates_arrive,
    make_moe_checkpoint,
    make_pythia_checkpoint,
    make_tiny_checkpoint,
    perturb_trained,
)
from peft import LoraConfig, get_peft_model
from test_weight_sync import check_that_a_sync_drops_the_cache, sampler_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import ModelConfig

from fura_rl import FuraConfig
from fura_rl.adapters.registry import METHODS, peft_config_for
from fura_rl.benchmark import measure
from fura_rl.sync import payload, update_watch
from fura_rl.sync.fold import checkpoint_weights
from fura_rl.sync.probe import StaleEngineError
from fura_rl.sync.remote_engine import RemoteEngine
from fura_rl.sync.transport import RemoteSyncError
from fura_rl.sync.weight_sync import WeightSync

pytestmark = pytest.mark.slow
PROBE = list(range(5, 45))
CASES = {
    "fura": ("fura", None, None),
    "fura, one block across both shards": ("fura", {"block_size": "full"}, None),
    "fura, row blocks": ("fura", {"block_axis": "out"}, None),
    "fura, unadapted siblings": ("fura", None, ["q_proj", "up_proj"]),
    "fura, core form": ("fura", {"form": "core"}, None),
    "fura, what tensor parallelism cuts by columns": ("fura", None, ["o_proj", "down_proj"]),
    "lora": ("lora", None, None),
    "dora": ("dora", None, None),
    "pissa": ("lora", {"init_lora_weights": "pissa"}, None),
    "milora": ("milora", None, None),
    "full": ("full", None, None),
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
INT8 = {"load_in_8bit": True}
# Not the checkpoint's values: the base is quantized when it is loaded, or when the adapter is made.  (adapter,
# target_modules, quantization, tolerance in nats): an 8-bit product rounds its activations too, which no engine repeats
QUANTIZED = {
    "qlora": ("qlora", None, NF4, PARITY_NATS),
    "qlora, unadapted siblings": ("qlora", ["q_proj", "v_proj"], NF4, PARITY_NATS),
    "qdora": ("qdora", None, NF4, PARITY_NATS),
    "qfura": ("qfura", None, None, PARITY_NATS),
    "fura over 4 bits": ("fura", ["q_proj", "up_proj"], NF4, PARITY_NATS),
    "fura over 8 bits": ("fura", None, INT8, 0.1),
    "lora over 8 bits": ("lora", ["q_proj", "v_proj"], INT8, 0.1),
}
# Methods whose numbers take one of the ways above: small forms of their own first, then those that are sent whole.
MORE_METHODS = (
    *("svd", "hira", "oft", "rslora", "olora"),
    *("randlora", "miss", "lora_full", "lift", "peft:LoHaConfig", "peft:LoKrConfig"),
)


@pytest.fixture(scope="module", params=[("tied", 1), ("untied", 2)], ids=["one worker", "two workers"])
def engine_process(request, tmp_path_factory):
    kind, workers = request.param
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp(kind), tied=kind == "tied")
    options = {"worker_extension_cls": "forgetful_worker.ForgetfulWorker", "block_size": 32}
    with running(folder, workers=workers, **options) as transport:
        yield transport, folder


@contextmanager
def running(folder, dtype="float32", workers=1, **options):
    """A small engine in processes of its own."""
    from vllm import LLM

    from fura_rl.sync.vllm_engine import ProcessTransport, factored_sync_settings

    if workers > (os.cpu_count() or 1):
        pytest.skip(f"{workers} workers need as many cores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        if workers > 1:  # vLLM wants a memory node for each worker, or their cores by hand
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(workers))))
        llm = LLM(
            str(folder), dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=64 * 2**20, max_model_len=128,
            disable_log_stats=True, tensor_parallel_size=workers, **factored_sync_settings() | options,
        )  # fmt: skip
    try:
        yield ProcessTransport(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()


def make_policy(folder, case, dtype=torch.float32):
    loading = {}
    if case in QUANTIZED:
        adapter, targets, quantization, _ = QUANTIZED[case]
        adapter_kwargs = None
        if quantization:
            loading = {"quantization_config": BitsAndBytesConfig(**quantization)}
    else:
        adapter, adapter_kwargs, targets = CASES.get(case, (case, None, None))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **loading)
    config = peft_config_for(adapter, ModelConfig(), targets, adapter_kwargs)
    return model if config is None else get_peft_model(model, config)


def trainer_on(engine_process, case, **settings):
    transport, folder = engine_process
    policy, engine = make_policy(folder, case), RemoteEngine(transport)
    return policy, engine, WeightSync(policy, engine, PROBE, **settings)


@pytest.mark.parametrize("case", CASES)
def test_every_method_arrives_whole_in_every_worker(engine_process, case):
    policy, engine, sync = trainer_on(engine_process, case, probe_every=1)
    for step in range(3):
        perturb_trained(policy, 0.1, seed=step)
        report = sync.sync()
        assert report.probe_max_gap < PARITY_NATS
        assert step == 0 or report.audit_gain_min == pytest.approx(1.0, abs=0.01)
        assert engine.serves_last()
    if case == "fura":
        assert report.payload_bytes < 0.15 * report.dense_bytes
    engine.close()


@pytest.mark.parametrize("adapter", MORE_METHODS)
def test_the_other_methods_arrive_too(engine_process, adapter):
    policy, engine, sync = trainer_on(engine_process, adapter, probe_every=1)
    sync.sync()
    before = engine.prompt_logprobs(PROBE)
    perturb_trained(policy, 0.1, seed=0)
    report = sync.sync()
    assert report.probe_max_gap < PARITY_NATS
    assert report.audit_gain_min == pytest.approx(1.0, abs=0.01)
    assert (engine.prompt_logprobs(PROBE) - before).abs().max() > 100 * PARITY_NATS, "it must move"
    engine.close()


def test_a_tied_head_in_the_shards_of_two_workers_follows(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "tied", tied=True)
    with running(folder, workers=2) as transport:
        for case in ("fura", "full"):
            policy, engine, sync = trainer_on((transport, folder), case, probe_every=1)
            for step in range(2):
                perturb_trained(policy, 0.1, seed=step)
                report = sync.sync()
                assert report.probe_max_gap < PARITY_NATS
            assert report.audit_gain_min == pytest.approx(1.0, abs=0.01)
            engine.close()


def test_rows_that_a_loader_puts_in_another_order_arrive_in_the_shards_of_two_workers(tmp_path):
    folder = make_pythia_checkpoint(tmp_path)
    with running(folder, workers=2, block_size=32) as transport, closing(RemoteEngine(transport)) as engine:
        policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), FuraConfig(target_modules="all-linear"))
        reports = check_that_two_updates_arrive(WeightSync(policy, engine, PROBE, probe_every=1), 0.3)
        assert [report.audit_gain_min for report in reports] == [pytest.approx(1.0, abs=0.01)] * 2


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_policy_arrives_as_it_computes_in_an_engine_of_the_unquantized_checkpoint(engine_process, case):
    tolerance = QUANTIZED[case][-1]
    policy, engine, sync = trainer_on(engine_process, case, probe_every=1)
    with closing(engine):
        assert sync.sync().probe_max_gap < tolerance
        before = engine.prompt_logprobs(PROBE)
        for step in range(2):
            perturb_trained(policy, 0.6, seed=step)
            report = sync.sync()
            assert report.probe_max_gap < tolerance
        assert report.audit_gain_min == pytest.approx(1.0, abs=0.01)
        assert (engine.prompt_logprobs(PROBE) - before).abs().max() > 2 * report.probe_max_gap, "it must move"


def test_every_method_of_the_table_is_among_them():
    tested = {case[0] for case in (*CASES.values(), *QUANTIZED.values())} | {*MORE_METHODS, "pissa"}
    assert METHODS.keys() <= tested


def test_a_policy_of_another_base_is_refused(engine_process, tmp_path):
    transport, _ = engine_process
    other = make_tiny_checkpoint(tmp_path / "other", tied=True, hidden_size=128)
    with pytest.raises(RemoteSyncError, match="another base model"):
        WeightSync(make_policy(other, "fura"), RemoteEngine(transport), PROBE)


@pytest.mark.parametrize("case", ["fura, what tensor parallelism cuts by columns", "fura"])
def test_one_worker_left_behind_is_named_by_the_audit(engine_process, case):
    """The last worker stages and acknowledges, and writes nothing; another's fresh share must not vouch for it."""
    policy, engine, sync = trainer_on(engine_process, case, probe_every=100)
    sync.sync()
    perturb_trained(policy, 0.1, seed=0)
    transport = engine.transport
    transport.call("forget_writes", rank=len(transport.call("fura_status")) - 1)
    try:
        with pytest.raises(StaleEngineError, match=r"audit: (4 of 4|14 of 14) modules "):
            sync.sync()
    finally:
        transport.call("forget_writes", rank=-1)
    assert sync.sync().audit_gain_min == pytest.approx(1.0, abs=0.01)
    engine.close()


def test_a_sync_of_the_weights_before_is_named_by_the_audit(engine_process, monkeypatch):
    """The second sync is acknowledged, and brings what the first one brought."""
    policy, engine, sync = trainer_on(engine_process, "fura", probe_every=100)
    sync.sync()
    perturb_trained(policy, 0.1, seed=0)
    deliver, before = engine._deliver, engine._last

    def deliver_before(message, *how):
        before.version = message.version
        return deliver(before, *how)

    monkeypatch.setattr(engine, "_deliver", deliver_before)
    with pytest.raises(RuntimeError, match=r"14 of 14 modules .*nothing of this sync arrived"):
        sync.sync()
    monkeypatch.undo()
    engine.close()


def test_keys_and_values_that_were_cached_before_a_sync_are_dropped_in_another_process_too(engine_process):
    policy, engine, sync = trainer_on(engine_process, "fura")
    with closing(engine):
        sync.sync()
        check_that_a_sync_drops_the_cache(sampler_of(engine.transport.llm), policy, sync)


@pytest.fixture(scope="module")
def deep_engine(tmp_path_factory):
    """Sixteen layers, each of them much larger than what the trainer gathers for a chunk or looks at at once."""
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 16}
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("deep"), tied=True, **shape)
    with running(folder) as transport:
        yield transport, folder


@pytest.mark.parametrize("adapter", ["fura", "lora", "dora"])
def test_a_factored_sync_holds_less_than_a_layer_of_the_policy_at_once(adapter, deep_engine, monkeypatch):
    monkeypatch.setattr(payload, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(update_watch, "CPU_WAITING_BYTES", 2**16)
    transport, folder = deep_engine
    wide = {"block_size": 64} if adapter == "fura" else {"r": 64}
    config = peft_config_for(adapter, ModelConfig(), None, wide)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    of_a_layer = sum(w.parameter.nbytes for w in checkpoint_weights(policy) if w.layer and ".layers.7." in w.name)
    with closing(RemoteEngine(transport)) as engine:
        sync = WeightSync(policy, engine, PROBE, probe_every=10**9, mode="factored")
        sync.sync()
        perturb_trained(policy, 0.1, seed=0)
        reports = []
        peak = measure.peak_bytes(lambda: reports.append(sync.sync()), torch.device("cpu"))
        assert reports[0].audit_gain_min == pytest.approx(1.0, abs=0.01)
        assert reports[0].payload_bytes > 2 * of_a_layer, "or all of it at once would not be seen"
        assert peak < of_a_layer


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = LoraConfig(
    task_type="CAUSAL_LM", r=4, target_modules=["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)  # fmt: skip


@contextmanager
def trainer_of_experts(transport, folder, config):
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    with closing(RemoteEngine(transport)) as engine:
        yield policy, engine, WeightSync(policy, engine, PROBE, probe_every=1)


def check_a_mixture_of_experts_follows(transport, folder, config):
    with trainer_of_experts(transport, folder, config) as (_, _, sync):
        _, report = check_that_two_updates_arrive(sync, 0.1)
        assert report.audit_gain_min == pytest.approx(1.0, abs=0.02)
        assert report.payload_bytes < 0.4 * report.dense_bytes, "small factors, of experts too"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mixture_of_experts_in_another_process_follows_one_trainer_after_another(workers, tmp_path):
    """The experts of the one before are the checkpoint's again for the next."""
    folder = make_moe_checkpoint(tmp_path / "moe")
    attention = peft_config_for("fura", ModelConfig(), ATTENTION, None)
    with running(folder, workers=workers) as transport:
        for config in (attention, EXPERTS, attention):
            check_a_mixture_of_experts_follows(transport, folder, config)


def check_an_fp8_engine_follows(transport, folder):
    engine = RemoteEngine(transport)
    policy = make_policy(folder, "fura", torch.bfloat16)
    sync = WeightSync(policy, engine, PROBE, probe_every=1, probe_tolerance=2.0)
    floor = sync.sync().probe_max_gap
    before = engine.prompt_logprobs(PROBE)
    perturb_trained(policy, 4.0, seed=1)
    report = sync.sync()
    assert report.probe_max_gap < 3 * floor
    assert (engine.prompt_logprobs(PROBE) - before).abs().max() > 3 * report.probe_max_gap, "it must move"
    assert report.audit_gain_min == pytest.approx(1.0, abs=0.3)
    engine.close()


def test_an_fp8_engine_in_another_process_is_requantized_from_its_own_checkpoint(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "model", tied=False, dtype=torch.bfloat16)
    with running(folder, "bfloat16", quantization="fp8_per_channel") as transport:
        check_an_fp8_engine_follows(transport, folder)
