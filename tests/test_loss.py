"""Values against torch, Bregman divergences within their bounds and, where stated, at them, residuals by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from modula_agd import (
    BinaryCrossEntropy,
    CrossEntropy,
    Features,
    Grade,
    Huber,
    InvalidArgument,
    Logits,
    Loss,
    Sequence,
    Space,
    SpaceMismatch,
    SquareLoss,
    UnhalvedSquareLoss,
    UnknownBound,
    one_hot,
)
from support import gaussian, seeded, tolerance

OUTPUTS = {"batch": (6, 4), "positions": (6, 3, 4)}
each_shape = pytest.mark.parametrize("shape", OUTPUTS.values(), ids=OUTPUTS)


def probabilities(*shape: int, seed: int = 1) -> Tensor:
    return gaussian(*shape, seed=seed).mul(2).softmax(-1)


def classes(*shape: int) -> Tensor:
    return torch.randint(shape[-1], shape[:-1], generator=seeded(1))


CASES: dict[str, tuple[Loss, object]] = {
    "square": (SquareLoss(), gaussian),
    "cross-entropy of classes": (CrossEntropy(), lambda *shape, seed=1: classes(*shape)),
    "cross-entropy of probabilities": (CrossEntropy(), probabilities),
    "smoothed": (CrossEntropy(label_smoothing=0.2), lambda *shape, seed=1: classes(*shape)),
    "binary": (BinaryCrossEntropy(), lambda *shape, seed=1: gaussian(*shape, seed=seed).sigmoid()),
    "Huber": (Huber(), gaussian),
    "Huber, narrow": (Huber(0.1), gaussian),
}
each = pytest.mark.parametrize(("loss", "targets"), CASES.values(), ids=CASES)


def own_norm(loss: Loss, change: Tensor) -> Tensor:
    """‖Δ‖ in the loss's norm: over positions the supremum, which is at least the RMS over all."""
    features = change.abs().amax(-1) if loss.max_norm else change.square().mean(-1).sqrt()
    return features.reshape(change.shape[0], -1).amax(1)


# -- values ----------------------------------------------------------------------------------------------------------------


@each_shape
def test_values_are_those_of_torch(shape: tuple[int, ...]) -> None:
    f, y, p, c = gaussian(*shape), gaussian(*shape, seed=1), probabilities(*shape), classes(*shape)
    flat = f.flatten(0, -2)
    expected = {
        "square": (SquareLoss()(f, y), functional.mse_loss(f, y) / 2),
        "unhalved": (UnhalvedSquareLoss()(f, y), functional.mse_loss(f, y)),
        "classes": (CrossEntropy()(f, c), functional.cross_entropy(flat, c.flatten())),
        "probabilities": (CrossEntropy()(f, p), functional.cross_entropy(flat, p.flatten(0, -2))),
        "smoothed": (
            CrossEntropy(label_smoothing=0.1)(f, c),
            functional.cross_entropy(flat, c.flatten(), label_smoothing=0.1),
        ),
        "binary": (BinaryCrossEntropy()(f, p), functional.binary_cross_entropy_with_logits(f, p)),
        "huber": (Huber(0.7)(f, y), functional.huber_loss(f, y, delta=0.7)),
    }
    for name, (ours, theirs) in expected.items():
        assert ours.item() == pytest.approx(theirs.item(), rel=tolerance(torch.float64, f.numel())), name


@each
def test_the_loss_of_a_batch_is_the_mean_of_its_samples(loss: Loss, targets: object) -> None:
    f, y = gaussian(6, 4), targets(6, 4, seed=1)  # pyright: ignore[reportCallIssue]
    each_one = [loss(f[i : i + 1], y[i : i + 1]).item() for i in range(6)]
    assert loss.per_sample(f, y).tolist() == pytest.approx(each_one)
    assert loss(f, y).item() == pytest.approx(sum(each_one) / 6)


