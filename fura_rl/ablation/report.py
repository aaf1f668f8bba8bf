"""The report of an ablation: Markdown with its plots as files, and one HTML page that needs nothing beside itself.

Every table and plot carries what it was measured with: config, commit, versions, hardware, seeds.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fura_rl.ablation.results import Interval, Line, Results, Spread
from fura_rl.ablation.spec import Spec
from fura_rl.report import running_mean, write_json

NOTES = (
    "Every entry has the same prompts in the same order, the same rollout seeds and the same number of steps. The "
    "learning rate is the best of those tried on the validation split, by {measure}, mean over seeds; scores are of "
    "the test split, which takes no part in the choice. Intervals are 95% bootstrap intervals over test problems of "
    "each problem's mean over seeds; differences are paired, problem by problem; sd, and what follows ±, is the "
    "deviation over seeds. Bands of curves span the seeds."
)
DISTANCE_NOTE = (
    "Measured at the end of training against the base checkpoint. KL(policy || base) is taken over the whole "
    "vocabulary at every token of one sampled completion of each test problem, in nats. Update size is |D| / |W| and "
    "stable rank |D|² / s₁(D)² of the change D of a weight W; overlap is the mean squared cosine "
    "between the leading singular directions of D and those of W, beside what random directions would give; all "
    "averaged over the adapted modules. Update cosine is what rounding to the engine's dtype leaves of the update, 1 "
    "being all of it."
)


Table = tuple[list[str], list[list[str]]]  # columns, rows


@dataclass(frozen=True)
class Plot:
    """A plot of the report: `draw` puts the lines of the ablation on a pair of axes.  `name` is that of its file."""

    name: str
    draw: Callable[[Any, Sequence[Line]], None]


def write_report(spec: Spec, results: Results, output: Path, environment: dict[str, Any]) -> list[Path]:
    """Write `report.md` with `figures/`, `report.html` and `results.json` to `output`; their paths.

    `environment` stands for that of the cells where they recorded none.
    """
    write_json(output / "results.json", {"environment": environment, **asdict(results)})
    paths = [output / "report.md", output / "report.html", output / "results.json"]
    drawn = [content for *_, content in sections(spec, results) if isinstance(content, Plot)]
    pictures = {plot.name: {scheme: draw(plot, results.lines, scheme) for scheme in SCHEMES} for plot in drawn}
    (output / "figures").mkdir(exist_ok=True)
    for name, images in pictures.items():
        (output / "figures" / f"{name}.png").write_bytes(images["paper"])
    measured_with = conditions(results.environments or [environment], spec)
    paths[0].write_text(markdown(spec, results, measured_with))
    paths[1].write_text(page(spec, results, pictures, measured_with))
    return paths


def score_rows(spec: Spec, results: Results) -> Table:
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


def cost_rows(results: Results) -> Table:
    phases = list(dict.fromkeys(phase for line in results.lines for phase in line.phase_seconds_per_step))
    columns = ["adapter", "trained parameters", "peak memory", "sync", *(f"{phase}, s/step" for phase in phases)]
    rows = [
        [
            line.label,
            f"{line.trained_parameters:,}",
            f"{line.peak_memory_gib:.2f} GiB",
            f"{line.payload_bytes / 1e6:.2f} MB",
            *(f"{line.phase_seconds_per_step.get(phase, 0.0):.2f}" for phase in phases),
        ]
        for line in results.lines
    ]
    return columns, rows


def distance_rows(results: Results) -> Table:
    columns = ["adapter", "KL / token", "KL / completion", "update size", "stable rank", "overlap", "update cosine"]
    rows = []
    for line in results.lines:
        chance = line.update["chance"]
        rows.append(
            [
                line.label,
                spread_shown(line.kl_per_token, ".4f"),
                spread_shown(line.kl_per_completion, ".3f"),
                spread_shown(line.update["relative_size"], ".4f"),
                spread_shown(line.update["stable_rank"], ".1f"),
                spread_shown(line.update["overlap"], ".3f") + (f" (random {chance['mean']:.3f})" if chance else ""),
                spread_shown(line.update_cosine, ".4f"),
            ]
        )
    return columns, rows


def rate_rows(results: Results) -> Table:
    rates = sorted({rate for line in results.lines for rate in line.validation}, key=float)
    rows = [
        [line.label, *(f"{line.validation[rate]:.3f}" if rate in line.validation else "-" for rate in rates)]
        for line in results.lines
    ]
    return ["adapter", *rates], rows


def shown(value: Interval, form: str = ".3f") -> str:
    return f"{format(value['mean'], form)} ({format(value['low'], form)} to {format(value['high'], form)})"


def spread_shown(value: Spread | None, form: str) -> str:
    return f"{format(value['mean'], form)} ± {format(value['deviation'], form)}" if value else "-"


def sections(spec: Spec, results: Results) -> list[tuple[str, str, Table | Plot]]:
    """Title, what must be known to read it, and table or plot; plots that the results have figures for."""
    lines, measure = results.lines, spec.scoring.measure
    scores, kl = (functools.partial(plot, measure=measure) for plot in (plot_scores, plot_kl))
    evaluated = any(all(line.evaluations) for line in lines)
    compared, spectra = any(line.kl_per_completion for line in lines), any(line.spectrum for line in lines)
    found = [
        (True, "Scores on the test split", "", score_rows(spec, results)),
        (lines, f"{measure} on the test split", "", Plot("scores", scores)),
        (lines, "Reward during training", "", Plot("rewards", plot_rewards)),
        (evaluated, "Held-out pass@1 during training", "", Plot("accuracy", plot_evaluations)),
        (True, "Distance from the base", DISTANCE_NOTE, distance_rows(results)),
        (compared, f"{measure} and KL to the base", "", Plot("kl", kl)),
        (spectra, "Spectra of the update and of the base", "", Plot("spectra", plot_spectra)),
        (True, "Costs", "", cost_rows(results)),
        (lines, "Seconds per step by phase", "", Plot("phases", plot_phases)),
        (True, f"Validation {measure} by learning rate", "", rate_rows(results)),
    ]
    return [(title, note, content) for present, title, note, content in found if present]


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


def conditions(environments: Sequence[dict[str, Any]], spec: Spec) -> str:
    """What a figure was measured with, in one line."""
    digest = hashlib.sha256(settings_text(spec).encode()).hexdigest()[:8]
    parts = [f"Config {Path(spec.base).name} with the settings at the end ({digest})"]
    for environment in environments:
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        where = f"{environment['device']}, {environment['cpu_threads']} threads"
        parts.append(f"commit {environment['commit']} on {where} with {versions}")
    seeds = f"seeds {', '.join(map(str, spec.seeds))}"
    return "; ".join([*parts, seeds, f"{spec.scoring.num_samples} samples a problem"])


def settings_text(spec: Spec) -> str:
    return json.dumps(asdict(spec) | {"base": Path(spec.base).name}, indent=1)


def markdown(spec: Spec, results: Results, measured_with: str) -> str:
    parts = []
    for title, note, content in sections(spec, results):
        if isinstance(content, Plot):
            shown = f"![{title}](figures/{content.name}.png)"
        else:
            columns, rows = content
            shown = "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])
        parts += [f"## {title}", note, shown, f"*{measured_with}*"]
    parts += ["## Settings", f"```json\n{settings_text(spec)}\n```"]
    return "\n\n".join(["# Ablation", *notes(spec, results), *filter(None, parts)]) + "\n"


STYLE = """
:root { color-scheme: light dark; --ink: #1b1d22; --paper: #fff; --rule: #d8dbe2; --soft: #f4f5f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --paper: #14161b; --rule: #333844; --soft: #1d2028; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
img { width: 100%; max-width: 52rem; height: auto; } pre { overflow-x: auto; background: var(--soft); padding: .7rem; }
.light { display: inline; } .dark { display: none; }
@media (prefers-color-scheme: dark) { .light { display: none; } .dark { display: inline; } }
figure { margin: 0; } figcaption { margin-top: .4rem; font-size: .75rem; opacity: .75; overflow-wrap: anywhere; }
"""


def page(spec: Spec, results: Results, pictures: dict[str, dict[str, bytes]], measured_with: str) -> str:
    """The report as one HTML page: style and pictures inside, no script, no address to load from."""
    parts = ["<h1>Ablation</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes(spec, results))]
    for title, note, content in sections(spec, results):
        if isinstance(content, Plot):
            shown = "".join(embedded(pictures[content.name][scheme], scheme, title) for scheme in ("light", "dark"))
        else:
            shown = html_table(content)
        parts.append(f"<h2>{html.escape(title)}</h2>" + (f"<p>{html.escape(note)}</p>" if note else ""))
        parts.append(f"<figure>{shown}<figcaption>{html.escape(measured_with)}</figcaption></figure>")
    for name, tail in results.failed.items():
        parts.append(f"<h2>Failed: {html.escape(name)}</h2><pre>{html.escape(tail)}</pre>")
    parts.append(f"<details><summary>Settings</summary><pre>{html.escape(settings_text(spec))}</pre></details>")
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Ablation</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{STYLE}</style></head>"
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def html_table(table: Table) -> str:
    columns, rows = table
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"


def embedded(image: bytes, scheme: str, alternative: str) -> str:
    data = base64.b64encode(image).decode()
    return f"<img class='{scheme}' alt='{html.escape(alternative)}' src='data:image/png;base64,{data}'>"


# Matplotlib's style and whether the page shows through: for the page in both colour schemes, and for a file.
SCHEMES = {"light": ("default", True), "dark": ("dark_background", True), "paper": ("default", False)}


def draw(plot: Plot, lines: Sequence[Line], scheme: str) -> bytes:
    """A plot as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style, transparent = SCHEMES[scheme]
    with plt.style.context(style):
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        plot.draw(axes, lines)
        axes.grid(alpha=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, transparent=transparent)
        plt.close(figure)
    return buffer.getvalue()


def look(index: int) -> dict[str, str]:
    """The same colour and dashes for an entry in every plot: ten colours, then dashed."""
    return {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}


def plot_band(axes: Any, line: Line, index: int, steps: Sequence[int], seeds: Sequence[Sequence[float]]) -> None:
    """The mean over seeds of a curve, with the band from the lowest to the highest seed."""
    columns = list(zip(*seeds, strict=True))
    axes.plot(steps, [statistics.fmean(column) for column in columns], label=line.label, **look(index))
    low, high = ([choose(column) for column in columns] for choose in (min, max))
    axes.fill_between(steps, low, high, color=look(index)["color"], alpha=0.15)


def plot_rewards(axes: Any, lines: Sequence[Line]) -> None:
    """Running mean of the reward: its prompts differ from step to step, the same for every entry."""
    for index, line in enumerate(lines):
        count = min(map(len, line.rewards))
        window = max(1, count // 8)
        smooth = [running_mean(rewards[:count], window)[window - 1 :] for rewards in line.rewards]
        plot_band(axes, line, index, range(window, count + 1), smooth)
    axes.set(xlabel="GRPO step", ylabel="mean reward, running mean")
    axes.legend(frameon=False, fontsize="small", loc="lower right")


def plot_evaluations(axes: Any, lines: Sequence[Line]) -> None:
    """Held-out pass@1 at the steps that every seed was evaluated at."""
    for index, line in enumerate(lines):
        curves = [dict(map(tuple, evaluations)) for evaluations in line.evaluations]
        steps = sorted(set.intersection(*map(set, curves)))
        if steps:
            plot_band(axes, line, index, steps, [[curve[step] for step in steps] for curve in curves])
    axes.set(xlabel="GRPO step", ylabel="held-out pass@1", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize="small", loc="lower right")


def plot_kl(axes: Any, lines: Sequence[Line], measure: str) -> None:
    """What an entry gains against how far it goes from the base."""
    for index, line in enumerate(lines):
        if line.kl_per_completion:
            value = line.scores[measure]
            axes.errorbar(
                line.kl_per_completion["mean"],
                value["mean"],
                xerr=line.kl_per_completion["deviation"],
                yerr=[[value["mean"] - value["low"]], [value["high"] - value["mean"]]],
                fmt="o",
                color=look(index)["color"],
                capsize=3,
                label=line.label,
            )
    axes.set(xlabel="KL to the base, nats a completion (deviation over seeds)", ylabel=f"{measure} (95% interval)")
    axes.legend(frameon=False, fontsize="small")


def plot_spectra(axes: Any, lines: Sequence[Line]) -> None:
    """Singular values over the largest, mean over modules and seeds."""
    for index, line in enumerate(lines):
        if line.spectrum:
            axes.plot(range(1, len(line.spectrum) + 1), line.spectrum, label=line.label, **look(index))
    base = next(line.base_spectrum for line in lines if line.base_spectrum)
    axes.plot(range(1, len(base) + 1), base, color="0.5", linewidth=3, alpha=0.6, label="base weights")
    axes.set(xlabel="singular value", ylabel="over the largest", xscale="log", yscale="log", ylim=(1e-3, 1.2))
    axes.legend(frameon=False, fontsize="small", loc="lower left")


def plot_phases(axes: Any, lines: Sequence[Line]) -> None:
    """Stacked seconds of a step."""
    starts = [0.0] * len(lines)
    for index, phase in enumerate(dict.fromkeys(phase for line in lines for phase in line.phase_seconds_per_step)):
        seconds = [line.phase_seconds_per_step.get(phase, 0.0) for line in lines]
        axes.barh(range(len(lines)), seconds, left=starts, height=0.6, color=f"C{index}", label=phase)
        starts = [start + value for start, value in zip(starts, seconds, strict=True)]
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("seconds per step")
    axes.legend(frameon=False, fontsize="small", ncols=6, loc="lower left", bbox_to_anchor=(0, 1))


def plot_scores(axes: Any, lines: Sequence[Line], measure: str) -> None:
    """The measure of every entry with its interval, best on top."""
    ordered = sorted(lines, key=lambda line: line.scores[measure]["mean"])
    for place, line in enumerate(ordered):
        value = line.scores[measure]
        errors = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
        axes.errorbar(value["mean"], place, xerr=errors, fmt="o", color=look(lines.index(line))["color"], capsize=3)
    axes.set_yticks(range(len(ordered)), [line.label for line in ordered])
    axes.set_ylim(-0.5, len(ordered) - 0.5)
    axes.set_xlabel(f"{measure} on the test split, 95% interval")
