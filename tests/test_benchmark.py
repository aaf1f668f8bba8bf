"""How the benchmarks measure: budget, peaks, sums; and that they need no more than the packages they name."""

import json
import runpy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import REPOSITORY, start_llm

from fura_rl.adapters import frames
from fura_rl.adapters.fura_layer import FuraLinear
from fura_rl.benchmark import (
    BENCHMARKS,
    SHARES,
    graphed,
    grpo_step,
    layer,
    measure,
    measure_all,
    model,
    quantize,
    report,
    soak,
    sync,
    sync_engines,
)
from fura_rl.benchmark.budget import Budget
from fura_rl.benchmark.contenders import make_contenders
from fura_rl.benchmark.convert import decoder_layer
from fura_rl.benchmark.layer import check_gradients, moved_contenders
from fura_rl.benchmark.models import projection_shapes, random_model

CPU = torch.device("cpu")


def test_units_that_no_longer_fit_are_named_and_the_next_benchmark_has_what_is_left(capsys):
    now = [0.0]

    class Clocked(Budget):
        def elapsed(self):
            return now[0]

    budget = Clocked(seconds=100)
    begun = []

    def spend(benchmark, share, units):
        budget.open(share)
        for unit, seconds in budget.units(benchmark, units):
            begun.append((benchmark, unit))
            now[0] += seconds

    spend("layer", 0.4, [("a", 10), ("b", 25), ("c", 10)])  # after b at 35 s a unit may last 25 s: c does not fit
    spend("fold", 0.7, [("d", 30)])
    assert begun == [("layer", "a"), ("layer", "b"), ("fold", "d")]
    assert budget.skipped == ["layer ('c', 10)"]
    assert "layer: skipped ('c', 10), the time budget of 100 s has no room" in capsys.readouterr().out
    spend("step", 1.0, [("e", 35), ("f", 1)])
    assert now[0] == 100
    assert budget.skipped[-1] == "step ('f', 1)"


def test_every_benchmark_has_a_share_and_the_last_ends_the_budget():
    assert list(SHARES) == [name for name in BENCHMARKS if name in SHARES]
    assert set(BENCHMARKS) - set(SHARES) == {"rewards", "survival", "soak"}, "those that no GPU makes meaningful"
    assert list(SHARES.values()) == sorted(SHARES.values())
    assert list(SHARES.values())[-1] == 1.0


def test_peaks_are_what_a_call_holds_at_once_in_whatever_thread():
    size = 64 * 2**20

    def hold_two():
        tensors = [torch.ones(size, dtype=torch.uint8) for _ in range(2)]
        del tensors
        torch.ones(size, dtype=torch.uint8)

    def in_a_thread():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(hold_two).result()

    assert measure.peak_bytes(hold_two, CPU) == pytest.approx(2 * size, rel=0.05)
    for call in (hold_two, in_a_thread, in_a_thread):
        assert measure.peak_process_bytes(call, CPU) == pytest.approx(2 * size, rel=0.1)


