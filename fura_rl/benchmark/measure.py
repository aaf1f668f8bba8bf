"""How every benchmark measures: interleaved medians, peak memory, saved activations, and what the machine can do."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fura_rl.benchmark.budget import Budget


@dataclass(frozen=True)
class Settings:
    """What `launch/benchmark.py` was asked for."""

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]  # (out_features, in_features)
    tokens: tuple[int, ...]
    repeats: int
    seconds: float  # a measurement stops repeating after this long, but never before three repeats
    sizes: tuple[str, ...]  # keys of `models.SIZES` whose layers are measured
    models: tuple[str, ...]  # keys of it too: those that the whole-model benchmarks run
    autocast: bool = False  # every contender of the layer benchmark runs forward under autocast of `dtype`
    clock: Callable[[], float] = time.perf_counter  # seconds; `time.process_time` where others share the machine
    budget: Budget = field(default_factory=Budget)
    seeds: int = 5  # of studies that train
    steps: int = 50  # of each of their runs; and syncs after which a base weight is looked at for drift
    out: Path = Path("outputs/benchmark")  # where studies keep what they have finished


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what the models before held, so that the next one's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def autocast(settings: Settings) -> AbstractContextManager[Any]:
    """Around a forward, as `bf16: true` puts it: what is trained stays as it is stored (float32 but for the
    paper-style layer), its products are in `dtype`."""
    return torch.autocast(settings.device.type, settings.dtype) if settings.autocast else nullcontext()


@torch.no_grad()
def move(module: nn.Module) -> None:
    """Move its adapters as training would: at their start their products are zero, and some are skipped."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn_like(parameter))


def interleaved_medians(
    contenders: dict[str, Callable[[], Any]], settings: Settings, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each contender, called in turns so that a drift of the machine reaches all alike."""
    for _ in range(warm_up):
        for call in contenders.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    begun = time.perf_counter()
    for repeat in range(settings.repeats):
        for name, call in contenders.items():
            synchronize(settings.device)
            started = settings.clock()
            call()
            synchronize(settings.device)
            times[name].append(settings.clock() - started)
        if repeat >= 2 and time.perf_counter() - begun > settings.seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most memory that `call` holds at once, beyond what was allocated before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def peak_process_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """As `peak_bytes`, for calls with threads of their own, which the profiler does not see.

    On a CPU the growth of the process's resident memory, libraries' workspaces included (Linux only).
    """
    if device.type == "cuda" or not Path("/proc/self/clear_refs").exists():
        return peak_bytes(call, device)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the allocator kept would hide what the call needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: proc(5)
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def resident_bytes(field_name: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the most) of this process: proc(5)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field_name))
    return 1024 * int(line.split()[1])


def free_bytes(device: torch.device) -> float:
    """Memory that is still to be had on the device; inf where the system does not say: proc(5)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def require_memory(needed: float, device: torch.device) -> None:
    """Raises torch.OutOfMemoryError where there is less; a CPU's system would end the process instead."""
    release(device)
    if needed > (free := free_bytes(device)):
        raise torch.OutOfMemoryError(f"it needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free")


def saved_activation_bytes(call: Callable[[], Any], module: nn.Module) -> int:
    """What one forward keeps for its backward, in bytes of distinct storage, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = call()
    del output
    return sum(saved.values())


def machine(settings: Settings) -> dict[str, Any]:
    """Name, versions, and the copy bandwidth and matmul rate that this machine reaches, for scale."""
    import peft
    import transformers

    device, dtype = settings.device, settings.dtype
    large = device.type == "cuda"
    source = torch.empty((2**30 if large else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    size = 8192 if large else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = interleaved_medians({"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}, settings)
    return {
        "device": torch.cuda.get_device_name(device) if large else f"{platform.processor() or platform.machine()} CPU",
        "threads": None if large else torch.get_num_threads(),
        "clock": settings.clock.__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": settings.autocast,
        "copy_gb_per_second": round(2 * source.nbytes / times["copy"] / 1e9, 1),
        "matmul_tflop_per_second": round(2 * size**3 / times["matmul"] / 1e12, 3),
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def check(name: str, actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """A benchmark of a wrong result is worth nothing.

    Raises:
        RuntimeError: where `actual` is further from the float32 reference than rounding explains.
    """
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    error = relative_error(actual, expected)
    if not error < tolerance:
        raise RuntimeError(f"{name}: relative error {error:.2g} against the float32 reference exceeds {tolerance:.0e}")
