"""Tables and plots of the study, from the lines that ``study.py`` and ``ablations.py`` left.

python examples/benchmarks/report.py [--runs runs/study.jsonl] [--out docs/figures]
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from peers import FADING, OURS, OWN

Row = Mapping[str, Any]
Runs = Sequence[Row]
ADAM = ("adam, tuned, cosine", "adamw, tuned, cosine")
RACING = ("this library", "this library, fading", "muon, tuned, cosine", "sgd, tuned, cosine")
FIGURES = ("end_loss", "train_loss", "val_loss", "val_accuracy")
HEADERS = ("training loss at the end", "over the last tenth", "held-out loss", "held-out accuracy")


def label(cell: Row) -> str:
    """A method of the study in words, without its rate."""
    if cell["peer"] in OWN:
        return "this library" + (", fading" if cell["peer"] == FADING else "")
    return f"{cell['peer']}, {'tuned, ' if cell['lr'] is not None else 'default, '}{cell['schedule']}"


def line(cell: Row) -> dict[str, Any]:
    """How a method is drawn: this library black and wide."""
    return (
        {"color": "k", "lw": 2.5, "ls": "--" if cell["peer"] == FADING else "-"} if cell["peer"] in OWN else {"lw": 1}
    )


def plain(cell: Row) -> bool:
    """Whether a cell is of the study proper: the task's own size, and of this library the multiplier 1."""
    own = cell["batch"] is None and (cell["width"], cell["depth"]) == (1, 1) and not cell["options"]
    return own and (cell["peer"] not in OWN or cell["lr"] is None)


def value(rows: Runs, figure: str) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; infinite where a run diverged."""
    found = [row["outcome"][figure] for row in rows]
    if any(x is None for x in found):
        return math.inf, None
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None


def shown(rows: Runs, figure: str) -> str:
    """A figure with its spread."""
    mean, spread = value(rows, figure)
    if math.isinf(mean):
        return "diverged"
    percent = figure.endswith("accuracy")
    scale, digits = (100, 1) if percent else (1, 4)
    text = f"{mean * scale:.{digits}f}" + (f" ± {spread * scale:.{digits}f}" if spread is not None else "")
    return text + ("%" if percent else "")


def methods(runs: Runs, task: str, scale: float) -> dict[str, list[Row]]:
    """Of each method of a task its runs; of one with a grid those of the best rate by training loss at seed 0."""
    groups: dict[str, dict[float | None, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in runs:
        cell = row["cell"]
        if cell["task"] == task and cell["scale"] == scale and plain(cell):
            groups[label(cell)][cell["lr"]].append(row)
    best = {}
    for name, rates in groups.items():

        def loss(lr: float | None, rates: Mapping[float | None, list[Row]] = rates) -> float:
            first = [row for row in rates[lr] if row["cell"]["seed"] == 0]
            return value(first, "train_loss")[0] if first else math.inf

        best[name] = rates[min(rates, key=loss)]
    return best


def table(runs: Runs, task: str, scale: float) -> str:
    """One task: every method, sorted by the training loss at the end."""
    found = methods(runs, task, scale)
    order = sorted(found, key=lambda name: value(found[name], "end_loss")[0])
    head = ["method", "rate", *HEADERS, "seeds", "step, ms", "in all, ms"]
    lines = [head, ["---"] * len(head)]
    for name in order:
        rows = found[name]
        rate = rows[0]["cell"]["lr"]
        bold = "**" if rows[0]["cell"]["peer"] in OWN else ""
        times = [statistics.median(row["outcome"][key] for row in rows) for key in ("step_ms", "total_ms")]
        lines.append(
            [
                f"{bold}{name}{bold}",
                "—" if rate is None else f"{rate:.3g}",
                *(shown(rows, figure) for figure in FIGURES),
                str(len(rows)),
                *(f"{t:.1f}" for t in times),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reached(row: Row, loss: float) -> int | None:
    """The step by which a run's minibatches (live weights), meaned over a sixtieth of its budget, had a training loss as low."""
    curve = row["outcome"]["curve"]
    return next(
        (n for n, x in zip(curve["step"], curve["train_loss"], strict=True) if x is not None and x <= loss), None
    )