def test_integer_targets_of_a_binary_or_huber_loss_are_converted() -> None:
    f, y = gaussian(6, 4), torch.ones(6, 4, dtype=torch.int64)
    assert BinaryCrossEntropy()(f, y) == BinaryCrossEntropy()(f, y.double())
    assert Huber()(f, y) == Huber()(f, y.double())


@each
def test_the_gradient_is_that_of_each_sample_by_itself(loss: Loss, targets: object) -> None:
    f, y = gaussian(6, 4), targets(6, 4, seed=1)  # pyright: ignore[reportCallIssue]
    gradient = loss.gradient(f, y)
    step = 1e-6
    for index in range(4):
        moved = f.clone()
        moved[:, index] += step
        back = f.clone()
        back[:, index] -= step
        slope = (loss.per_sample(moved, y) - loss.per_sample(back, y)) / (2 * step)
        assert torch.allclose(slope, gradient[:, index], atol=1e-7)


# -- divergence and its bound ----------------------------------------------------------------------------------------------


@each_shape
@each
def test_the_divergence_is_between_0_and_its_bound(loss: Loss, targets: object, shape: tuple[int, ...]) -> None:
    for seed in range(30):
        f = 3 * gaussian(*shape, seed=seed)
        y = targets(*shape, seed=seed + 50)  # pyright: ignore[reportCallIssue]
        change = gaussian(*shape, seed=seed + 99) * 10.0 ** (1 - seed % 4)
        divergence = loss.divergence(f, f + change, y)
        rounding = tolerance(torch.float64, 4 * f.numel()) * (1 + loss.per_sample(f, y).abs() + change.abs().amax())
        assert (divergence >= -rounding).all()
        assert (divergence <= loss.bound(own_norm(loss, change)) + rounding).all()


def test_the_divergence_of_a_square_loss_is_its_bound() -> None:
    f, y, change = gaussian(6, 4), gaussian(6, 4, seed=1), gaussian(6, 4, seed=2)
    exact = SquareLoss().divergence(f, f + change, y)
    assert exact.tolist() == pytest.approx(SquareLoss().bound(own_norm(SquareLoss(), change)).tolist())


def test_the_unhalved_square_loss_exceeds_its_declared_bound_twofold_and_says_assumed() -> None:
    loss = UnhalvedSquareLoss()
    f, y, change = gaussian(6, 4), gaussian(6, 4, seed=1), gaussian(6, 4, seed=2)
    ratio = loss.divergence(f, f + change, y) / loss.bound(own_norm(loss, change))
    assert ratio.tolist() == pytest.approx([2.0] * 6)
    assert loss.curvature.grade == Grade.ASSUMED


def test_cross_entropy_nearly_attains_its_bound_between_two_equal_classes() -> None:
    loss, delta = CrossEntropy(), 1e-2
    f = torch.tensor([[0.0, 0.0, -60.0]], dtype=torch.float64)
    change = delta * torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    ratio = (loss.divergence(f, f + change, torch.tensor([0])) / loss.bound(delta)).item()
    assert 0.9999 < ratio <= 1


def test_probabilities_that_sum_to_two_void_the_bound_of_cross_entropy_as_its_docstring_says() -> None:
    loss, delta = CrossEntropy(), 1e-2
    f, change = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[delta, -delta]], dtype=torch.float64)
    assert loss.divergence(f, f + change, torch.ones_like(f)).item() == pytest.approx(2 * loss.bound(delta), rel=1e-4)


