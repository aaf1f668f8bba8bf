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


def machine_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    threads += ", CPU time" if machine["clock"] == "process_time" else ""
    return (
        f"{machine['device']}{threads}, {machine['dtype']}: copies {machine['copy_gb_per_second']} GB/s, multiplies "
        f"{machine['matmul_tflop_per_second']} TFLOP/s; {versions}"
    )


def write(out: Path, results: dict[str, list[dict[str, Any]]], machine: dict[str, Any]) -> list[Path]:
    """`benchmark.json`, `benchmark.md` and, where matplotlib is installed, `layer.png`.  Returns the paths."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "benchmark.json", out / "benchmark.md"]
    files[0].write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    sections = [machine_line(machine)] + [f"## {name}\n\n{markdown(rows)}" for name, rows in results.items() if rows]
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
