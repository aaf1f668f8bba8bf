"""A weight sync into a live vLLM engine: small factors and whole weights, against TRL's merge, push and unmerge.

In process and through a real server.  Before anything is timed, what the engine computes after each kind of sync is
compared with the policy's folded weights in float32.  Every sync follows a fresh step of the policy; it is timed with
the audit of every kernel and without the probe prompt, which by default belongs to one sync in ten (its gap is
reported).  Then the payload of real models by arithmetic, and what a thousand syncs leave of bfloat16 base weights.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fura_rl.adapters.blocks import default_block_size
from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.fura_tuner import PAPER_TARGETS
from fura_rl.benchmark import measure, sync_engines
from fura_rl.benchmark.measure import Settings
from fura_rl.benchmark.models import SIZES, projection_shapes
from fura_rl.benchmark.reference import check_logprobs_against, float32_reference
from fura_rl.sync import probe

if TYPE_CHECKING:
    from fura_rl.sync.engine import RolloutEngine
    from fura_rl.sync.vllm_engine import InProcessEngine
    from fura_rl.sync.weight_sync import SyncReport

RANK = 32  # LoRA's
TOKENS = list(range(3, 35))
NEVER = 10**9
COPY_BYTES = 2**28
DRIFT, DRIFT_SIZE = "drift", "tiny"
Phases = dict[str, float]

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "fura": lambda: FuraConfig(target_modules=PAPER_TARGETS),
    "lora": lambda: LoraConfig(target_modules=PAPER_TARGETS, r=RANK, lora_alpha=RANK),
}
COLUMNS = (
    *("model", "method", "sync", "seconds", "to_stock", "to_floor", "to_copy_and_matmul", "phases_s"),
    *("payload_mb", "payload_frac", "beyond_mb", "gap_nats", "base_drift_frac"),
)


class SkippedError(RuntimeError):
    """This machine lacks what the benchmark needs."""


@dataclass
class Way:
    """One way to bring an engine to the policy, and what was measured of it."""

    sync: Callable[[], Phases]
    payload_bytes: Callable[[], float | None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    phases: list[Phases] = field(default_factory=list)

    def time_once(self, device: torch.device) -> None:
        measure.synchronize(device)
        started = time.perf_counter()
        phases = self.sync()
        measure.synchronize(device)
        self.seconds.append(time.perf_counter() - started)
        self.phases.append(phases)

    def result(self) -> dict[str, Any]:
        names = [name for name, most in self._medians(max).items() if most >= 5e-4]
        medians = self._medians(statistics.median)
        return {
            "seconds": statistics.median(self.seconds),
            "phases_s": ", ".join(f"{name} {medians[name]:.3g}" for name in names),
        }

    def _medians(self, summary: Callable[[list[float]], float]) -> Phases:
        return {name: summary([phases[name] for phases in self.phases]) for name in self.phases[0]}


def run(settings: Settings) -> list[dict[str, Any]]:
    """Raises SkippedError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise SkippedError("vllm is not installed")
    units = {f"{size} {place}": (size, there) for size in settings.models for place, there in PLACES.items()}
    rows = [payload_row(size, method) for size in ("qwen3-1.7b", "7b") for method in METHODS]
    with tempfile.TemporaryDirectory(prefix="fura-benchmark-") as folder:
        for unit in settings.budget.units("sync", [*units, DRIFT]):
            size, measure_there = units.get(unit, (DRIFT_SIZE, drift_rows))
            here = replace(settings, dtype=torch.bfloat16) if unit == DRIFT else settings
            checkpoint = Path(folder) / f"{size}-{sync_engines.dtype_name(here.dtype)}"
            if not checkpoint.is_dir():
                sync_engines.make_checkpoint(here, size, checkpoint)
            rows += measure_there(here, size, checkpoint)
            measure.release(settings.device)
    return [{name: row.get(name, "") for name in COLUMNS} for row in rows]


def measure_in_process(settings: Settings, size: str, checkpoint: Path) -> Iterator[dict[str, Any]]:
    from fura_rl.sync.vllm_engine import InProcessEngine

    llm = sync_engines.start_in_process(settings, checkpoint)
    for method in METHODS:
        engine = InProcessEngine(llm)  # a new one: it keeps its last update, and with it the policy
        policy = make_policy(settings, checkpoint, method)
        ways = in_process_ways(policy, engine)
        yield from measure_ways(settings, size, method, policy, engine.prompt_logprobs, ways)
        del engine, policy, ways
        measure.release(settings.device)