def race(runs: Runs) -> str:
    """Steps and seconds until the training loss that tuned Adam, with its schedule, ends with over the last tenth."""
    head = ["task", "tuned Adam's loss", "its steps", "seconds", "this library", "fading", "Muon, tuned", "SGD, tuned"]
    lines = [head, ["---"] * len(head)]
    for task, scale in budgets(runs):
        found = methods(runs, task, scale)
        adam = next((rows for name, rows in found.items() if name in ADAM), None)
        if adam is None:
            continue
        goal, budget = value(adam, "train_loss")[0], adam[0]["outcome"]["steps"]
        cells = [task, f"{goal:.4f}", f"{budget:,}", f"{_seconds(adam, budget):.3g}"]
        cells += [_raced(found.get(name, []), goal, budget) for name in RACING]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _raced(rows: Runs, goal: float, budget: int) -> str:
    """When runs of one method, meaned over seeds, came to a training loss."""
    if not rows:
        return "not run"
    taken = [step for row in rows if (step := reached(row, goal)) is not None]
    if len(taken) < len(rows):
        return f"by {len(taken)} of {len(rows)} seeds"
    mean = statistics.fmean(taken)
    return f"{mean:,.0f} ({mean / budget:.0%}), {_seconds(rows, mean):.3g} s"


def _seconds(rows: Runs, steps: float) -> float:
    """What so many steps take, by the runs' median."""
    return steps * statistics.median(row["outcome"]["total_ms"] for row in rows) / 1e3


