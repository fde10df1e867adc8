"""The paper's figures as scripts: at toy size, on synthetic data, each writes its table, its numbers and its plot."""

import importlib
import json
import math
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from modula_agd import MLP, Conv2d, Features, Image, InvalidArgument, Linear, Mean, ReLU, one_hot
from modula_agd.normalisation import BatchNorm
from modula_agd.train import Classification, DataError, Examples
from modula_agd.train.facts import measured
from support import seeded

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "paper"))
common, results = (importlib.import_module(name) for name in ("common", "results"))
figure4, figure5, figure6, figure7, transfer = (
    importlib.import_module(name)
    for name in ("figure4_benchmark", "figure5_tuned", "figure6_depth_width", "figure7_batch", "transfer")
)

SHAPE, CLASSES = (3, 4, 4), 4


def examples(count: int, seed: int) -> Examples:
    """Noisy copies of one image a class."""
    labels = torch.arange(count) % CLASSES
    centres = torch.randn((CLASSES, *SHAPE), generator=seeded(9))
    return Examples(centres[labels] + 0.3 * torch.randn((count, *SHAPE), generator=seeded(seed)), labels)


@pytest.fixture
def data():
    train, held_out = examples(64, 0), examples(32, 1)
    return common.in_memory(Classification(measured("toy", CLASSES, train.inputs), train, held_out))


@pytest.fixture
def store(tmp_path: Path):
    return results.Results(tmp_path / "deep" / "out", "toy_figure")


def cell(**changes):
    made = common.Cell("toy", 64, "fully connected, depth 2, width 8", "agd", 1.0, "unhalved-square", 16, 2, 0)
    return replace(made, **changes)


def network():
    return MLP(CLASSES, 8, 48, 2)


