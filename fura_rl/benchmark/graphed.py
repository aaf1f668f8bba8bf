"""Seconds of a call replayed as a CUDA graph: what its kernels take, without the launches that hide them where they are
small.

Calls read and write the same tensors at every replay.  What cannot be captured (it reads a number back, or allocates
past PyTorch) is named and has no time.  Order of work as in "CUDA graphs" of PyTorch's notes on CUDA semantics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fura_rl.benchmark import measure
from fura_rl.benchmark.measure import Settings

WARM_UPS = 3  # on the capturing stream, as `torch.cuda.make_graphed_callables` does: libraries set themselves up there
REPLAYS = 8  # timed as one: they share the launch of a graph and the wait for its end, some 30 us on a virtual machine
# Of the fastest replay where each is timed alone: 30 us are 1% of it, and eight in a row heat a GPU until its clock
# falls (the largest frozen map took 13% longer than called).
LONG_SECONDS = 3e-3


def interleaved_medians(
    calls: dict[str, Callable[[], Any]], settings: Settings, uncaptured: set[str]
) -> dict[str, float | None]:
    """Median seconds of one replay of each call, None where it has no graph.

    `uncaptured` names the calls that are known to have none and gets those that turn out so: a failed capture never
    gives its memory back, so it is not tried again with more tokens.
    """
    graphs = {}
    for name, call in calls.items():
        if name in uncaptured:
            continue
        try:
            graphs[name] = capture(call, settings.device)
        except RuntimeError as error:  # of CUDA, of the allocator (out of memory) or of what refuses to be captured
            if not isinstance(error, torch.OutOfMemoryError):
                uncaptured.add(name)
            print(f"layer: {name} has no time as a CUDA graph: {str(error).splitlines()[0]}", flush=True)
    count = replays_of(graphs, settings)
    replays = {name: replayed(graph, count) for name, graph in graphs.items()}
    times = measure.interleaved_medians(replays, settings)
    del graphs, replays  # and with them the memory that each has to itself
    measure.release(settings.device)
    return {name: times[name] / count if name in times else None for name in calls}


def replays_of(graphs: dict[str, torch.cuda.CUDAGraph], settings: Settings) -> int:
    """How many replays of a graph are timed as one: one number for all that are compared.

    Else the launch, the wait and the clock that the replays before left would differ on the two sides of a ratio.

    By the fastest, of whose time they are the largest part: its median of three after the first, which uploads it.
    """
    replays = {name: graph.replay for name, graph in graphs.items()}
    seconds = measure.interleaved_medians(replays, dataclasses.replace(settings, repeats=3))
    return 1 if min(seconds.values(), default=0.0) > LONG_SECONDS else REPLAYS


def replayed(graph: torch.cuda.CUDAGraph, count: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(count):
            graph.replay()

    return call


def capture(call: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """`call` as a graph, whose tensors must outlive it.

    Raises:
        RuntimeError: where it cannot be captured; later work on the device goes on as if it had not been tried.
    """
    with torch.cuda.device(device):
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        random_state = generator.clone_state()
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # leaves the stream too where the end of a failed capture raises
                for _ in range(WARM_UPS):
                    call()
                with torch.cuda.graph(graph, stream=stream):
                    call()
        except RuntimeError:
            torch.cuda.synchronize()
            # An invalid capture leaves the generator believing in it, and the next random number would raise
            # (`CUDAGraph::capture_end` of torch 2.13 raises before it tells the generator).
            generator.graphsafe_set_state(random_state)
            raise
        torch.cuda.current_stream().wait_stream(stream)
        return graph
