"""One picture of a run: loss, accuracy, η and the relative update of each layer."""

import io
from collections.abc import Sequence
from pathlib import Path

from modula_agd.train.extras import require
from modula_agd.train.files import replace
from modula_agd.train.run_folder import Evaluation

_MANY = 10


def plot(history: Sequence[Evaluation], path: Path, title: str) -> None:
    """Draw a run as a PNG with four panels over epochs.

    Args:
        history: the run's evaluations in order.
        path: the file to write.
        title: above all panels.
    """
    require("plotting", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(title)
    (loss, accuracy), (eta, update) = figure.subplots(2, 2, sharex=True)

    _lines(loss, history, {"training": "train_loss", "validation": "val_loss"})
    loss.set(title="Loss", ylabel="mean loss")
    _lines(accuracy, history, {"training": "train_accuracy", "validation": "val_accuracy"}, percent=True)
    accuracy.set(title="Accuracy", ylabel="right predictions (%)")
    _lines(eta, history, {"η": "eta"})
    eta.set(title="Automatic step size η of the whole network", ylabel="η (dimensionless)", xlabel="epoch")
    _layers(update, history)
    update.set(title="Relative update of each layer", ylabel="‖ΔW‖ / ‖W‖ (Frobenius)", xlabel="epoch")
    for axes in (loss, accuracy, eta, update):
        axes.grid(alpha=0.3)
    for axes in (loss, eta, update):
        if any(value > 0 for line in axes.lines for value in line.get_ydata()):
            axes.set_yscale("log")

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    replace(path, content.getvalue())


def _lines(axes, history: Sequence[Evaluation], fields: dict[str, str], percent: bool = False) -> None:
    for label, name in fields.items():
        points = [(e.epoch, getattr(e, name)) for e in history if getattr(e, name) is not None]
        axes.plot(
            [epoch for epoch, _ in points],
            [value * 100 if percent else value for _, value in points],
            marker="." if len(points) < 50 else "",
            label=label,
        )
    if len(fields) > 1:
        axes.legend()


def _layers(axes, history: Sequence[Evaluation]) -> None:
    """A line per parameter, shaded from the first to the last one."""
    import matplotlib

    names = list(dict.fromkeys(name for e in history for name in e.relative_update))
    shades = matplotlib.colormaps["viridis"]
    for position, name in enumerate(names):
        points = [(e.epoch, e.relative_update[name]) for e in history if e.relative_update.get(name)]
        axes.plot(
            [epoch for epoch, _ in points],
            [ratio for _, ratio in points],
            color=shades(position / max(len(names) - 1, 1) * 0.9),
            marker="." if len(points) < 50 else "",
            # A legend of every layer would hide the lines of a deep network: the ends tell which way the shades run.
            label=name if len(names) <= _MANY or position in (0, len(names) - 1) else None,
        )
    if names:
        axes.legend(fontsize="small")
