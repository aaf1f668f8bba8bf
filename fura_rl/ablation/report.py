"""The report of an ablation: a Markdown table, and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fura_rl.ablation.results import Interval, Line, Results
from fura_rl.ablation.spec import Spec
from fura_rl.report import write_json

NOTES = (
    "Every entry has the same prompts in the same order, the same rollout seeds and the same number of steps. The "
    "learning rate is the best of those tried on the validation split, by {measure}, mean over seeds; scores are of "
    "the test split, which takes no part in the choice. Intervals are 95% bootstrap intervals over test problems of "
    "each problem's mean over seeds; differences are paired, problem by problem; sd is the deviation over seeds."
)


def write_report(spec: Spec, results: Results, output: Path, environment: dict[str, Any]) -> list[Path]:
    """Write `report.md`, `report.html` and `results.json` to `output`; their paths."""
    write_json(output / "results.json", {"environment": environment, **asdict(results)})
    paths = [output / "report.md", output / "report.html", output / "results.json"]
    paths[0].write_text(markdown(spec, results, environment))
    paths[1].write_text(page(spec, results, environment))
    return paths


def score_rows(spec: Spec, results: Results) -> tuple[list[str], list[list[str]]]:
    # avg@n is pass@1 under another name
    others = [m for m in results.measures if m != spec.scoring.measure and not m.startswith("avg@")]
    columns = [
        "adapter",
        "learning rate",
        "seeds",
        spec.scoring.measure,
        f"minus {spec.baseline}",
        "sd",
        *others,
    ]
    rows = []
    for line in sorted(results.lines, key=lambda line: -line.scores[spec.scoring.measure]["mean"]):
        difference = line.differences.get(spec.scoring.measure)
        rows.append(
            [
                line.label,
                f"{line.learning_rate:g}" + (" (edge)" if line.at_edge else ""),
                str(line.seeds),
                shown(line.scores[spec.scoring.measure]),
                shown(difference, "+.3f") if difference else "baseline" if line.label == spec.baseline else "-",
                f"{line.seed_deviation[spec.scoring.measure]:.3f}",
                *(shown(line.scores[measure]) for measure in others),
            ]
        )
    return columns, rows


def cost_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    phases = list(results.lines[0].phase_seconds_per_step) if results.lines else []
    columns = ["adapter", "trained parameters", "peak memory", "sync", *(f"{phase}, s/step" for phase in phases)]
    rows = [
        [
            line.label,
            f"{line.trained_parameters:,}",
            f"{line.peak_memory_gib:.2f} GiB",
            f"{line.payload_bytes / 1e6:.2f} MB",
            *(f"{line.phase_seconds_per_step[phase]:.2f}" for phase in phases),
        ]
        for line in results.lines
    ]
    return columns, rows


def rate_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    rates = sorted({rate for line in results.lines for rate in line.validation}, key=float)
    rows = [
        [line.label, *(f"{line.validation[rate]:.3f}" if rate in line.validation else "-" for rate in rates)]
        for line in results.lines
    ]
    return ["adapter", *rates], rows


def shown(value: Interval, form: str = ".3f") -> str:
    return f"{format(value['mean'], form)} ({format(value['low'], form)} to {format(value['high'], form)})"


def sections(spec: Spec, results: Results) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    return [
        ("Scores on the test split", score_rows(spec, results)),
        ("Costs", cost_rows(results)),
        (f"Validation {spec.scoring.measure} by learning rate", rate_rows(results)),
    ]


def notes(spec: Spec, results: Results) -> list[str]:
    text = [NOTES.format(measure=spec.scoring.measure)]
    if spec.match_parameters:
        text.append(
            f"Trained parameters are matched to {spec.match_parameters} where an adapter's capacity can be set."
        )
    if spec.search_seeds:
        search, table = (", ".join(map(str, seeds)) for seeds in (spec.search_seeds, spec.seeds))
        text.append(
            f"Learning rates were chosen with seeds {search} alone; only the chosen ones were run with seeds {table}, "
            "which make the table."
        )
    edges = [line.label for line in results.lines if line.at_edge]
    if edges:
        text.append(f"Best at the edge of the learning rates tried, so perhaps better beyond: {', '.join(edges)}.")
    if results.failed:
        text.append(f"Failed cells: {', '.join(results.failed)}.")
    if results.unfinished:
        text.append(f"Not run to the end yet: {', '.join(results.unfinished)}.")
    return text


def conditions(environment: dict[str, Any], spec: Spec) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return [
        f"commit {environment['commit']}, {environment['device']}, {environment['cpu_threads']} threads, {versions}",
        f"seeds {', '.join(map(str, spec.seeds))}; {spec.scoring.num_samples} samples a problem",
    ]


def markdown(spec: Spec, results: Results, environment: dict[str, Any]) -> str:
    parts = []
    for title, (columns, rows) in sections(spec, results):
        table = [columns, ["---"] * len(columns), *rows]
        parts += [f"## {title}", "\n".join("| " + " | ".join(row) + " |" for row in table)]
    return "\n\n".join(["# Ablation", *notes(spec, results), *parts, *conditions(environment, spec)]) + "\n"


STYLE = """
:root { color-scheme: light dark; --ink: #1b1d22; --paper: #fff; --rule: #d8dbe2; --soft: #f4f5f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --paper: #14161b; --rule: #333844; --soft: #1d2028; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
img { width: 100%; max-width: 52rem; height: auto; } pre { overflow-x: auto; background: var(--soft); padding: .7rem; }
.light { display: inline; } .dark { display: none; }
@media (prefers-color-scheme: dark) { .light { display: none; } .dark { display: inline; } }
footer { margin-top: 2rem; font-size: .85rem; overflow-wrap: anywhere; }
"""


def page(spec: Spec, results: Results, environment: dict[str, Any]) -> str:
    """The report as one HTML page: style and pictures inside, no script, no address to load from."""
    parts = ["<h1>Ablation</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes(spec, results))]
    for title, (columns, rows) in sections(spec, results):
        head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(title)}</h2><div class='scroll'><table><tr>{head}</tr>{body}</table></div>")
    if results.lines:
        scores = functools.partial(plot_scores, measure=spec.scoring.measure)
        parts += ["<h2>Reward during training</h2>", picture(results.lines, plot_rewards, "Reward curves")]
        parts += [f"<h2>{html.escape(spec.scoring.measure)}</h2>", picture(results.lines, scores, "Test scores")]
    for name, tail in results.failed.items():
        parts.append(f"<h2>Failed: {html.escape(name)}</h2><pre>{html.escape(tail)}</pre>")
    settings = html.escape(json.dumps(asdict(spec) | {"base": Path(spec.base).name}, indent=1))
    parts.append(f"<details><summary>Settings</summary><pre>{settings}</pre></details>")
    foot = "<br>".join(html.escape(line) for line in conditions(environment, spec))
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Ablation</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{STYLE}</style></head>"
    )
    return f"{head}<body>{''.join(parts)}<footer>{foot}</footer></body></html>\n"


def picture(lines: Sequence[Line], draw: Any, alternative: str) -> str:
    """A plot for light and one for dark pages, as data in the page."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    images = []
    for name, style in (("light", "default"), ("dark", "dark_background")):
        with plt.style.context(style):
            figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
            draw(axes, lines)
            axes.grid(alpha=0.3)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130, transparent=True)
            plt.close(figure)
        data = base64.b64encode(buffer.getvalue()).decode()
        images.append(f"<img class='{name}' alt='{html.escape(alternative)}' src='data:image/png;base64,{data}'>")
    return "".join(images)