def grid(runs: Runs, task: str, scale: float) -> str:
    """Every cell of the grids of a task, training loss over the last tenth and held-out loss."""
    rows = [r for r in runs if r["cell"]["task"] == task and r["cell"]["scale"] == scale and plain(r["cell"])]
    rows = [r for r in rows if r["cell"]["lr"] is not None and r["cell"]["seed"] == 0]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"{row['cell']['peer']}, {row['cell']['schedule']}"].append(row)
    lines = [["optimizer, schedule", "rate: training loss / held-out loss"], ["---", "---"]]
    for name, found in sorted(groups.items()):
        best = min(found, key=lambda r: value([r], "train_loss")[0])
        cells = []
        for row in sorted(found, key=lambda r: r["cell"]["lr"]):
            train, held = (value([row], figure)[0] for figure in ("train_loss", "val_loss"))
            text = f"{row['cell']['lr']:.3g}: " + ("diverged" if math.isinf(train) else f"{train:.4f} / {held:.4f}")
            cells.append(f"**{text}**" if row is best else text)
        lines.append([name, "; ".join(cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def budgets(runs: Runs, least: int = 2) -> list[tuple[str, float]]:
    """Tasks and scales of the study proper, in order of appearance, on which this library and others ran.

    Args:
        runs: all of them.
        least: number of methods that there must be.
    """
    found = dict.fromkeys((r["cell"]["task"], r["cell"]["scale"]) for r in runs if plain(r["cell"]))
    names = {key: [rows[0]["cell"]["peer"] for rows in methods(runs, *key).values()] for key in found}
    return [k for k in found if OURS in names[k] and set(names[k]) - set(OWN) and len(names[k]) >= least]


def draw_curves(runs: Runs, out: Path) -> None:
    """Training loss and η over the steps: this library and the best of each grid."""
    chosen = budgets(runs)
    figure = Figure(figsize=(4.2 * len(chosen), 6.4), layout="constrained")
    panels = figure.subplots(2, len(chosen), squeeze=False)
    for column, (task, scale) in enumerate(chosen):
        for name, rows in methods(runs, task, scale).items():
            cell = rows[0]["cell"]
            ours = cell["peer"] in OWN
            if not ours and "tuned" not in name:
                continue
            curve = rows[0]["outcome"]["curve"]
            losses = [math.nan if x is None else x for x in curve["train_loss"]]
            panels[0][column].plot(curve["step"], losses, label=name, **line(cell))
            if ours:
                etas = [math.nan if x is None else x for x in curve["eta"]]
                panels[1][column].plot(curve["step"], etas, **line(cell))
        panels[0][column].set(title=f"{task}, ×{scale:g} of its budget", yscale="log", ylabel="training loss")
        panels[1][column].set(yscale="log", xlabel="step", ylabel="η of this library")
        panels[0][column].legend(fontsize=6)
        for panel in panels[:, column]:
            panel.grid(alpha=0.3)
    figure.savefig(out / "study_curves.png", dpi=100)


def draw_profile(runs: Runs, out: Path) -> None:
    """For each method the share of tasks on which its figure is within a factor τ of the best (Dolan & Moré 2002)."""
    chosen = budgets(runs, least=6)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key in zip(panels, ("end_loss", "val_loss"), strict=True):
        tables = {task: methods(runs, *task) for task in chosen}
        found = {task: {n: value(rows, key)[0] for n, rows in each.items()} for task, each in tables.items()}
        everywhere = set.intersection(*(set(values) for values in found.values())) if found else set()
        taus = [1 + 0.01 * 1.06**i for i in range(110)]
        for name in sorted(everywhere):
            ratios = [values[name] / max(min(values.values()), 1e-3) for values in found.values()]
            share = [sum(ratio <= tau for ratio in ratios) / len(ratios) for tau in taus]
            axes.plot(taus, share, label=name, **line(tables[chosen[0]][name][0]["cell"]))
        title = {"end_loss": "training loss at the end", "val_loss": "held-out loss"}[key]
        axes.set(title=title, xlabel="τ: factor of the best", ylabel="share of tasks", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    figure.savefig(out / "study_profile.png", dpi=100)


def draw_sensitivity(runs: Runs, out: Path) -> None:
    """Training loss over the multiplier of this library's step."""
    found: dict[tuple[str, float], dict[float, float]] = defaultdict(dict)
    for row in runs:
        cell = row["cell"]
        if (
            cell["peer"] == OURS
            and cell["batch"] is None
            and (cell["width"], cell["depth"]) == (1, 1)
            and not cell["options"]
        ):
            found[cell["task"], cell["scale"]][cell["lr"] or 1.0] = value([row], "end_loss")[0]
    swept = {key: values for key, values in found.items() if len(values) > 3}
    if not swept:
        return
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for (task, scale), values in swept.items():
        points = sorted((x, y) for x, y in values.items() if math.isfinite(y))
        axes.plot([x for x, _ in points], [y for _, y in points], ".-", label=f"{task}, ×{scale:g}")
    axes.set(xscale="log", yscale="log", xlabel="multiplier of the derived step", ylabel="training loss at the end")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "study_sensitivity.png", dpi=100)


def ablations(runs: Runs) -> str:
    """Cells with other options, and of this library with other sizes and multipliers."""
    head = ["task", "budget", "what differs from the default", *HEADERS, "step, ms", "in all, ms"]
    lines = [head, ["---"] * len(head)]
    studied = budgets(runs)
    for row in runs:
        cell = row["cell"]
        ours = cell["peer"] in OWN
        if (not ours and not cell["options"]) or (plain(cell) and (cell["task"], cell["scale"]) in studied):
            continue
        different = [] if ours else [f"{cell['peer']}, {cell['schedule']}, rate {cell['lr']:g}"]
        different += [f"{k} {v}" for k, v in cell["options"].items()]
        different += [f"{k} {cell[k]}" for k in ("batch",) if cell[k]]
        different += [f"{k} ×{cell[k]}" for k in ("width", "depth") if cell[k] != 1]
        different += [f"seed {cell['seed']}"] if cell["seed"] else []
        different += [f"multiplier {cell['lr']:g}"] if ours and cell["lr"] else []
        different += ["fading"] if cell["peer"] == FADING else []
        what = ", ".join(different) or "nothing (the default)"
        times = [f"{row['outcome'][key]:.1f}" for key in ("step_ms", "total_ms")]
        figures = [shown([row], figure) for figure in FIGURES]
        lines.append([cell["task"], f"×{cell['scale']:g}", what, *figures, *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path("runs/study.jsonl")])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    lines = [line for path in options.runs for line in path.read_text(encoding="utf-8").splitlines() if line]
    # a run that two files hold is one run
    runs = list({json.dumps(row["cell"]): row for row in map(json.loads, lines)}.values())
    options.out.mkdir(parents=True, exist_ok=True)
    for task, scale in budgets(runs):
        print(f"### {task}, ×{scale:g} of its budget\n\n{table(runs, task, scale)}\n\n{grid(runs, task, scale)}\n")
    print(f"### Until tuned Adam's training loss\n\n{race(runs)}\n")
    print(f"### Ablations\n\n{ablations(runs)}\n")
    draw_curves(runs, options.out)
    draw_profile(runs, options.out)
    draw_sensitivity(runs, options.out)


if __name__ == "__main__":
    main()