def measure_server(settings: Settings, size: str, checkpoint: Path) -> Iterator[dict[str, Any]]:
    with sync_engines.rollout_server(settings, checkpoint) as transport:
        for method in METHODS:
            policy = make_policy(settings, checkpoint, method)
            ways, close = server_ways(policy, transport, large=size not in ("tiny", "3m"))
            yield from measure_ways(settings, size, method, policy, transport.prompt_logprobs, ways)
            close()
            del policy, ways, close
            measure.release(settings.device)


def make_policy(settings: Settings, checkpoint: Path, method: str) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=settings.dtype).to(settings.device)
    policy = get_peft_model(model, METHODS[method]())
    for parameter in policy.parameters():
        # copied, since pages of a checkpoint that is mapped into memory would come and go in the measured peak
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data.clone()
    return policy


def in_process_ways(policy: PeftModel, engine: InProcessEngine) -> dict[str, Way]:
    return {
        "stock": Way(lambda: sync_engines.stock_sync(policy, engine)),
        "dense": our_way(policy, engine, "dense"),
        "factored": our_way(policy, engine, "factored"),
    }


def server_ways(policy: PeftModel, transport: Any, large: bool) -> tuple[dict[str, Way], Callable[[], None]]:
    """There is no stock way: TRL's client refuses servers without CUDA.  `large` weights do not go inline."""
    from fura_rl.sync.remote_engine import RemoteEngine

    engine = RemoteEngine(transport)
    syncs = {mode: our_way(policy, engine, mode) for mode in ("dense", "factored")}

    def through(payload_transport: str, way: Way) -> Way:
        def sync() -> Phases:
            transport.payload_transport = payload_transport
            return way.sync()

        return Way(sync, way.payload_bytes)

    ways = {
        f"{mode}, server, {payload}": through(payload, way)
        for mode, way in syncs.items()
        for payload in ("file", "inline")
        if not (large and mode == "dense" and payload == "inline")
    }
    return ways, engine.close


def our_way(policy: PeftModel, engine: RolloutEngine, mode: str) -> Way:
    from fura_rl.sync.weight_sync import WeightSync

    sync = WeightSync(policy, engine, TOKENS, probe_every=NEVER, mode=mode)
    reports: list[SyncReport] = []

    def once() -> Phases:
        reports[:] = [sync.sync()]
        return reports[0].phases

    def payload_bytes() -> float | None:
        return None if engine.reads_the_trainers_base else reports[0].payload_bytes

    return Way(once, payload_bytes)


def measure_ways(
    settings: Settings,
    size: str,
    method: str,
    policy: PeftModel,
    engine_logprobs: Callable[[list[int]], torch.Tensor],
    ways: dict[str, Way],
) -> Iterator[dict[str, Any]]:
    """One row for each of `ways`, called in turns, each after a step of the policy; the machine's rates in between."""
    step = functools.partial(take_step, policy, torch.Generator(settings.device).manual_seed(0))
    gaps = {}
    for name, way in ways.items():  # also the warm-up: the first sync is probed, and learns where weights go
        measure.move(policy)  # so far that an engine left behind is not taken for one that rounds
        way.sync()
        served = engine_logprobs(TOKENS)
        gaps[name] = probe.max_gap(served, probe.trainer_logprobs(policy, TOKENS))
        if gaps[name] > probe.default_tolerance(settings.dtype):
            raise RuntimeError(f"{size}, {method}, {name}: engine and policy differ by {gaps[name]:.3g} nats")
        check_logprobs_against(
            float32_reference(policy, size, settings.device),
            functools.partial(probe.trainer_logprobs, token_ids=TOKENS),
            f"{size}, {method}, {name}: the engine's log-probs",
            served,
            settings.dtype,
        )
    measure.release(settings.device)
    rates = machine_rates(settings)
    begun = time.perf_counter()
    for repeat in range(settings.repeats):
        for way in (*rates.values(), *ways.values()):
            step()
            way.time_once(settings.device)
        if repeat >= 2 and time.perf_counter() - begun > settings.seconds * len(ways):
            break
    floor, work = floors(settings, size, method, rates)
    dense_bytes = linear_elements(size) * settings.dtype.itemsize
    stock = statistics.median(ways["stock"].seconds) if "stock" in ways else None
    for name, way in ways.items():
        step()
        beyond = measure.peak_process_bytes(way.sync, settings.device)
        row = {"model": size, "method": method, "sync": name, **way.result(), "gap_nats": gaps[name]}
        row |= {"to_floor": row["seconds"] / floor, "to_copy_and_matmul": row["seconds"] / (floor + work)}
        row |= {"beyond_mb": beyond / 1e6}
        if stock:
            row["to_stock"] = row["seconds"] / stock
        if payload := way.payload_bytes():
            row |= {"payload_mb": payload / 1e6, "payload_frac": payload / dense_bytes}
        print(f"  {row}", flush=True)
        yield row


