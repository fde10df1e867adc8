"""The plot is a PNG for any history, the shortest and the deepest too."""

import math

import PIL.Image
import pytest

from modula_agd.train import Evaluation, plot


def history(evaluations: int, layers: int) -> list[Evaluation]:
    first = Evaluation(0, 0.0, None, None, 2.3, 0.1, None, 0.0)
    rest = [
        Evaluation(
            10 * n,
            float(n),
            math.exp(-n),
            0.9,
            math.exp(-n / 2),
            0.8,
            1 / n,
            n / 10,
            {f"{k}.w": 0.1 / n for k in range(layers)},
        )
        for n in range(1, evaluations)
    ]
    return [first, *rest]


@pytest.mark.parametrize(("evaluations", "layers"), [(1, 0), (2, 1), (30, 3), (100, 40)])
def test_any_history_can_be_drawn(tmp_path, evaluations, layers):
    path = tmp_path / "plot.png"
    plot(history(evaluations, layers), path, "a run")
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 800


def test_missing_and_zero_figures_are_left_out(tmp_path):
    odd = Evaluation(5, 1.0, None, None, None, None, 0.0, 1.0, {"w": None, "v": 0.0})
    plot([odd, odd], tmp_path / "plot.png", "a run")
