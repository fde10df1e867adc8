"""The tool that users run: it passes what is true, catches what is false, and hands back code that reproduces it."""

import pytest
import torch

import modula_agd
import modula_agd.verify
import wrong_layers
from modula_agd import (
    GELU,
    MLP,
    QKV,
    BatchNorm,
    Bond,
    Conv2d,
    CrossEntropy,
    Features,
    Flatten,
    InvalidArgument,
    Linear,
    Multiply,
    ReLU,
    RMSNorm,
    SquareLoss,
    Tuple,
)
from modula_agd.verify import Objective, Shaped, check
from wrong_layers import FlatSquareLoss, ForgetfulCosine, OverconfidentReLU, Overshooting, RowwiseLinear


@pytest.mark.parametrize(
    "thing",
    [
        ReLU(),
        GELU().bind(Features(4)),
        Linear(3, 4),
        MLP(2, 3, 4, depth=2),
        Multiply(),
        CrossEntropy(),
        Objective(Linear(2, 3), SquareLoss()),
    ],
    ids=repr,
)
def test_true_claims_pass(thing):
    report = check(thing, cases=15)
    assert report.ok, str(report)
    assert all(finding.cases > 0 for finding in report.findings)


@pytest.mark.parametrize(
    ("thing", "laws"),
    [
        (OverconfidentReLU(), {"magnitude", "growth"}),
        (ForgetfulCosine(), {"magnitude"}),
        (RowwiseLinear(3, 4), {"magnitude", "growth"}),
        (FlatSquareLoss(), {"Bregman bound"}),
        (Shaped(Overshooting(), (3, 4)), {"unit direction"}),
    ],
    ids=["Lipschitz", "value at zero", "norm", "curvature", "direction"],
)
def test_false_claims_are_caught(thing, laws):
    report = check(thing, cases=100)
    assert not report.ok
    assert laws <= {finding.law for finding in report.findings if not finding.holds}
    assert "BROKEN" in str(report)


def test_a_false_claim_comes_with_code_that_reproduces_it():
    report = check(OverconfidentReLU(), cases=50)
    finding = next(f for f in report.findings if f.law == "growth" and not f.holds)
    assert finding.example is not None
    names = {**vars(modula_agd), **vars(modula_agd.verify), **vars(wrong_layers)}
    lines = [line.strip() for line in finding.example.splitlines() if not line.strip().startswith("#")]
    exec(lines[0], names)
    measurement = eval(lines[1], names)
    assert not measurement.holds()
    assert finding.worst > 1.01


def test_the_code_of_a_bond_on_a_tuple_builds_it():
    subject = Multiply().bind(Tuple((Features(2), Features(2))))
    assert eval(check(subject, cases=1).findings[0].subject, dict(vars(modula_agd))) == subject


def test_shrinking_finds_a_small_example():
    finding = next(f for f in check(OverconfidentReLU(), cases=50).findings if not f.holds)
    assert finding.example is not None
    assert "Features(1)" in finding.subject
    assert "seed=0," in finding.example
    assert "attack=0" in finding.example


def test_equal_seeds_try_equal_cases():
    reports = [check(Linear(3, 4), cases=10, first_seed=5) for _ in range(2)]
    assert reports[0] == reports[1]


def test_a_layer_that_raises_is_a_finding_and_not_a_crash():
    class Clumsy(OverconfidentReLU.__base__):  # type: ignore[name-defined, misc]
        gain = OverconfidentReLU.gain
        at_zero = 0.0

        def forward(self, x):
            raise ValueError("not today")

    report = check(Clumsy(on=Features(2)), cases=5)
    assert not report.ok
    assert "not today" in str(report)


def test_things_without_laws_are_refused():
    with pytest.raises(InvalidArgument, match="neither a module"):
        check(ReLU)
    with pytest.raises(InvalidArgument, match="at least 1"):
        check(ReLU(), cases=0)


def test_float32_has_slack_for_its_rounding():
    assert check(MLP(2, 3, 4, depth=2), cases=30, dtype=torch.float32).ok


@pytest.mark.parametrize(
    "error", [AssertionError("boom"), ZeroDivisionError("boom"), KeyError("boom"), AttributeError("boom")]
)
def test_whatever_a_layer_raises_is_a_finding(error):
    class Raises(Bond):
        gain = OverconfidentReLU.gain
        at_zero = 0.0

        def forward(self, x):
            raise error

    assert "boom" in str(check(Raises(on=Features(2)), cases=5))


def test_a_layer_that_is_no_function_of_its_inputs_is_a_finding():
    class Noisy(Bond):
        gain = OverconfidentReLU.gain
        at_zero = 0.0

        def forward(self, x):
            return x * (1 + torch.rand(()))

    assert not check(Noisy(on=Features(2)), cases=20).ok


def test_a_law_that_could_not_be_measured_is_not_called_broken():
    report = str(check(Linear(3, 32) @ Flatten(4, 4) @ Conv2d(2, 1, 3, padding=1), cases=20))
    assert "RAISES" in report
    assert "BROKEN" not in report
    assert "pass side" in report


@pytest.mark.parametrize("options", [{"side": 0}, {"side": "a"}, {"dtype": torch.int64}, {"dtype": "float32"}])
def test_mistakes_in_the_call_are_no_verdicts(options):
    with pytest.raises(InvalidArgument):
        check(ReLU(), cases=2, **options)


def test_what_no_law_was_tried_on_is_said():
    floored = Linear(3, 3) @ RMSNorm(floor=0.2) @ Linear(3, 4)
    report = check(floored, cases=2)
    assert report.ok  # of the norms of its weights
    assert "no law was tried on Linear(3, 3) @ RMSNorm(floor=0.2) @ Linear(3, 4)" in str(report)
    assert "norm ≥ 0.2" in str(report)
    assert "gives a tuple" in str(check(QKV(2, 4, 8), cases=2))
    assert check(Linear(3, 3) @ ReLU() @ Linear(3, 4), cases=2).untried == ()


def test_a_report_of_nothing_is_not_ok():
    report = check((ReLU() @ RMSNorm(floor=0.5)).bind(Features(4)), cases=2)
    assert report.findings == ()
    assert not report.ok


def test_a_batch_norm_is_tried_on_batches_that_it_takes():
    report = check(Linear(3, 4) @ BatchNorm(count=3) @ Linear(4, 3), cases=20)
    assert report.ok, str(report)
    assert {"magnitude", "growth"} <= {finding.law for finding in report.findings}