@torch.no_grad()
def take_step(policy: PeftModel, generator: torch.Generator) -> None:
    """Moves every trained parameter a little, as an optimizer would: a sync of unmoved weights shows nothing."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.add_(noise.to(parameter.dtype), alpha=1e-3)


# ---- what a sync must at least take


def machine_rates(settings: Settings) -> dict[str, Way]:
    """A copy of COPY_BYTES and a 1024 x 1024 product, as contenders among the syncs."""
    source = torch.ones(COPY_BYTES // 4, device=settings.device)
    target = torch.empty_like(source)
    left = torch.randn(1024, 1024, device=settings.device, dtype=settings.dtype)

    def timed(call: Callable[[], Any]) -> Way:
        def sync() -> Phases:
            call()
            return {}

        return Way(sync)

    return {"copy": timed(lambda: target.copy_(source)), "matmul": timed(lambda: left @ left)}


def floors(settings: Settings, size: str, method: str, rates: dict[str, Way]) -> tuple[float, float]:
    """Seconds to read every linear weight once and write it once, and seconds of the fold's products."""
    moved_bytes = linear_elements(size) * settings.dtype.itemsize
    copy = statistics.median(rates["copy"].seconds) * moved_bytes / COPY_BYTES
    flop = sum(2 * o * i * width(method, o, i) for o, i in all_shapes(size))
    return copy, statistics.median(rates["matmul"].seconds) * flop / (2 * 1024**3)


def width(method: str, out_features: int, in_features: int) -> int:
    return RANK if method == "lora" else default_block_size(in_features, out_features)


def all_shapes(size: str) -> list[tuple[int, int]]:
    return list(projection_shapes(size)) * SIZES[size]["num_hidden_layers"]


def linear_elements(size: str) -> int:
    return sum(o * i for o, i in all_shapes(size))


def payload_row(size: str, method: str) -> dict[str, Any]:
    """What a factored sync of `size` sends to a 16-bit engine, without a model: (n, b, b) of FuRA, B and A of LoRA."""
    numbers = sum(width(method, o, i) * (o + i if method == "lora" else i) for o, i in all_shapes(size))
    return {
        "model": size,
        "method": method,
        "sync": "factored, by arithmetic",
        "payload_mb": 2 * numbers / 1e6,
        "payload_frac": numbers / linear_elements(size),
    }


# ---- drift of the base weights


def drift_rows(settings: Settings, size: str, checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The mean move of a base weight in `settings.dtype` after `settings.steps` syncs, over its mean size."""
    from fura_rl.sync.vllm_engine import InProcessEngine

    engine = InProcessEngine(sync_engines.start_in_process(settings, checkpoint))
    for method in METHODS:
        for name in ("stock", "factored"):
            policy = make_policy(settings, checkpoint, method)
            step = functools.partial(take_step, policy, torch.Generator(settings.device).manual_seed(0))
            way = in_process_ways(policy, engine)[name]
            start = base_weights(policy)
            for _ in range(settings.steps):
                step()
                way.time_once(settings.device)
            moved = (base_weights(policy) - start).abs().mean() / start.abs().mean()
            what = f"{name}, {settings.steps} times in {sync_engines.dtype_name(settings.dtype)}"
            row = {"model": size, "method": method, "sync": what} | way.result() | {"base_drift_frac": float(moved)}
            print(f"  {row}", flush=True)
            yield row


def base_weights(policy: PeftModel) -> torch.Tensor:
    """All adapted base weights as one vector, in float32."""
    from fura_rl.sync.fold import checkpoint_weights, pristine_weight

    adapted = [weight for weight in checkpoint_weights(policy) if weight.layer is not None]
    return torch.cat([pristine_weight(weight).detach().float().flatten() for weight in adapted]).clone()


PLACES = {"in process": measure_in_process, "server": measure_server}