def test_a_decoder_layer_is_the_sum_over_its_seven_projections():
    rows = [
        {"shape": f"{i}->{o}", "blocks": "", "method": method, "convert_ms": scale * i * o, "peak_mb": float(i)}
        for o, i in dict.fromkeys(projection_shapes("tiny"))
        for method, scale in (("fura", 1.0), ("svd per block", 5.0))
    ]
    numbers = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3
    ours, theirs = decoder_layer("tiny", rows)
    assert ours["convert_ms"] == numbers
    assert theirs["fura_speedup"] == 5.0
    assert ours["peak_mb"] == 128.0
    assert decoder_layer("tiny", rows[2:]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_wrong_gradients_is_not_timed(dtype):
    settings = small_settings(dtype=dtype)
    contender = moved_contenders(settings, (64, 64))["lora"]
    x = torch.randn(8, 64, dtype=dtype)
    check_gradients("lora", contender, x, settings)
    contender.lora_B["default"].weight.register_hook(lambda grad: 1.1 * grad)  # a deep copy has no hook
    with pytest.raises(RuntimeError, match="lora, gradient 2: relative error"):
        check_gradients("lora", contender, x, settings)


@pytest.mark.slow
def test_the_report_needs_only_the_packages_it_names(tmp_path):
    """Everything else is blocked; what needs it is skipped with a line, and the run still ends well."""
    blocked = ["trl", "vllm", "datasets", "math_verify", "rich", "psutil", "bitsandbytes", "matplotlib", "scipy"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name in {blocked!r} else find(name, *rest)\n"
        "import runpy; runpy.run_path('launch/benchmark.py', run_name='__main__')"
    )
    options = ["all", "--device", "cpu", "--sizes", "tiny", "--tokens", "16", "--repeats", "3", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", program, *options], capture_output=True, text=True, timeout=600, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(saved["results"]) == set(SHARES) - {"quantize", "sync"}
    assert "quantize: skipped" in done.stdout
    assert "sync: skipped, vllm is not installed" in done.stdout
    assert len(saved["machine"]["skipped"]) == 2


def soak_of(memory, seconds):
    """A run of 2,000 steps whose memory and step time are functions of the step."""
    samples = [soak.Sample(step, "trainer", memory(step), handles=70, threads=40) for step in range(0, 2000, 2)]
    return {row["what"]: row for row in soak.rows(samples, {step: seconds(step) for step in range(2, 2001)}, 2000)}


def test_a_benchmark_that_fails_does_not_take_the_others_results_with_it(tmp_path, monkeypatch, capsys):
    def fails(settings):
        raise RuntimeError("no kernel image")

    settings = small_settings(shapes=((64, 64),), tokens=(8,), out=tmp_path)
    monkeypatch.setitem(BENCHMARKS, "convert", fails)
    assert measure_all(["fold", "convert", "layer"], settings) == 1
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(written["results"]) == ["fold", "layer"]
    assert written["machine"]["skipped"] == ["convert: failed, no kernel image"]
    assert "no kernel image" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no kernel image"):
        measure_all(["convert"], settings)


def small_settings(**settings):
    shared = {"device": CPU, "dtype": torch.float32, "repeats": 3, "seconds": 0.1, "sizes": (), "models": ("tiny",)}
    return measure.Settings(**{"shapes": (), "tokens": ()} | shared | settings)


def test_a_cpu_has_no_columns_of_cuda_graphs():
    rows = layer.run(small_settings(shapes=((64, 64),), tokens=(8,)))
    assert [row["layer"] for row in rows] == ["frozen", "fura", "lora", "lora r=64", "dora", "oft", "paper"]
    assert not [column for column in rows[0] if "graph" in column]


def test_the_layer_table_has_every_contender_that_was_measured(tmp_path):
    settings = small_settings(shapes=((64, 64), (32, 64)), tokens=(8, 16), out=tmp_path)
    assert measure_all(["layer"], settings) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["results"]["layer"]
    text = (
        (tmp_path / "benchmark.md").read_text().partition("Forward and backward of a FuRA layer over the other's:")[2]
    )
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]
    names = {report.LAYER_NAMES.get(row["layer"], row["layer"]): row["layer"] for row in rows if row["layer"] != "fura"}
    assert header == ["layer", "tokens", *names, "peak memory / LoRA"]
    assert set(names.values()) | {"fura"} == set(make_contenders(torch.nn.Linear(64, 64, bias=False)))
    assert [line[:2] for line in lines] == [
        ["64 to 64", "8"],
        ["64 to 64", "16"],
        ["64 to 32", "8"],
        ["64 to 32", "16"],
    ]
    times = {(row["shape"].replace("->", " to "), str(row["tokens"]), row["layer"]): row["step_ms"] for row in rows}
    for shape, tokens, *ratios, _ in lines:
        for name, ratio in zip(names.values(), ratios, strict=True):
            expected = times[shape, tokens, "fura"] / times[shape, tokens, name]
            assert float(ratio) == pytest.approx(expected, rel=6e-3), "three digits"


def test_a_contender_left_out_at_a_shape_has_an_empty_cell_and_a_gpu_a_second_table():
    columns = {"tokens": 8, "fura_step_ratio": 0.5, "fura_peak_ratio": 0.25, "fura_graph_ratio": None}
    rows = [
        {"shape": shape, "layer": name} | columns
        for shape, name in (("a->b", "lora"), ("a->b", "oft"), ("c->d", "lora"))
    ]
    assert report.layer_table(rows, "fura_step_ratio") == [
        {"layer": "a to b", "tokens": 8, "LoRA": 0.5, "OFT": 0.5, "peak memory / LoRA": 0.25},
        {"layer": "c to d", "tokens": 8, "LoRA": 0.5, "OFT": None, "peak memory / LoRA": 0.25},
    ]
    _, _, graphs = report.layer_tables(rows).partition("The same as CUDA graphs, without the launches:")
    assert "| a to b | 8 |  |  | 0.25 |" in graphs


def test_what_no_cuda_graph_takes_has_an_empty_cell():
    rows = [{"layer": name} for name in ("frozen", "fura", "oft")]
    layer.add_graph_times(rows, {"frozen": 1e-3, "fura": 2e-3, "oft": None})
    assert report.markdown(rows).splitlines()[2:] == ["| frozen | 1 | 2 |", "| fura | 2 | 1 |", "| oft |  |  |"]
    layer.add_graph_times(rows, {"frozen": 1e-3, "fura": None, "oft": 4e-3})
    assert [row["fura_graph_ratio"] for row in rows] == [None, None, None], "ratios are of fura's time"
    assert [row["graph_step_ms"] for row in rows] == [1.0, None, 4.0]


def test_a_capture_that_fails_is_named_and_tried_again_only_where_memory_was_short(monkeypatch, capsys):
    class Graph:
        def replay(self):
            calls.append("replay")

    def capture(call, device):
        calls.append(call)
        if call == "reads":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        if call == "large":
            raise torch.OutOfMemoryError("out of memory")
        return Graph()

    calls, uncaptured = [], set()
    monkeypatch.setattr(graphed, "capture", capture)
    named = {"fura": "fura", "oft": "reads", "dora": "large"}
    for tried in (["fura", "reads", "large"], ["fura", "large"]):
        calls.clear()
        times = graphed.interleaved_medians(named, small_settings(), uncaptured)
        assert [call for call in calls if call != "replay"] == tried
        assert calls.count("replay") == 4 + (1 + 3) * graphed.REPLAYS, "four to judge, a warm-up and three repeats"
        assert times["fura"] > 0
        assert times["oft"] is times["dora"] is None
    assert capsys.readouterr().out.count("oft has no time as a CUDA graph: operation not permitted when stream") == 1


@pytest.mark.parametrize(("fastest", "count"), [(0.9, graphed.REPLAYS), (1.1, 1)])
def test_all_that_are_compared_are_replayed_equally_often_long_ones_one_by_one(fastest, count, monkeypatch):
    now, replayed = [0.0], []

    class Graph:
        def __init__(self, call):
            self.name, self.seconds = call

        def replay(self):
            first = self.name not in replayed
            replayed.append(self.name)
            now[0] += self.seconds + (1.0 if first else 0.0)  # the first replay uploads the graph

    monkeypatch.setattr(graphed, "capture", lambda call, device: Graph(call))
    calls = {name: (name, factor * graphed.LONG_SECONDS) for name, factor in (("short", fastest), ("long", 1.2))}
    times = graphed.interleaved_medians(calls, small_settings(clock=lambda: now[0]), set())
    assert times == pytest.approx({name: seconds for name, seconds in calls.values()})
    assert replayed == 4 * ["short", "long"] + 4 * [*["short"] * count, *["long"] * count]


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_is_around_the_forward_of_every_contender_and_recorded(autocast, tmp_path, monkeypatch):
    forwards, backwards = {}, {}

    def watched(linear):
        contenders = make_contenders(linear)
        for name, contender in contenders.items():
            contender.register_forward_hook(lambda module, inputs, output, name=name: watch(name, inputs[0], output))
        return contenders

    def watch(name, x, output):
        if x.dtype == torch.float32:  # the reference of its gradients, a copy
            return
        found = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        forwards.setdefault(name, set()).add(found)
        if output.requires_grad:
            output.register_hook(lambda grad: backwards.setdefault(name, set()).add(torch.is_autocast_enabled("cpu")))

    monkeypatch.setattr(layer, "make_contenders", watched)
    settings = small_settings(
        dtype=torch.bfloat16, shapes=((64, 64),), tokens=(8,), autocast=autocast, out=tmp_path, clock=time.process_time
    )
    assert measure_all(["layer"], settings) == 0
    names = set(make_contenders(torch.nn.Linear(64, 64, bias=False)))
    assert forwards == {name: {torch.bfloat16 if autocast else False} for name in names}
    assert backwards == {name: {False} for name in names}
    assert json.loads((tmp_path / "benchmark.json").read_text())["machine"]["autocast"] == autocast
    assert ("bfloat16 (layers under autocast)" in (tmp_path / "benchmark.md").read_text()) == autocast


def test_autocast_of_float32_is_refused(tmp_path, capsys):
    main = runpy.run_path(str(REPOSITORY / "launch" / "benchmark.py"))["main"]
    small = ["--device", "cpu", "--sizes", "tiny", "--tokens", "8", "--repeats", "3", "--out", str(tmp_path)]
    assert main(["layer", *small, "--autocast"]) == 2
    assert "--autocast of float32 changes nothing; give --dtype bfloat16 or float16" in capsys.readouterr().err
    assert main(["fold", *small, "--dtype", "bfloat16", "--autocast"]) == 2
    assert "--autocast is for the layer benchmark, and fold would leave it out" in capsys.readouterr().err


def test_a_report_of_several_benchmarks_says_that_its_layers_ran_under_autocast_and_the_help_what_that_is(
    tmp_path, capsys
):
    settings = small_settings(
        dtype=torch.bfloat16, shapes=((64, 64),), tokens=(8,), autocast=True, out=tmp_path, clock=time.process_time
    )
    assert measure_all(["layer", "fold"], settings) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "bfloat16 (layers under autocast)" in line
    assert (tmp_path / "benchmark.md").read_text().splitlines()[0] == line
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(written["results"]) == ["layer", "fold"]
    assert written["machine"]["autocast"] is True
    main = runpy.run_path(str(REPOSITORY / "launch" / "benchmark.py"))["main"]
    with pytest.raises(SystemExit):
        main(["layer", "--help"])
    explained = " ".join(capsys.readouterr().out.partition("--autocast ")[2].partition("--sizes")[0].split())
    assert "every layer's forward under autocast of a 16-bit --dtype" in explained
    assert "the report says so" in explained


def test_forward_and_backward_of_a_graph_are_those_of_a_step():
    contenders = layer.moved_contenders(small_settings(), (64, 64))
    for contender in contenders.values():
        x, grad = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
        gradients = layer.gradients_of(contender, x, grad, small_settings())()
        assert x.grad is None
        contender(x).backward(grad)
        trained = [p for p in contender.parameters() if p.requires_grad]
        assert all(torch.equal(a, b.grad) for a, b in zip(gradients, [x, *trained], strict=True))


def test_a_whole_model_that_is_converted_wrongly_is_not_reported(monkeypatch):
    [row] = model.run(small_settings())
    assert row["convert_s"] > 0
    decompose = frames.svd_frame

    def others_directions(weight, size):
        frame = decompose(weight, size)
        return frames.Frame(frame.right.flip(0), frame.singular_values)

    monkeypatch.setattr(frames, "svd_frame", others_directions)
    with pytest.raises(RuntimeError, match=r"the frame of model\.layers\.0.* exceeds"):
        model.run(small_settings())


def test_a_step_is_measured_on_every_size_and_what_memory_cannot_hold_is_named(monkeypatch, capsys):
    def measured(settings, size, method):
        if (size, method) == ("3m", "full"):
            raise torch.OutOfMemoryError("CUDA out of memory.\nand more")
        seconds = {"fura": 1.0, "lora": 2.0, "full": 4.0}[method]
        return {"model": size, "method": method, "train_s": seconds * {"tiny": 1, "3m": 8}[size]}

    monkeypatch.setattr(grpo_step, "measure_method", measured)
    settings = small_settings(models=("tiny", "3m"))
    rows = grpo_step.run(settings)
    assert [(row["model"], row["method"], row["fura_train_ratio"]) for row in rows] == [
        ("tiny", "fura", 1.0), ("tiny", "lora", 0.5), ("tiny", "full", 0.25), ("3m", "fura", 1.0), ("3m", "lora", 0.5)
    ]  # fmt: skip
    assert settings.budget.skipped == ["step ('3m', 'full')"]
    assert "step: skipped ('3m', 'full'), CUDA out of memory.\n" in capsys.readouterr().out


def test_a_model_that_memory_cannot_hold_is_not_begun(monkeypatch, capsys):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1e8)
    settings = small_settings(models=("tiny", "qwen3-0.6b"))
    small, large = model.run(settings)
    assert small["convert_s"] > 0
    assert large["convert_s"] == large["beyond_gb"] == "not run"
    assert [row["model"] for row in grpo_step.run(settings)] == ["tiny"] * 3
    skipped = ["model the conversion of qwen3-0.6b", *(f"step ('qwen3-0.6b', '{m}')" for m in grpo_step.METHODS)]
    assert settings.budget.skipped == skipped
    assert "it needs 2.4 GB of memory, and 0.1 are free" in capsys.readouterr().out


