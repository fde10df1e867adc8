"""Convolutions against ``torch.nn``, their norms and gains against brute force, and witnesses that attain them."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import modula_agd
from modula_agd import (
    Atom,
    Certified,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Grade,
    Image,
    InvalidArgument,
    Linear,
    Mean,
    PerTap,
    Sequence,
    Space,
    SpaceMismatch,
    Spectral,
    SquareLoss,
    Tanh,
    Unfolded,
    Volume,
    agd,
    euclidean_gain,
)
from support import gaussian, tolerance

CASES: dict[str, tuple[Atom, tuple[int, ...]]] = {
    "Conv1d": (Conv1d(4, 3), (2, 7, 3)),
    "Conv1d strided, padded, dilated": (Conv1d(4, 3, 2, stride=2, padding=3, dilation=2), (2, 7, 3)),
    "Conv1d grouped": (Conv1d(6, 4, 3, groups=2), (2, 6, 4)),
    "Conv2d": (Conv2d(6, 4), (2, 4, 5, 5)),
    "Conv2d padded": (Conv2d(3, 2, 3, padding=2), (2, 2, 4, 4)),
    "Conv2d strided and dilated": (Conv2d(3, 2, (2, 3), stride=2, dilation=2), (2, 2, 7, 8)),
    "Conv2d of unlike sides": (
        Conv2d(3, 2, (2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
        (2, 2, 7, 8),
    ),
    "Conv2d grouped": (Conv2d(6, 4, 2, groups=2), (2, 4, 4, 4)),
    "Conv2d depthwise": (Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "Conv2d 1×1": (Conv2d(3, 2, 1), (2, 2, 3, 3)),
    "Conv3d": (Conv3d(3, 2, 2), (2, 2, 3, 4, 4)),
    "Conv3d of unlike sides": (Conv3d(4, 2, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), (2, 2, 3, 4, 4)),
    "ConvTranspose1d": (ConvTranspose1d(4, 3, stride=2), (2, 5, 3)),
    "ConvTranspose1d dilated": (ConvTranspose1d(2, 4, 3, stride=3, dilation=2, padding=1, groups=2), (2, 5, 4)),
    "ConvTranspose2d": (ConvTranspose2d(6, 4), (2, 4, 4, 4)),
    "ConvTranspose2d strided": (ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (2, 2, 4, 4)),
    "ConvTranspose2d of unlike sides": (
        ConvTranspose2d(3, 2, (2, 4), stride=(1, 2), padding=(0, 1), dilation=(2, 1), output_padding=(0, 1)),
        (2, 2, 4, 4),
    ),
    "ConvTranspose2d grouped": (ConvTranspose2d(6, 4, 2, groups=2), (2, 4, 4, 4)),
    "ConvTranspose2d depthwise": (ConvTranspose2d(4, 4, 3, stride=2, groups=4), (2, 4, 3, 3)),
    "ConvTranspose2d without overlap": (ConvTranspose2d(3, 2, 2, stride=2), (2, 2, 3, 3)),
    "ConvTranspose3d": (ConvTranspose3d(3, 2, (2, 3, 1), stride=2), (2, 2, 2, 3, 2)),
}
each = pytest.mark.parametrize(("conv", "shape"), CASES.values(), ids=CASES)
geometries = pytest.mark.parametrize("geometry", ["taps", "patch"])
TRANSPOSED = ConvTranspose1d | ConvTranspose2d | ConvTranspose3d


def reference(conv, weight: Tensor, x: Tensor) -> Tensor:
    extra = {"output_padding": conv.output_padding} if isinstance(conv, TRANSPOSED) else {}
    module = getattr(nn, type(conv).__name__)(
        conv.fan_in,
        conv.fan_out,
        conv.kernel,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=False,
        **extra,
    ).double()
    assert module.weight.shape == weight.shape
    module.weight.data = weight
    sequence = isinstance(conv.domain, Sequence)
    out = module(x.mT if sequence else x).detach()
    return out.mT if sequence else out


# -- the map ---------------------------------------------------------------------------------------------------------------


@each
@geometries
def test_forward_is_that_of_torch_and_does_not_depend_on_the_norm(conv, shape: tuple[int, ...], geometry: str) -> None:
    conv = replace(conv, geometry=geometry)
    weight, x = gaussian(*conv.shape), gaussian(*shape, seed=1)
    out = conv({"weight": weight}, x)
    assert torch.equal(out, reference(conv, weight, x))
    assert conv.codomain.fits(out)
    # a single sample, as torch.vmap would hand it over
    torch.testing.assert_close(conv({"weight": weight}, x[0]), out[0])


@pytest.mark.parametrize(
    ("conv", "domain", "codomain", "shape", "norm"),
    [
        (Conv2d(6, 4, (2, 3)), Image(4), Image(6), (6, 4, 2, 3), PerTap(Spectral(), math.sqrt(6))),
        (Conv2d(6, 4, groups=2), Image(4), Image(6), (6, 2, 3, 3), PerTap(Spectral(), 3.0, 2)),
        (Conv2d(6, 4, groups=2, geometry="patch"), Image(4), Image(6), (6, 2, 3, 3), Unfolded(Spectral(), 2)),
        (Conv1d(6, 4), Sequence(4), Sequence(6), (6, 4, 3), PerTap(Spectral(), math.sqrt(3))),
        (Conv3d(6, 4, 2), Volume(4), Volume(6), (6, 4, 2, 2, 2), PerTap(Spectral(), math.sqrt(8))),
        (
            ConvTranspose2d(6, 4, stride=2, groups=2),
            Image(4),
            Image(6),
            (4, 3, 3, 3),
            PerTap(Spectral(), 2.0, 2, transposed=True),
        ),
        (
            ConvTranspose1d(6, 4, 3, stride=2, geometry="patch"),
            Sequence(4),
            Sequence(6),
            (4, 6, 3),
            Unfolded(Spectral(), transposed=True, patches=((0, 2), (1,))),
        ),
    ],
)
def test_spaces_shape_and_norm_follow_from_the_declaration(
    conv: Atom, domain: Space, codomain: Space, shape: tuple[int, ...], norm: object
) -> None:
    assert (conv.domain, conv.codomain, conv.shape, conv.norm) == (domain, codomain, shape, norm)


@each
@geometries
def test_a_repr_is_the_expression_that_builds_it(conv: Conv2d, shape: tuple[int, ...], geometry: str) -> None:
    conv = replace(conv, geometry=geometry)  # pyright: ignore[reportArgumentType]
    assert eval(repr(conv), dict(vars(modula_agd))) == conv


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Conv2d(0, 3), "fan_out of a Conv2d"),
        (lambda: Conv2d(3, 0), "fan_in of a Conv2d"),
        (lambda: Conv2d(3, 3, 0), "kernel of a Conv2d"),
        (lambda: Conv2d(3, 3, (2, -1)), "kernel of a Conv2d"),
        (lambda: Conv2d(3, 3, (2, 1, 1)), r"or a tuple of 2 such, but is \(2, 1, 1\)"),
        (lambda: Conv3d(3, 3, (2, 1)), r"or a tuple of 3 such, but is \(2, 1\)"),
        (lambda: Conv1d(3, 3, 2.0), r"kernel of a Conv1d must be an integer of at least 1, but is 2\.0"),  # pyright: ignore[reportArgumentType]
        (lambda: Conv2d(3, 3, stride=0), "stride of a Conv2d"),
        (lambda: Conv2d(3, 3, stride=(1, 0)), "stride of a Conv2d"),
        (lambda: Conv2d(3, 3, dilation=0), "dilation of a Conv2d"),
        (lambda: Conv2d(3, 3, padding=-1), "padding of a Conv2d must be an integer of at least 0"),
        (lambda: Conv2d(3, 3, padding=0.5), "padding of a Conv2d"),  # pyright: ignore[reportArgumentType]
        (lambda: Conv2d(3, 3, padding=True), "padding of a Conv2d"),
        (lambda: Conv2d(3, 3, padding="same"), "padding of a Conv2d"),  # pyright: ignore[reportArgumentType]
        (lambda: Conv2d(4, 4, groups=0), "groups of a Conv2d"),
        (lambda: Conv2d(4, 3, groups=2), "2 groups must divide both 4 and 3 channels"),
        (lambda: Conv2d(3, 4, groups=2), "2 groups must divide both 3 and 4 channels"),
        (lambda: Conv2d(3, 4, geometry="taps "), "Take 'taps' .* or 'patch'"),  # pyright: ignore[reportArgumentType]
        (lambda: ConvTranspose2d(3, 4, output_padding=1), r"output_padding \(1, 1\) must be below the stride"),
        (lambda: ConvTranspose2d(3, 4, stride=2, output_padding=-1), "output_padding of a ConvTranspose2d"),
        (lambda: ConvTranspose2d(3, 4, stride=(2, 1), output_padding=(0, 1)), "output_padding"),
    ],
)
def test_a_number_out_of_range_is_an_error(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        build()


@pytest.mark.parametrize("conv", [Conv1d(3, 4), Conv2d(3, 4), Conv3d(3, 4), ConvTranspose2d(3, 4)])
def test_another_kind_of_space_is_an_error_when_composed(conv: Atom) -> None:
    with pytest.raises(SpaceMismatch):
        _ = conv @ Linear(4, 2)
    with pytest.raises(SpaceMismatch):
        _ = Conv2d(2, 3) @ Conv1d(3, 4)


def test_a_kernel_larger_than_its_input_is_an_error_that_names_the_layer() -> None:
    conv = Conv1d(2, 1, 5)
    with pytest.raises(SpaceMismatch, match=r"Conv1d\(2, 1, 5\) could not be applied"):
        conv(conv.init(0), torch.ones(1, 3, 1))


# -- which taps meet -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_the_taps_that_meet_are_those_that_reach_one_output(side: int, dilation: int, stride: int) -> None:
    conv = ConvTranspose1d(1, 1, side, stride=stride, dilation=dilation)
    ones = torch.ones(1, 20, 1, dtype=torch.float64)
    # powers of two tell apart every set of taps
    marks = (2.0 ** torch.arange(side, dtype=torch.float64)).reshape(1, 1, side)
    reached = {int(value) for value in conv({"weight": marks}, ones).flatten()}
    largest = {sum(2**tap for tap in patch) for patch in conv.patches}
    assert largest <= reached
    assert all(any(value & whole == value for whole in largest) for value in reached)
    assert conv.reach == max(map(len, conv.patches))
    if dilation == 1:
        assert conv.reach == math.ceil(side / stride)


@each
def test_the_reach_is_the_largest_count_of_taps(conv, shape: tuple[int, ...]) -> None:
    single = replace(conv, fan_out=1, fan_in=1, groups=1)
    wide = [9 for _ in shape[2:]]
    x = torch.ones([1, *wide, 1] if isinstance(conv.domain, Sequence) else [1, 1, *wide], dtype=torch.float64)
    counts = single({"weight": torch.ones(single.shape, dtype=torch.float64)}, x)
    assert counts.max().item() == pytest.approx(conv.reach)
    assert sorted(tap for patch in conv.meeting for tap in patch) == list(range(math.prod(conv.sides)))


def matrix_of(conv, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The whole convolution as one matrix, by its action on a batch of unit inputs."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return conv.forward(weight, units).flatten(1).mT


# -- gains in the supremum over positions ----------------------------------------------------------------------------------


@each
@geometries
def test_outputs_stay_within_the_proved_gain_times_the_norm(conv, shape: tuple[int, ...], geometry: str) -> None:
    conv = replace(conv, geometry=geometry)
    for seed in range(20):
        weight, x = gaussian(*conv.shape, seed=seed), gaussian(*shape, seed=seed + 100)
        allowed = conv.gain.proved.value * conv.norm.size(weight) * conv.domain.norm(x)
        ratio = conv.codomain.norm(conv.forward(weight, x)) / allowed
        assert ratio.max().item() <= 1 + tolerance(torch.float64, weight.numel())


def equal_taps(conv) -> tuple[Tensor, Tensor]:
    """A kernel of equal (semi-)orthogonal taps, the same in every group, and the leading input of a tap."""
    rows, cols = conv.fan_out // conv.groups, conv.fan_in // conv.groups
    tap = Linear(rows, cols).init(0, dtype=torch.float64)["weight"]
    leading = torch.linalg.svd(tap)[2][0].repeat(conv.groups)
    tap = (tap.mT if isinstance(conv, TRANSPOSED) else tap).repeat(conv.groups, 1)
    return tap.reshape(*tap.shape, *[1] * len(conv.sides)).expand(conv.shape), leading


@each
@geometries
def test_equal_orthogonal_taps_on_constant_inputs_attain_the_proved_gain(
    conv, shape: tuple[int, ...], geometry: str
) -> None:
    conv = replace(conv, geometry=geometry)
    weight, leading = equal_taps(conv)
    if isinstance(conv.domain, Sequence):
        x = leading.expand(1, 9, -1)
    else:
        wide = [9 for _ in conv.sides]
        x = leading.reshape(1, -1, *[1] * len(wide)).expand(1, -1, *wide)
    ratio = (conv.codomain.norm(conv.forward(weight, x)) / conv.domain.norm(x)).item()
    assert ratio == pytest.approx(conv.reach)
    assert conv.gain.proved.value * conv.norm.size(weight).item() == pytest.approx(ratio)


@each
def test_the_patch_norm_never_exceeds_the_worst_case_of_the_taps(conv, shape: tuple[int, ...]) -> None:
    patch = replace(conv, geometry="patch")
    for seed in range(10):
        weight = gaussian(*conv.shape, seed=seed)
        worst = conv.gain.proved.value * conv.norm.size(weight).item()
        assert patch.norm.size(weight).item() <= worst * (1 + tolerance(torch.float64, weight.numel()))
    one = torch.zeros(conv.shape, dtype=torch.float64).flatten(2)
    one[..., 0] = gaussian(*conv.shape[:2])
    one = one.reshape(conv.shape)
    if conv.reach > 1 and not isinstance(conv, TRANSPOSED):
        # one tap alone: n times too large as n equal taps, sqrt(n) times as a patch
        assert patch.norm.size(one).item() * math.sqrt(conv.reach) == pytest.approx(
            conv.gain.proved.value * conv.norm.size(one).item()
        )


@pytest.mark.parametrize(
    "conv", [Conv1d(1, 1, 4), Conv2d(1, 1, (2, 3)), Conv3d(1, 1, 2), ConvTranspose1d(1, 1, 5, stride=2)]
)
def test_of_one_channel_the_exact_gain_lies_within_both_bounds(conv) -> None:
    for seed in range(10):
        weight = gaussian(*conv.shape, seed=seed)
        # of one channel the norm is the maximum over positions, whose operator norm is the largest absolute row sum
        shape = [12 for _ in conv.sides]
        matrix = matrix_of(conv, weight, (*shape, 1) if isinstance(conv.domain, Sequence) else (1, *shape))
        exact = torch.linalg.matrix_norm(matrix, ord=math.inf).item()
        patch = replace(conv, geometry="patch").norm.size(weight).item()
        taps = conv.gain.proved.value * conv.norm.size(weight).item()
        assert exact <= patch * (1 + 1e-12)
        assert patch <= taps * (1 + 1e-12)


def test_gains_are_graded() -> None:
    assert Conv2d(3, 3, 1).gain.typical.grade == Grade.PROVED
    assert Conv2d(3, 3, 2).gain.typical.grade == Grade.TYPICAL
    assert Conv2d(3, 3, 2).gain.typical.value == 1
    assert Conv2d(3, 3, 2).gain.proved.grade == Grade.PROVED
    assert Conv2d(3, 3, 2, geometry="patch").gain.typical.grade == Grade.PROVED
    assert ConvTranspose2d(3, 3, 2, stride=2).gain.typical.grade == Grade.PROVED
    assert Conv2d(3, 3, 2, geometry="patch").gain.proved.value == 1


@pytest.mark.parametrize(
    ("conv", "shape"),
    [(Conv2d(64, 64, 3), (1, 64, 16, 16)), (Conv1d(64, 64, 5), (1, 200, 64)), (Conv3d(32, 32, 2), (1, 32, 8, 8, 8))],
)
def test_initial_convolutions_have_the_typical_gain_on_random_inputs(conv, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)

    def change(conv) -> float:
        out = conv(conv.init(0, dtype=torch.float64), x)
        return (out.square().mean() / x.square().mean()).sqrt().item()

    # incoherent taps: c(k) = sqrt(n), so a kernel of norm 1 keeps the mean square
    assert change(conv) == pytest.approx(1.0, rel=0.05)
    # the unfolded matrix sees only o of the o·n dimensions of a random patch
    assert change(replace(conv, geometry="patch")) == pytest.approx(1 / math.sqrt(conv.reach), rel=0.05)


def test_initial_transposed_convolutions_without_overlap_keep_the_mean_square() -> None:
    conv, x = ConvTranspose2d(32, 32, 2, stride=2), gaussian(1, 32, 8, 8)
    for geometry in ("taps", "patch"):
        out = (conv := replace(conv, geometry=geometry))(conv.init(0, dtype=torch.float64), x)
        assert out.square().mean().sqrt().item() == pytest.approx(x.square().mean().sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@each
def test_a_patch_draw_has_equal_singular_values(conv, shape: tuple[int, ...], seed: int) -> None:
    conv = replace(conv, geometry="patch")
    weight = conv.init(seed, dtype=torch.float64)["weight"]
    for matrices in conv.norm.cut(weight):
        values = torch.linalg.svdvals(matrices)
        expected = math.sqrt(matrices.shape[-2] / matrices.shape[-1])
        torch.testing.assert_close(values, torch.full_like(values, expected))


# -- the gain in the Euclidean norm ----------------------------------------------------------------------------------------


@each
def test_the_euclidean_gain_bounds_the_matrix_of_the_convolution(conv, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        weight = gaussian(*conv.shape, seed=seed)
        exact = torch.linalg.matrix_norm(matrix_of(conv, weight, shape[1:]), ord=2).item()
        assert exact <= euclidean_gain(conv, weight).item() * (1 + tolerance(torch.float64, weight.numel()))


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (Conv2d(3, 2, 2, stride=2), (2, 4, 4)),
        (Conv2d(4, 4, (1, 3), stride=(1, 3), groups=2), (4, 2, 6)),
        (ConvTranspose2d(3, 2, 2, stride=2), (2, 3, 3)),
        (ConvTranspose1d(3, 2, 2, stride=4), (5, 2)),
        (Conv1d(3, 2, 1), (5, 2)),
    ],
    ids=repr,
)
def test_the_euclidean_gain_is_exact_where_patches_do_not_overlap(conv, shape: tuple[int, ...]) -> None:
    weight = gaussian(*conv.shape)
    exact = torch.linalg.matrix_norm(matrix_of(conv, weight, shape), ord=2).item()
    assert euclidean_gain(conv, weight).item() == pytest.approx(exact)


@pytest.mark.parametrize(
    ("conv", "positions"), [(Conv1d(1, 1, 3), 80), (Conv1d(1, 1, 4, stride=2), 80), (ConvTranspose1d(1, 1, 3), 80)]
)
def test_equal_taps_approach_the_euclidean_gain(conv, positions: int) -> None:
    weight = torch.ones(conv.shape, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix_of(conv, weight, (positions, 1)), ord=2).item()
    assert exact >= 0.99 * euclidean_gain(conv, weight).item()


@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (4, 2), (5, 2), (2, 3)])
def test_the_euclidean_gain_of_a_square_kernel_is_ceil_k_over_s_times_sigma(side: int, stride: int) -> None:
    conv = Conv2d(3, 2, side, stride=stride)
    weight = gaussian(*conv.shape)
    sigma = torch.linalg.matrix_norm(weight.flatten(1), ord=2).item()
    assert euclidean_gain(conv, weight).item() == pytest.approx(math.ceil(side / stride) * sigma)
    # and in the supremum over positions, the same σ with sqrt(k²·i/o)
    patch = replace(conv, geometry="patch")
    assert patch.norm.size(weight).item() == pytest.approx(side * math.sqrt(2 / 3) * sigma)


def test_a_transposed_convolution_has_the_euclidean_gain_of_its_adjoint() -> None:
    transposed, adjoint = ConvTranspose2d(3, 2, 3, stride=2), Conv2d(2, 3, 3, stride=2)
    weight = gaussian(*adjoint.shape)
    assert euclidean_gain(transposed, weight).item() == euclidean_gain(adjoint, weight).item()


def test_a_kernel_of_another_shape_has_no_euclidean_gain() -> None:
    with pytest.raises(InvalidArgument, match=r"kernel of shape \(3, 2, 3, 3\), but was given one of \(2, 3, 3, 3\)"):
        euclidean_gain(Conv2d(3, 2), gaussian(2, 3, 3, 3))


# -- in a network ----------------------------------------------------------------------------------------------------------


@geometries
@pytest.mark.parametrize(
    ("up", "down", "shape"),
    [
        (ConvTranspose1d(4, 2, stride=2), Conv1d(3, 4), (8, 4, 2)),
        (ConvTranspose2d(4, 2, stride=2), Conv2d(3, 4), (8, 2, 4, 4)),
        (ConvTranspose3d(4, 2, 2, stride=2), Conv3d(3, 4, 2), (8, 2, 2, 2, 2)),
    ],
)
def test_certified_steps_lower_the_loss_of_a_network_of_them(up, down, shape: tuple[int, ...], geometry: str) -> None:
    # the whole chain of bounds at work: on a full batch a certified step cannot raise the loss
    network = Mean() @ replace(down, geometry=geometry) @ Tanh() @ replace(up, geometry=geometry)
    method = agd(network, SquareLoss(), search=Certified())
    params, x, y = network.init(0, dtype=torch.float64), gaussian(*shape), gaussian(shape[0], 3, seed=1)
    state = method.init(params)
    values = []
    for _ in range(10):
        grads, value = torch.func.grad_and_value(method.objective)(params, x, y)
        updates, state = method.update(grads, state, params, evidence=method.evidence(params, x, y))
        params = {name: w + updates[name] for name, w in params.items()}
        values.append(value.item())
    assert all(later < earlier for earlier, later in pairwise(values))
    assert method.certificate().grade == Grade.PROVED
