"""The study's scripts at toy size: every optimizer runs, results are kept and found again, tables and plots come out."""

import importlib
import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modula_agd import MLP, Logits, SquareLoss
from modula_agd.error import InvalidArgument

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
tasks, peers, cells, measuring, study, report, ablations = (
    importlib.import_module(name) for name in ("tasks", "peers", "cells", "measuring", "study", "report", "ablations")
)

PACKAGES = {
    "schedulefree": "schedulefree",
    "prodigy": "prodigyopt",
    "dadapt": "dadaptation",
    "dog": "dog",
    "ldog": "dog",
}


@pytest.fixture(scope="module")
def source():
    return tasks.TASKS["digits"].source(None, "cpu")


@pytest.fixture
def bench(source, tmp_path: Path):
    toy = replace(tasks.TASKS["digits"], network=lambda out, width, depth: MLP(Logits(out), 8 * width, 64, 2 * depth))
    return study.Bench(toy, source, cells.Store(tmp_path / "runs" / "study.jsonl"))


def cell(**changes):
    return replace(cells.Cell("digits", "held-out", scale=0.05), **changes)


@pytest.mark.parametrize("peer", peers.PEERS)
# DoG's and Muon's own code; only examples use it
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_trains_and_is_measured(peer: str, bench) -> None:
    if peer in PACKAGES:
        pytest.importorskip(PACKAGES[peer], reason="the benchmarks extra is not installed")
    found = bench.measure(cell(peer=peer, schedule="cosine" if peer in peers.SCHEDULED else "constant", scale=0.2))
    assert not found["diverged"]
    assert found["steps"] == round(0.2 * 30 * bench.source.per_epoch(64))
    assert found["train_loss"] < 2.4
    assert 0 < found["val_accuracy"] <= 1
    assert found["state"] >= 0
    assert len(found["curve"]["train_loss"]) == len(found["curve"]["step"]) <= measuring.POINTS
    assert (found["curve"]["eta"][0] is not None) == (peer in (*peers.OWN, "agd"))


def test_a_run_is_kept_and_found_again(bench, monkeypatch) -> None:
    first = bench.measure(cell(options={"momentum": 0.9}))
    monkeypatch.setattr(study, "run", lambda *_: pytest.fail("the run was repeated"))
    assert bench.measure(cell(options={"momentum": 0.9})) == first
    row = json.loads(bench.store.path.read_text())
    assert row["cell"]["options"] == {"momentum": 0.9}
    assert row["made"]["torch"] == torch.__version__


def test_equal_cells_run_alike_and_other_seeds_do_not(bench) -> None:
    one, same, other = (measuring.run(cell(seed=seed), bench.benchmark, bench.source) for seed in (0, 0, 1))
    assert one["train_loss"] == same["train_loss"] != other["train_loss"]


def test_a_grid_grows_until_its_best_is_interior(bench, monkeypatch) -> None:
    looked = []

    def outcome(asked, *_):
        looked.append(asked.lr)
        loss = (math.log10(asked.lr) + 0.5) ** 2 if asked.lr < 5 else None
        return {"diverged": loss is None, "train_loss": loss, "end_loss": loss, "val_loss": loss} | dict.fromkeys(
            ("val_accuracy", "seconds", "step_ms", "total_ms"), 0.0
        )

    monkeypatch.setattr(study, "run", outcome)
    monkeypatch.setattr(study, "shown", lambda _: "")
    assert study.sweep(bench, cell(peer="sgd", lr=0.0)) == pytest.approx(0.316)
    assert sorted(looked) == [0.01, 0.0316, 0.1, 0.316, 1.0]


def test_a_schedule_warms_up_and_ends_at_a_tenth() -> None:
    factor = peers.cosine(1000)
    assert factor(0) == pytest.approx(1 / 50)
    assert max(map(factor, range(1000))) == factor(50) == 1
    assert factor(999) == pytest.approx(0.1, abs=1e-3)


def test_the_square_loss_is_reported_in_one_unit_for_all(source) -> None:
    """This library minimises half of what the others do; what is told is the same."""
    toy = replace(tasks.TASKS["digits"], network=lambda out, *_: MLP(out, 8, 64, 2), loss=SquareLoss(), unit=2)
    first = [
        measuring.run(replace(cell(scale=1e-9), peer=peer), toy, source)["curve"]["train_loss"][0]
        for peer in ("held-out", "sgd")
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_a_run_that_diverges_is_told_so(bench) -> None:
    found = bench.measure(cell(peer="sgd", lr=1e20))
    assert found["diverged"]
    assert found["val_loss"] is None


def test_what_muon_takes_and_what_is_left_to_adamw() -> None:
    model = tasks.TASKS["chargpt"].network(11, 1, 1).to_torch(0)
    runner = peers.PEERS["muon"](model, peers.Request("chargpt", tasks.TASKS["chargpt"].loss, None, "constant", 10, {}))
    hidden, others = (sum(len(group["params"]) for group in o.param_groups) for o in runner.optimizers)
    # qkv, projection, two of the feed-forward in each of four blocks; embedding, positions and head
    assert (hidden, others) == (16, 3)


def test_tables_and_plots_come_out(bench, tmp_path: Path, capsys, monkeypatch) -> None:
    plan = Namespace(
        groups=["ours", "grids", "defaults"], grids=["sgd"], schedules=["cosine"], skip=list(PACKAGES), seeds=[0, 1]
    )
    monkeypatch.setitem(study.START, "sgd", -2)
    for job in study.jobs(cell(), plan):
        job.perform(bench)
    for other in ablations.cells("multiplier", cell(), None):
        bench.measure(other)
    bench.measure(cell(options=ablations.OPTIONS["closed form"]))
    bench.measure(ablations.cells("adamw", cell(), None)[0])
    monkeypatch.setattr(sys, "argv", ["report.py", "--runs", str(bench.store.path), "--out", str(tmp_path / "figures")])
    report.main()
    text = capsys.readouterr().out
    for part in (
        "### digits",
        "**this library**",
        "**this library, fading**",
        "sgd, tuned, cosine",
        "±",
        "search closed form",
        "adamw, cosine, rate 0.000316, weight_decay 0.1",
        "multiplier 4",
    ):
        assert part in text
    for name in ("study_curves", "study_profile", "study_sensitivity"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("options", list(ablations.OPTIONS.values()), ids=list(ablations.OPTIONS))
def test_every_ablation_is_an_option_that_there_is(options, bench) -> None:
    assert not bench.measure(cell(options=options))["diverged"]


def test_an_unknown_option_is_an_error(bench) -> None:
    with pytest.raises((InvalidArgument, TypeError)):
        bench.measure(cell(options={"speed": 3}))