def test_the_table_of_4_bits_has_error_bits_and_peak_of_every_storage_and_spectrum():
    pytest.importorskip("bitsandbytes")
    rows = quantize.run(small_settings(shapes=((128, 256),)))
    storages = ["NF4(W)", "NF4(L) S R", "NF4(L S^1/2) S^1/2 R", "NF4(L S) R"]
    assert [(row["spectrum"], row["storage"]) for row in rows] == [
        (spectrum, storage) for spectrum in ("random", "real-shaped") for storage in storages
    ]
    small = 16 * (256 * 16 + 256) / (128 * 256)  # R and S of blocks of 16, in 16 bits
    for row in rows:
        assert 0.05 < row["relative_error"] < 0.15
        assert row["bits_per_weight"] == pytest.approx(4.127 + (0 if row["storage"] == "NF4(W)" else small), abs=1e-3)
        assert row["peak_mb"] > 128 * 256 * 4 / 1e6, "the result alone, in float32"


def test_a_step_that_leaves_nan_is_not_reported(monkeypatch):
    assert [row["method"] for row in grpo_step.run(small_settings())] == ["fura", "lora", "full"]
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, float("nan"), **options))
    with pytest.raises(RuntimeError, match=r"fura: a step of tiny in torch\.float32 leaves non-finite values"):
        grpo_step.run(small_settings())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_whose_log_probs_are_wrong_is_not_reported(dtype, monkeypatch):
    def unmoved(self, x, cores):
        return self.base_layer(x) + 0 * cores[0].delta_s.sum()

    monkeypatch.setattr(FuraLinear, "_base_forward", unmoved)
    wrong = rf"fura: log-probs of tiny \(2 of 2 decoder layers\) in {dtype} are 0\.0\d+ nats \(RMS\) from"
    with pytest.raises(RuntimeError, match=wrong):
        grpo_step.run(small_settings(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["fura", "lora", "full"])
def test_log_probs_are_checked_over_as_many_layers_as_fit_in_float32(method, dtype, monkeypatch):
    settings = small_settings(dtype=dtype)
    policy, _ = grpo_step.make_policy(settings, "tiny", method)
    sequences = torch.randint(3, 512, (1, 32))
    monkeypatch.setattr(grpo_step, "checked_layers", lambda size: 1)
    grpo_step.check_logprobs(settings, "tiny", method, policy, sequences, 16)
    assert policy.config.num_hidden_layers == 2, "the step that follows has all"
    monkeypatch.setattr(grpo_step, "float32_reference", lambda *_: policy)
    with pytest.raises(RuntimeError, match=r"1 of 2 decoder layers"):
        grpo_step.check_logprobs(settings, "tiny", method, policy, sequences, 16)


def test_a_float32_reference_of_a_1_7b_is_whole_and_one_of_a_7b_has_its_first_layers():
    assert [grpo_step.checked_layers(size) for size in ("tiny", "qwen3-1.7b", "7b")] == [2, 28, 4]
    for size in ("qwen3-1.7b", "7b"):
        layers = grpo_step.checked_layers(size)
        model = random_model(size, torch.device("meta"), torch.float32, layers)
        assert len(model.model.layers) == layers
        assert sum(p.nbytes for p in model.parameters()) < grpo_step.REFERENCE_BYTES + 2**20, "norms beside"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sync_is_timed_only_where_the_engine_computes_as_the_folded_weights_in_float32(dtype, tmp_path):
    from fura_rl.sync.vllm_engine import InProcessEngine

    settings = small_settings(dtype=dtype)
    sync_engines.make_checkpoint(settings, "tiny", tmp_path)
    engine = InProcessEngine(start_llm(tmp_path, sync_engines.dtype_name(dtype)))
    for method in sync.METHODS:
        policy = sync.make_policy(settings, tmp_path, method)
        measured = settings, "tiny", method, policy, engine.prompt_logprobs
        ways = sync.in_process_ways(policy, engine)
        assert [row["sync"] for row in sync.measure_ways(*measured, ways)] == ["stock", "dense", "factored"]
        ways["factored"] = sync.Way(dict)  # the engine is left with the weights before
        with pytest.raises(RuntimeError, match=rf"tiny, {method}, factored: .* (differ by|in {dtype} are) .* nats"):
            next(sync.measure_ways(*measured, ways))


def test_a_soak_tells_what_grows_after_its_warm_up():
    flat = soak_of(lambda step: 500 + 10 * min(step, 150), lambda step: 1.0)
    assert flat["trainer: memory, MB"]["growth"] == flat["step, s"]["growth"] == "+0.0%"
    unevenly_seen = soak_of(lambda step: 1000 + (500 if step % (10 if step < 1000 else 4) else 0), lambda step: 1.0)
    assert unevenly_seen["trainer: memory held between steps, MB"]["growth"] == "+0.0%"
    growing = soak_of(lambda step: 1000 + step / 10, lambda step: 1 + step / 1000)
    assert growing["trainer: memory, MB"]["growth"] == "+15.5%"
    assert growing["trainer: memory held between steps, MB"]["growth"] == "+15.6%"
    assert growing["step, s"]["growth"] == "+123.0%"
    assert growing["trainer: open files"]["growth"] == "+0.0%"


def test_the_step_of_a_soak_is_that_of_the_last_whole_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert soak.last_step(file) == 0
    file.write_text('{"ste')
    assert soak.last_step(file) == 0
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert soak.last_step(file) == 2
