"""What only a GPU shows: `python -m pytest tests/test_gpu.py` on a machine that has one, skipped elsewhere.

The layer and its kernel, then a vLLM engine beside the policy on one GPU (CUDA graphs, one copy of the weights), then
whole runs.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, make_tiny_checkpoint, perturb_trained, relative_error, start_llm
from peft import get_peft_model
from rollout_server import RolloutServer
from torch import nn
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from fura_rl import FuraConfig
from fura_rl.adapters import block_kernels, frames
from fura_rl.adapters.registry import peft_config_for
from fura_rl.sync import probe
from fura_rl.sync.fold import checkpoint_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FEW, MANY = 64, 8192  # tokens below and above what the Triton kernel takes
PROBE = list(range(3, 40))


@pytest.fixture(autouse=True)
def _memory_back():
    yield
    torch.cuda.empty_cache()


# ---- the layer


def fura_layer(in_features=1024, out_features=768, dtype=torch.bfloat16, **settings):
    base = nn.Sequential(nn.Linear(in_features, out_features, device="cuda", dtype=dtype))
    return base[0], get_peft_model(base, FuraConfig(target_modules=["0"], **settings))


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_layer_starts_at_the_base_models_bits(tokens, axis):
    base, model = fura_layer(block_axis=axis)
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(model(x), nn.functional.linear(x, base.weight, base.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_outputs_and_gradients_are_those_of_the_folded_weight_in_float64(tokens, axis, dtype):
    base, model = fura_layer(block_axis=axis, dtype=dtype)
    perturb_trained(model, 0.3, seed=0)
    layer = model.base_model.model[0]
    x = torch.randn(tokens, 1024, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, 768, device="cuda", dtype=dtype)
    assert block_kernels.takes(x, 32) == (tokens == MANY and dtype.itemsize == 2)
    model(x).backward(grad)
    core = layer.fura_core["default"]
    deltas = [p.detach().double().requires_grad_() for p in (core.delta_r, core.delta_s)]
    weight, exact_x = base.weight.double(), x.detach().double().requires_grad_()
    folded = fold_in_float64(weight if axis == "in" else weight.mT, core, *deltas)
    expected = nn.functional.linear(exact_x, folded if axis == "in" else folded.mT, base.bias.double())
    expected.backward(grad.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert relative_error(model(x), expected) < tolerance
    assert relative_error(x.grad, exact_x.grad) < tolerance
    for trained, exact in zip((core.delta_r, core.delta_s), deltas, strict=True):
        assert relative_error(trained.grad, exact.grad) < tolerance


def fold_in_float64(weight, core, delta_r, delta_s):
    right, values = core.basis_v.double(), core.basis_s.double()
    change = delta_s.unsqueeze(-1) * right.mT + (values + delta_s).unsqueeze(-1) * delta_r
    n, b, _ = right.shape
    blocks = weight.reshape(weight.shape[0], n, b).transpose(0, 1)
    moved = blocks + blocks @ (right @ (change / values.unsqueeze(-1)))
    return moved.transpose(0, 1).reshape(weight.shape)


def test_a_step_repeats_to_the_bit():
    """Sums over tokens are shared out and added in a fixed order, so that a resumed run reaches the same numbers."""
    _, model = fura_layer()
    perturb_trained(model, 0.3, seed=0)
    x = torch.randn(MANY, 1024, device="cuda", dtype=torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(model(x).float().square().sum(), trained) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_conversion_is_that_of_a_cpu():
    weight = torch.randn(512, 384)
    here, there = frames.svd_frame(weight, 32), frames.svd_frame(weight.cuda(), 32)
    assert torch.allclose(here.singular_values, there.singular_values.cpu(), rtol=1e-5)
    assert torch.allclose(here.right, there.right.cpu(), atol=1e-4)


def test_qfura_in_nf4_trains():
    pytest.importorskip("bitsandbytes")
    _, model = fura_layer(form="core", quantize_core="nf4")
    x = torch.randn(FEW, 1024, device="cuda", dtype=torch.bfloat16)
    model(x).float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


# ---- the layer as a CUDA graph, in its benchmark


def layer_settings(tokens):
    from fura_rl.benchmark.measure import Settings

    return Settings(
        device=torch.device("cuda"), dtype=torch.bfloat16, shapes=((768, 1024),), tokens=(tokens,), repeats=3,
        seconds=0.1, sizes=(), models=("tiny",),
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_replayed_graph_computes_the_gradients_of_a_step(tokens):
    from fura_rl.benchmark import graphed, layer

    settings, captured = layer_settings(tokens), set()
    for name, contender in layer.moved_contenders(settings, (768, 1024)).items():
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16)
        gradients, kept = layer.gradients_of(contender, x, grad, settings), []

        def call(gradients=gradients, kept=kept):
            kept[:] = gradients()

        try:
            graph = graphed.capture(call, x.device)
        except RuntimeError:
            continue
        captured.add(name)
        with torch.no_grad():
            x.normal_()
            grad.normal_()
        graph.replay()
        for replayed, eager in zip(kept, gradients(), strict=True):
            assert relative_error(replayed, eager) < 1e-2, name
    assert captured >= {"frozen", "fura", "lora", "lora r=64", "paper"}, "a peer that was left out has no time either"


def test_what_cannot_be_captured_has_an_empty_cell_and_harms_nothing_after_it(monkeypatch, capsys):
    from fura_rl.benchmark import contenders, layer

    forward = contenders.PaperLayer.forward

    def reads_a_number(self, x):
        y = forward(self, x) + 0 * torch.rand_like(x[:, :1])  # the capture has the generator by then
        y.sum().item()
        return y

    monkeypatch.setattr(contenders.PaperLayer, "forward", reads_a_number)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        rows = {row["layer"]: row for row in layer.run(layer_settings(FEW))}
        assert "paper has no time as a CUDA graph" in capsys.readouterr().out
        assert rows["paper"]["graph_step_ms"] is rows["paper"]["fura_graph_ratio"] is None
        assert rows["paper"]["step_ms"] > 0
        assert rows["fura"]["fura_graph_ratio"] == 1.0
        assert rows["frozen"]["graph_step_ms"] > 0
        assert torch.cuda.current_stream() == stream
        assert torch.randn(8, device="cuda").isfinite().all(), "the generator must not be left in the capture"


# ---- an engine beside the policy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("vllm")
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("gpu")
    return make_tiny_checkpoint(folder, tied=True, dtype=torch.bfloat16, num_key_value_heads=2, **wide)


def start(checkpoint, **options):
    return start_llm(checkpoint, "bfloat16", gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28, **options)


@pytest.fixture(scope="module")
def llm(checkpoint):
    """Decoding goes through CUDA graphs, which a sync must not outdate."""
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
    return start(checkpoint, enforce_eager=False, compilation_config=graphs)


def policy_of(adapter, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).cuda()
    config = peft_config_for(adapter, ModelConfig(), None, None)
    return model if config is None else get_peft_model(model, config)


def decoding_gap(llm, policy, tokens=12):
    """Nats between the engine's log-probs of what it decodes and the policy's of the same tokens."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=0, logprobs=0, ignore_eos=True)
    [output] = llm.generate([{"prompt_token_ids": PROBE}], params, use_tqdm=False)
    completion = output.outputs[0]
    decoded = torch.tensor(
        [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    )
    expected = probe.trainer_logprobs(policy, PROBE + list(completion.token_ids))[len(PROBE) - 1 :]
    return probe.max_gap(decoded, expected.cpu())


@pytest.mark.parametrize("adapter", ["fura", "svd", "lora", "dora", "oft", "hira", "full"])
def test_prefill_and_cuda_graphs_compute_with_the_folded_weights(llm, checkpoint, adapter):
    from fura_rl.sync.vllm_engine import InProcessEngine
    from fura_rl.sync.weight_sync import WeightSync

    policy = policy_of(adapter, checkpoint)
    sync = WeightSync(policy, InProcessEngine(llm), PROBE, probe_every=1)
    sync.sync(everything=True)
    start = probe.trainer_logprobs(policy, PROBE)
    for step in range(3):
        perturb_trained(policy, 0.1 if adapter != "full" else 0.02, seed=step)
        report = sync.sync()
        assert report.probe_max_gap < sync.proof.tolerance
        assert report.audit_gain_min is None or report.audit_gain_min == pytest.approx(1.0, abs=0.2)
        assert decoding_gap(llm, policy) < sync.proof.tolerance
    assert probe.max_gap(start, probe.trainer_logprobs(policy, PROBE)) > 0.01, "it must move"


def test_a_suppressed_fold_is_named(llm, checkpoint, monkeypatch):
    from fura_rl.sync.vllm_engine import InProcessEngine
    from fura_rl.sync.weight_sync import WeightSync

    policy = policy_of("fura", checkpoint)
    sync = WeightSync(policy, InProcessEngine(llm), PROBE, probe_every=1000)
    sync.sync(everything=True)
    perturb_trained(policy, 0.1, seed=0)
    write = sync.engine.model._write_module
    skipped = "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(sync.engine.model, "_write_module", lambda name, *a: name == skipped or write(name, *a))
    with pytest.raises(probe.StaleEngineError, match=rf"1 of \d+ modules .*{skipped}"):
        sync.sync()


def test_one_copy_serves_rollouts_and_training_in_turn(checkpoint):
    from fura_rl.sync.single_copy import SingleCopyEngine
    from fura_rl.sync.weight_sync import WeightSync

    policy = policy_of("fura", checkpoint)
    base = {weight.name: weight.parameter.detach().clone() for weight in checkpoint_weights(policy)}
    llm = start(checkpoint)
    engine = SingleCopyEngine(llm, policy)
    sync = WeightSync(policy, engine, PROBE, probe_every=1)
    of_engine = {p.untyped_storage().data_ptr() for p in engine.model.model.parameters()}
    for step in range(3):
        perturb_trained(policy, 0.1, seed=step)
        assert sync.sync().probe_max_gap < sync.proof.tolerance
        llm.generate([{"prompt_token_ids": PROBE}], use_tqdm=False)
        engine.restore()
        for weight in checkpoint_weights(policy):
            assert weight.parameter.untyped_storage().data_ptr() in of_engine, weight.name
            assert torch.equal(weight.parameter, base[weight.name]), weight.name


# ---- whole runs


def train(output_dir, *options):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/single_gpu.yaml"]
    few = ["--max_steps", "4", "--eval_problems", "16", "--eval_samples", "2", "--save_steps", "2"]
    command = [*launch, "launch/grpo_math.py", "--output_dir", str(output_dir), *few, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    state = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "sync/version" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--vllm_enforce_eager", "true"],
        ["--vllm_enforce_eager", "true", "--vllm_enable_sleep_mode", "true"],
        ["--vllm_enforce_eager", "true", "--vllm_share_weights", "true"],
        ["--vllm_enforce_eager", "true", "--dtype", "bfloat16", "--bf16", "true"],
        [],
    ],
    ids=["eager", "sleep", "one copy", "bfloat16", "compiled"],
)
def test_a_run_trains_and_every_sync_arrives(tmp_path: Path, options):
    history = train(tmp_path, *options)
    assert len(history) == 4
    for entry in history:
        assert entry.get("sync/audit_gain_min", 1.0) == pytest.approx(1.0, abs=0.2)
    assert history[0]["sync/probe_max_gap"] < (0.3 if "bfloat16" in options else 5e-2)


@pytest.mark.slow
def test_a_run_with_a_server_on_the_same_gpu(tmp_path: Path):
    from fura_rl.quickstart import BASE_MODEL

    server = RolloutServer(Path(BASE_MODEL), tmp_path / "server.log", "--gpu-memory-utilization", "0.1").start()
    try:
        server.wait_until_up()
        options = ["--vllm_mode", "server", "--vllm_server_base_url", server.url]
        assert len(train(tmp_path / "run", *options)) == 4
    finally:
        server.stop()