def test_binary_cross_entropy_nearly_attains_its_bound_at_even_odds() -> None:
    loss, delta = BinaryCrossEntropy(), 1e-2
    f = torch.zeros(1, 3, dtype=torch.float64)
    ratio = (loss.divergence(f, f + delta, f) / loss.bound(delta)).item()
    assert 0.9999 < ratio <= 1


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("multiple", [0.1, 1.0, 1.9, 2.0, 2.1, 5.0, 50.0])
def test_the_bound_of_huber_is_the_largest_divergence_of_one_output(threshold: float, multiple: float) -> None:
    loss, delta = Huber(threshold), multiple * threshold
    z = torch.linspace(-2 * delta - 2 * threshold, 2 * delta + 2 * threshold, 40_001, dtype=torch.float64)
    # the supremum sits on a kink, which the grid may straddle
    z = torch.cat([z, z.new_tensor([-threshold, threshold, -delta - threshold, -delta + threshold])])[:, None]
    divergence = loss.divergence(z, z + delta, torch.zeros_like(z))
    assert divergence.max().item() == pytest.approx(loss.bound(delta), rel=1e-6)
    assert divergence.max().item() <= loss.bound(delta) * (1 + 1e-12)
    start = max(-delta / 2, -threshold)
    at_start = loss.divergence(*(torch.tensor([[v]], dtype=torch.float64) for v in (start, start + delta, 0.0)))
    assert at_start.item() == pytest.approx(loss.bound(delta))


def test_the_bound_of_huber_holds_for_spread_changes_of_the_same_rms() -> None:
    # the divergence of the mean is largest when all outputs change alike, because the bound is concave in δ²
    loss, delta = Huber(1.0), 4.0
    alike = torch.full((1, 4), delta, dtype=torch.float64)
    spike = torch.tensor([[2 * delta, 0.0, 0.0, 0.0]], dtype=torch.float64)
    values = []
    for change in (alike, spike):
        start = -torch.ones_like(change)
        values.append(loss.divergence(start, start + change, torch.zeros_like(change)).item())
    assert values[1] < values[0] == pytest.approx(loss.bound(delta))


@each
def test_the_bound_is_convex_increasing_and_at_most_its_quadratic(loss: Loss, targets: object) -> None:
    delta = torch.linspace(0, 6, 601, dtype=torch.float64)
    values = loss.bound(delta)
    assert values[0] == 0
    assert (values.diff() > 0).all()
    assert (values.diff().diff() >= -1e-12).all()
    assert (values <= loss.curvature.value * delta.square() / 2 + 1e-12).all()
    assert loss.bound(0.01) == pytest.approx(loss.curvature.value * 0.01**2 / 2)
    assert [loss.bound(d) for d in delta[::100].tolist()] == pytest.approx(values[::100].tolist())


# -- conversion between norms ----------------------------------------------------------------------------------------------


def test_cross_entropy_on_features_pays_the_square_root_of_their_number_unless_typical() -> None:
    proved, typical = CrossEntropy().conversion(Features(9))
    assert (proved.value, proved.grade) == (3.0, Grade.PROVED)
    assert (typical.value, typical.grade) == (1.0, Grade.TYPICAL)
    spike = torch.eye(9)[:1]
    assert spike.abs().amax().item() == pytest.approx(proved.value * Features(9).norm(spike).item())


@pytest.mark.parametrize(
    ("loss", "space"),
    [
        (CrossEntropy(), Logits(9)),
        (SquareLoss(), Logits(9)),
        (SquareLoss(), Features(9)),
        (BinaryCrossEntropy(), Features(9)),
        (Huber(), Sequence(9)),
    ],
)
def test_a_loss_in_its_own_or_a_larger_norm_converts_at_1_proved(loss: Loss, space: Space) -> None:
    for constant in loss.conversion(space):
        assert (constant.value, constant.grade) == (1.0, Grade.PROVED)


# -- residual --------------------------------------------------------------------------------------------------------------


def test_the_residual_of_a_square_loss_is_the_mean_rms_error() -> None:
    f = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    residual = SquareLoss().residual(f, torch.zeros_like(f), Features(2))
    assert residual.item() == pytest.approx((5 / math.sqrt(2) + 0) / 2)


def test_the_residual_of_cross_entropy_is_the_mean_absolute_error_of_the_probabilities() -> None:
    f, c = gaussian(6, 4), classes(6, 4)
    error = f.softmax(-1) - functional.one_hot(c, 4)
    residual = CrossEntropy().residual(f, c, Logits(4)).item()
    assert residual == pytest.approx(error.abs().sum(-1).mean().item())