def numbers(value) -> list[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        return [x for part in value.values() for x in numbers(part)]
    if isinstance(value, list):
        return [x for part in value for x in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def check_files(store, printed: str, cells: int) -> dict:
    """The three outputs of a script agree in their number of cells, and hold finite numbers alone."""
    assert store.png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    content = json.loads(store.json.read_text())
    assert len(content["table"]) == cells
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == cells + 2
    assert len({line.count("|") for line in lines}) == 1
    found = numbers(content)
    assert len(found) > 20 * cells
    assert all(math.isfinite(x) for x in found)
    for run in content["runs"]:
        assert run["outcome"]["train_loss"] > 0
        assert set(run["made"]) == {"machine", "device", "date", "torch", "python", "modula_agd"}
    return content


# -- the scripts -----------------------------------------------------------------------------------------------------


def test_figure_4_has_a_row_per_pair_and_method(data, store, capsys):
    flat = figure4.Pair(
        "toy",
        "small",
        lambda classes, features: MLP(classes, 8, features, 2),
        "unhalved-square",
        16,
        2,
        {"adam": (-6, -5), "sgd": (-2,)},
        {"agd": 12.3},
        flat=True,
    )
    pictures = replace(
        flat,
        network="convolution",
        build=lambda classes, channels: Linear(classes, 8) @ Mean() @ ReLU() @ Conv2d(8, channels, 3, padding=1),
        loss="cross-entropy",
        flat=False,
        augment=True,
        published={},
    )
    rows = figure4.run({"flat": flat, "pictures": pictures}, lambda name: data, (0,), store)
    assert [(row["pair"], row["method"]) for row in rows] == [
        (pair, method) for pair in ("flat", "pictures") for method in ("agd", "adam", "sgd")
    ]
    content = check_files(store, capsys.readouterr().out, 6)
    assert rows[0]["published"] == "12.3%"
    assert rows[2]["learning rate"] == "0.1, fixed"
    assert len(rows[2]["_grid"]) == 1
    assert len(rows[1]["_grid"]) >= 3
    assert all(0 <= run["outcome"]["test_accuracy"] <= 1 for run in content["runs"])


PAIRS = [pair for size in figure4.PAIRS.values() for pair in size.values()]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.network)
def test_every_pair_of_figure_4_names_a_network_that_gives_its_scores(pair):
    built = pair.build(10, 3072 if pair.flat else 3)
    assert built.domain == (Features(3072) if pair.flat else Image(3))
    assert built.codomain == Features(10)
    assert pair.loss in common.LOSSES
    assert set(pair.grids) <= set(common.BASELINES)
    assert set(pair.published) <= {"agd", *common.BASELINES}


@pytest.mark.parametrize("optimizer", ["agd", "sgd"])
def test_batch_norm_is_trained_on_batches_and_evaluated_on_running_statistics(data, optimizer):
    network = Linear(CLASSES, 8) @ Mean() @ ReLU() @ BatchNorm() @ Conv2d(8, 3, 3, padding=1)
    seen = common.train(cell(optimizer=optimizer, lr=1.0 if optimizer == "agd" else 0.1, epochs=30), network, data)
    assert seen["train_loss"] < 0.8 * seen["curve"]["train_loss"][0]
    # the loss on new samples of the same classes is that of training only if the statistics have been kept
    assert seen["test_loss"] < 1.5 * seen["train_loss"] + 0.1


def test_figure_5_shows_the_whole_grid(data, store, capsys):
    rows = figure5.run(data, figure5.Size(2, 8, 2, 16), (0, 1), store)
    content = check_files(store, capsys.readouterr().out, len(rows))
    assert len(content["runs"]) == 2 * len(rows)
    assert all("±" in row["train loss"] for row in rows)
    for optimizer in ("adam", "sgd"):
        grid = [row for row in rows if row["method"] == optimizer]
        best = min(grid, key=lambda row: row["_train_loss"])
        assert [row["grid"] for row in grid].count("best") == 1
        assert best["grid"] == "best"
        assert best not in (grid[0], grid[-1])


def test_figure_6_has_a_row_per_depth_and_width(data, store, capsys):
    rows = figure6.run(data, figure6.Size((2, 4), (8, 16), 1, 16), (0,), store)
    assert [(row["depth"], row["width"]) for row in rows] == [(2, 8), (2, 16), (4, 8), (4, 16)]
    check_files(store, capsys.readouterr().out, 4)


def test_published_figures_stand_beside_the_papers_own_data_alone(data, tmp_path):
    theirs = replace(data, facts=replace(data.facts, name="cifar10"))
    for index, (source, told) in enumerate(((data, "—"), (theirs, "42.55%"))):
        size = figure6.Size((2,), (64, 65), 1, 64)
        rows = figure6.run(source, size, (0,), results.Results(tmp_path, f"six {index}"))
        assert [row["published"] for row in rows] == [told, "—"]
    size = figure7.Size((32,), 1, width=8)
    assert figure7.run(theirs, size, (0,), results.Results(tmp_path, "seven"))[0]["published"] == "55.0%"
    assert figure7.run(data, size, (0,), results.Results(tmp_path, "seven too"))[0]["published"] == "—"


def test_figure_7_has_a_row_per_batch_size(data, store, capsys):
    rows = figure7.run(data, figure7.Size((8, 32, 4096), 2, width=8), (0,), store)
    assert [row["steps"] for row in rows] == [16, 4, 2]
    check_files(store, capsys.readouterr().out, 3)


@pytest.mark.parametrize(("method", "loss"), [("agd", "unhalved-square"), ("exact", "cross-entropy")])
def test_transfer_has_a_row_per_cell_and_a_verdict_per_axis(data, store, capsys, method, loss):
    size = transfer.Size(8, 1, 1, factors=(1, 2), exponents=(-1, 0, 1), batch_size=16)
    rows = transfer.run(data, size, (0,), store, method, loss)
    assert [(row["grows"], row["width"], row["blocks"]) for row in rows] == [
        ("blocks", 8, 1),
        ("blocks", 8, 2),
        ("width", 8, 1),
        ("width", 16, 1),
    ]
    content = check_files(store, capsys.readouterr().out, 4)
    # the smallest network stands on both axes, and is trained once
    assert len(content["runs"]) == sum(len(row["_losses"]) for row in rows[1:])
    assert all(min(map(float, row["_losses"])) < 2.0 ** row["_best"] < max(map(float, row["_losses"])) for row in rows)
    assert {run["outcome"]["test_accuracy"] for run in content["runs"]} == {None}
    assert [fact.split(":")[0] for fact in content["facts"]] == ["width", "blocks"]


@pytest.mark.parametrize(
    ("exponents", "edge", "told"),
    [
        ((0, 0, 0), None, "holds"),
        ((0, 1, 0), None, "holds"),
        ((-1, 0, 1), None, "fails"),
        ((-1, 0, 1), 2, "fails"),
        ((3, 4, 4), 4, "undecided"),
        ((0, None), None, "undecided"),
    ],
)
def test_the_verdict_follows_from_the_best_multipliers(exponents, edge, told):
    rows = [{"_best": exponent, "_interior": exponent != edge} for exponent in exponents]
    assert told in transfer.verdict("width", rows)


# -- choosing a rate ---------------------------------------------------------------------------------------------------


def test_a_sweep_grows_until_its_best_is_interior():
    best, losses, interior = common.sweep((-6, -5, -4), lambda k: abs(k + 9.2))
    assert (best, interior) == (-9, True)
    assert list(losses) == [-10, -9, -8, -7, -6, -5, -4]


def test_a_sweep_stops_at_the_ends_and_says_so():
    best, losses, interior = common.sweep((-1, 0), lambda k: -k)
    assert (best, interior) == (common.EXPONENTS[1], False)
    assert common.sweep((-3,), lambda k: 1.0) == (-3, {-3: 1.0}, False)
    assert common.sweep((0, 1), lambda k: -k, ends=(-3, 3))[0] == 3
    best, losses, interior = common.sweep((-2, -1), lambda k: None)
    assert min(losses) == common.EXPONENTS[0]
    assert not interior


def pretended(train_loss: float | None, test_accuracy: float | None) -> dict:
    curve = {name: [train_loss] * 3 for name in ("train_loss", "train_accuracy", "eta", "eta_min", "eta_max")}
    return {
        "train_loss": train_loss,
        "train_accuracy": 0.5,
        "test_loss": None,
        "test_accuracy": test_accuracy,
        "diverged": train_loss is None,
        "steps": 3,
        "seconds": 0.0,
        "curve": {"epoch": [1, 2, 3], **curve},
    }


def test_the_best_rate_is_chosen_by_training_loss_never_by_test(data, store, monkeypatch):
    def train(cell, network, source, *, test):
        distance = abs(math.log10(cell.lr) + 3)
        return pretended(1 + distance, min(1.0, distance / 10))

    monkeypatch.setattr(common, "train", train)
    rows = figure5.run(data, figure5.Size(2, 8, 1), (0,), store)
    assert [row["learning rate"] for row in rows if row["grid"] == "best"] == ["0.001", "0.001"]
    assert max(rows[1:], key=lambda row: row["_test_accuracy"])["grid"] == ""


def test_divergence_is_shown_and_never_chosen(data, store, monkeypatch, capsys):
    def train(cell, network, source, *, test):
        return pretended(None if cell.optimizer == "sgd" or cell.lr > 2e-4 else cell.lr, None)

    monkeypatch.setattr(common, "train", train)
    rows = figure5.run(data, figure5.Size(2, 8, 1), (0,), store)
    adam = {row["learning rate"]: row["grid"] for row in rows if row["method"] == "adam"}
    assert adam["0.00032"] == ""
    assert adam["1e-07"] == "best, at the edge"
    assert "| sgd | 0.1 | diverged |" in capsys.readouterr().out


def test_where_everything_diverges_there_is_still_a_table_and_a_plot(data, store, monkeypatch):
    monkeypatch.setattr(common, "train", lambda *arguments, **options: pretended(None, None))
    pair = figure4.Pair("toy", "n", lambda c, i: MLP(c, 8, i, 2), "square", 16, 1, {"adam": (-6, -5)}, {}, flat=True)
    scripts = (
        lambda to: figure4.run({"p": pair}, lambda name: data, (0,), to),
        lambda to: figure5.run(data, figure5.Size(2, 8, 1), (0, 1), to),
        lambda to: figure6.run(data, figure6.Size((2,), (8, 16), 1), (0,), to),
        lambda to: figure7.run(data, figure7.Size((8, 16), 1), (0,), to),
        lambda to: transfer.run(data, transfer.Size(8, 1, 1, (1, 2)), (0,), to),
    )
    for index, script in enumerate(scripts):
        to = replace(store, figure=f"figure {index}")
        assert "diverged" in str(script(to))
        assert to.png.is_file()


# -- runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "lr"), [("agd", 1.0), ("exact", 1.0), ("adam", 0.01), ("sgd", 0.1)])
def test_the_loop_learns_with_every_kind_of_optimizer(data, optimizer, lr):
    outcome = common.train(cell(optimizer=optimizer, lr=lr, epochs=20), network(), data)
    curve = outcome["curve"]
    assert len(curve["epoch"]) == common.POINTS
    assert curve["epoch"][-1] == 20
    assert outcome["train_loss"] < 0.5 * curve["train_loss"][0]
    assert outcome["test_accuracy"] > 0.8
    assert not outcome["diverged"]
    low, middle, high = (torch.tensor(curve[name]) for name in ("eta_min", "eta", "eta_max"))
    assert bool(((low <= middle * (1 + 1e-6)) & (middle <= high * (1 + 1e-6))).all())


def test_a_run_is_the_pure_method_on_the_same_batches(data):
    one = cell(epochs=1, batch_size=32)
    method = common.METHODS["agd"](network(), common.LOSSES[one.loss])
    params = network().init(0)
    state = method.init(params)
    losses = []
    for inputs, labels in islice(data.task(True, False).batches(32, 0), 2):
        aims = one_hot(labels, CLASSES)
        grads, value = torch.func.grad_and_value(method.objective)(params, inputs, aims)
        updates, state = method.update(grads, state, params)
        params = {name: weight + updates[name] for name, weight in params.items()}
        losses.append(float(value))
    assert common.train(one, network(), data)["curve"]["train_loss"] == pytest.approx(losses, rel=1e-5)


def test_the_multiplier_scales_the_derived_step(data):
    moved = []
    for lr in (1.0, 0.5):
        model = network().to_torch(0)
        optimizer = common.optimizer_of(cell(lr=lr), model, network())
        before = [weight.detach().clone() for weight in model.parameters()]
        inputs, labels = next(data.task(True, False).batches(64, 0))
        common.LOSSES["square"](model(inputs), one_hot(labels, CLASSES)).backward()
        optimizer.step()
        moved.append([weight - old for weight, old in zip(model.parameters(), before, strict=True)])
    for whole, half in zip(*moved, strict=True):
        torch.testing.assert_close(half, whole / 2, rtol=1e-3, atol=1e-7)


def test_a_run_that_diverges_ends_early_and_is_marked(data):
    outcome = common.train(cell(optimizer="sgd", lr=1e30, epochs=50), network(), data)
    assert outcome["diverged"]
    assert outcome["train_loss"] is None
    assert outcome["test_accuracy"] is None
    json.dumps(outcome, allow_nan=False)


def test_an_unknown_optimizer_is_refused(data):
    with pytest.raises(InvalidArgument, match=r"no optimizer 'lion'; choose one of .*agd.*adam, sgd"):
        common.train(cell(optimizer="lion"), network(), data)


def test_a_rerun_continues_where_the_first_was_interrupted(data, store, monkeypatch):
    size, real, made = figure6.Size((2, 3), (8,), 1, 16), common.train, []

    def until(stop):
        def train(cell, *args, **options):
            if len(made) == stop:
                raise KeyboardInterrupt
            made.append(cell)
            return real(cell, *args, **options)

        return train

    monkeypatch.setattr(common, "train", until(1))
    with pytest.raises(KeyboardInterrupt):
        figure6.run(data, size, (0,), store)
    assert len(store.content()["runs"]) == 1
    monkeypatch.setattr(common, "train", until(None))
    first = figure6.run(data, size, (0,), store)
    assert [cell.network for cell in made] == [f"fully connected, depth {depth}, width 8" for depth in (2, 3)]
    assert figure6.run(data, size, (0,), store) == first
    assert len(made) == 2
    figure6.run(data, replace(size, epochs=2), (0,), store)
    assert len(made) == 4


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": [{}]}', '{"figure": "another", "runs": []}'])
def test_a_file_that_cannot_be_continued_is_refused(store, content):
    store.folder.mkdir(parents=True)
    store.json.write_text(content)
    with pytest.raises(DataError, match=r"was to be continued, but"):
        store.content()
    assert store.json.read_text() == content


# -- the commands ----------------------------------------------------------------------------------------------------------


def test_a_command_runs_from_its_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figure7, "SIZES", {"cpu": figure7.Size((256, 512), 9, depth=2, width=8)})
    arguments = ["--data", "digits", "--epochs", "1", "--seeds", "3", "--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["figure7_batch.py", *arguments])
    assert common.start(figure7.main, common.parser("about")) == 0
    content = check_files(results.Results(tmp_path, "figure7_batch"), capsys.readouterr().out, 2)
    assert {(run["config"]["epochs"], run["config"]["seed"]) for run in content["runs"]} == {(1, 3)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data-dir", "nowhere"], "nowhere is not a folder"),
        (["--epochs", "0"], "--epochs was given 0"),
        (["--seeds", "1", "2", "1"], "must be ≥ 0 and differ"),
        (["--seeds", "-1"], "must be ≥ 0 and differ"),
        (["--data", "digits", "--device", "abacus"], "'abacus' cannot be used"),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figure6_depth_width.py", *arguments, "--out", str(tmp_path)])
    assert common.start(figure6.main, common.parser("about")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1
