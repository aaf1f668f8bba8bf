"""A benchmark's rows as a markdown table (the README's), JSON, and a plot of the layer timings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a table; floats to three significant digits, None as an empty cell."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([cell(row[key]) for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LAYER_NAMES = {"frozen": "frozen linear", "lora": "LoRA", "lora r=64": "LoRA r=64", "dora": "DoRA", "oft": "OFT"}
LAYER_NAMES |= {"paper": "paper-style layer"}


def layer_table(rows: list[dict[str, Any]], ratio: str) -> list[dict[str, Any]]:
    """The README's layer table: a row per shape and tokens, fura's `ratio` to every contender measured.

    A contender that was left out at some shape has an empty cell there.
    """
    contenders = [name for name in dict.fromkeys(row["layer"] for row in rows) if name != "fura"]
    table = []
    for shape, tokens in dict.fromkeys((row["shape"], row["tokens"]) for row in rows):
        measured = {row["layer"]: row for row in rows if (row["shape"], row["tokens"]) == (shape, tokens)}
        ratios = {LAYER_NAMES.get(name, name): measured.get(name, {}).get(ratio) for name in contenders}
        peak = measured.get("lora", {}).get("fura_peak_ratio")
        table.append({"layer": shape.replace("->", " to "), "tokens": tokens} | ratios | {"peak memory / LoRA": peak})
    return table


def layer_tables(rows: list[dict[str, Any]]) -> str:
    """`layer_table` of the time on the wall and, where a GPU ran the layers as CUDA graphs, of that one."""
    tables = {"Forward and backward of a FuRA layer over the other's": "fura_step_ratio"}
    if "fura_graph_ratio" in rows[0]:
        tables["The same as CUDA graphs, without the launches"] = "fura_graph_ratio"
    return "\n\n".join(f"{title}:\n\n{markdown(layer_table(rows, ratio))}" for title, ratio in tables.items())


def machine_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    threads += ", CPU time" if machine["clock"] == "process_time" else ""
    dtype = f"{machine['dtype']} (layers under autocast)" if machine["autocast"] else machine["dtype"]
    return (
        f"{machine['device']}{threads}, {dtype}: copies {machine['copy_gb_per_second']} GB/s, multiplies "
        f"{machine['matmul_tflop_per_second']} TFLOP/s; {versions}"
    )


def write(out: Path, results: dict[str, list[dict[str, Any]]], machine: dict[str, Any]) -> list[Path]:
    """`benchmark.json`, `benchmark.md` and, where matplotlib is installed, `layer.png`.  Returns the paths."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "benchmark.json", out / "benchmark.md"]
    files[0].write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    sections = [machine_line(machine)]
    for name, rows in results.items():
        sections.append(f"## {name}\n\n{markdown(rows)}")
        if name == "layer":
            sections.append(layer_tables(rows))
    if machine.get("skipped"):
        sections.append("Skipped: " + "; ".join(machine["skipped"]))
    files[1].write_text("\n\n".join(sections) + "\n")
    if results.get("layer"):
        files += plot_layer(out / "layer.png", results["layer"], machine)
    return files


def pyplot_or_none() -> Any:
    """matplotlib's pyplot, drawing to files; None, with a line, where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    return pyplot


def plot_layer(path: Path, rows: list[dict[str, Any]], machine: dict[str, Any]) -> list[Path]:
    """Forward and backward against tokens, relative to the frozen layer, one panel per shape."""
    pyplot = pyplot_or_none()
    if pyplot is None:
        return []
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(4.2 * len(shapes), 3.6), squeeze=False, sharey=True)
    for axis, shape in zip(axes[0], shapes, strict=True):
        floor = {r["tokens"]: r["step_ms"] for r in rows if r["shape"] == shape and r["layer"] == "frozen"}
        for name in dict.fromkeys(row["layer"] for row in rows):
            points = [
                (r["tokens"], r["step_ms"] / floor[r["tokens"]])
                for r in rows
                if (r["shape"], r["layer"]) == (shape, name)
            ]
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                linewidth=2.4 if name == "fura" else 1.2,
                label=name,
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=shape.replace("->", " \N{RIGHTWARDS ARROW} "))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("forward + backward / frozen layer")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(machine_line(machine), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return [path]