def test_the_residual_over_positions_is_that_of_the_mean_loss() -> None:
    f, c = gaussian(6, 3, 4), classes(6, 3, 4)
    error = (f.softmax(-1) - functional.one_hot(c, 4)).abs().sum(-1)
    assert CrossEntropy().residual(f, c, Logits(4)).item() == pytest.approx(error.mean().item())
    y = gaussian(6, 3, 4, seed=5)
    rms = (f - y).square().mean(-1).sqrt()
    assert SquareLoss().residual(f, y, Sequence(4)).item() == pytest.approx(rms.mean().item())


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [SquareLoss(), UnhalvedSquareLoss(), BinaryCrossEntropy(), Huber()])
def test_outputs_and_targets_of_different_shapes_are_an_error_not_a_broadcast(loss: Loss) -> None:
    with pytest.raises(SpaceMismatch, match=rf"{type(loss).__name__} .*\(6, 4\).*\(6, 1\)"):
        loss(gaussian(6, 4), gaussian(6, 1))
    with pytest.raises(SpaceMismatch, match=r"one_hot\(labels, classes\)"):
        loss(gaussian(6, 4), classes(6, 4))


@pytest.mark.parametrize(
    "targets", [classes(5, 4), classes(6, 3, 4), probabilities(6, 3), probabilities(5, 4), torch.zeros(6, 1).long()]
)
def test_cross_entropy_takes_classes_or_probabilities_of_the_outputs_shape(targets: Tensor) -> None:
    with pytest.raises(SpaceMismatch, match=r"class indices of shape \(6,\) or probabilities of shape \(6, 4\)"):
        CrossEntropy()(gaussian(6, 4), targets)


@pytest.mark.parametrize("index", [4, -1])
def test_a_class_index_out_of_range_is_an_error(index: int) -> None:
    with pytest.raises(InvalidArgument, match=r"class index outside 0\.\.3"):
        CrossEntropy()(gaussian(2, 4), torch.tensor([0, index]))


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan, "all"])
def test_label_smoothing_is_a_share(smoothing) -> None:
    with pytest.raises(InvalidArgument, match=r"label_smoothing=.* must lie in \[0, 1\]"):
        CrossEntropy(label_smoothing=smoothing)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.inf, math.nan, 10**400, "one"])
def test_a_huber_threshold_is_a_positive_number(threshold) -> None:
    with pytest.raises(InvalidArgument, match="must be a finite number > 0"):
        Huber(threshold)


def test_one_hot_targets_have_rms_1() -> None:
    y = one_hot(torch.tensor([2, 0]), 3)
    assert y.square().mean(1).tolist() == pytest.approx([1.0, 1.0])
    assert y.argmax(1).tolist() == [2, 0]
    assert y.count_nonzero().item() == 2


@pytest.mark.parametrize("labels", [[0, 3], [-1, 2]])
def test_one_hot_refuses_labels_outside_the_classes(labels: list[int]) -> None:
    with pytest.raises(InvalidArgument, match=r"3 classes, 0\.\.2"):
        one_hot(torch.tensor(labels), 3)


@pytest.mark.parametrize("index", [-100, -1, 3])
def test_no_class_index_is_ignored_in_silence(index: int) -> None:
    with pytest.raises(InvalidArgument, match=r"0\.\.2"):
        CrossEntropy()(torch.zeros(2, 3), torch.tensor([0, index]))


def test_one_hot_in_double_precision_is_not_rounded_to_single() -> None:
    assert one_hot(torch.tensor([1]), 3, torch.float64)[0, 1].item() == math.sqrt(3)


@pytest.mark.parametrize("missing", ["curvature", "max_norm"])
def test_a_loss_that_leaves_a_fact_out_is_refused_where_it_is_defined(missing: str) -> None:
    facts = {"curvature": SquareLoss.curvature, "max_norm": False, "per_sample": SquareLoss.per_sample}
    type("Whole", (Loss,), facts)
    with pytest.raises(UnknownBound, match=f"the loss Partial does not declare `{missing}`"):
        type("Partial", (Loss,), {name: fact for name, fact in facts.items() if name != missing})