def plot_rewards(axes: Any, lines: Sequence[Line]) -> None:
    """Mean reward of a step over seeds, with the band from the lowest to the highest seed."""
    for index, line in enumerate(lines):
        steps = range(1, min(map(len, line.rewards)) + 1)
        columns = list(zip(*(rewards[: len(steps)] for rewards in line.rewards), strict=True))
        axes.plot(steps, [statistics.fmean(column) for column in columns], color=f"C{index}", label=line.label)
        axes.fill_between(steps, *zip(*((min(c), max(c)) for c in columns), strict=True), color=f"C{index}", alpha=0.15)
    axes.set(xlabel="GRPO step", ylabel="mean reward", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")


def plot_scores(axes: Any, lines: Sequence[Line], measure: str) -> None:
    """The measure of every entry with its interval, best on top."""
    ordered = sorted(lines, key=lambda line: line.scores[measure]["mean"])
    for place, line in enumerate(ordered):
        value = line.scores[measure]
        errors = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
        axes.errorbar(value["mean"], place, xerr=errors, fmt="o", color=f"C{lines.index(line)}", capsize=3)
    axes.set_yticks(range(len(ordered)), [line.label for line in ordered])
    axes.set_ylim(-0.5, len(ordered) - 0.5)
    axes.set_xlabel(f"{measure} on the test split, 95% interval")
