"""Norms of kernels against loops over taps, patches and groups."""

import math

import pytest
import torch

from modula_agd import Frobenius, InvalidArgument, Norm, PerTap, Spectral, Unfolded
from support import gaussian, seeded, tolerance

CPU = torch.device("cpu")
inners = pytest.mark.parametrize("inner", [Spectral(), Frobenius()])
grouped = pytest.mark.parametrize("groups", [1, 2])


@grouped
@inners
def test_per_tap_is_a_loop_over_taps_and_groups(inner: Norm, groups: int) -> None:
    norm = PerTap(inner, gain=2.5, groups=groups)
    weight = gaussian(6, 4 // groups, 2, 3)
    sizes, dual, direction = [], 0.0, torch.zeros_like(weight)
    rows = 6 // groups
    for group in range(groups):
        for i in range(2):
            for j in range(3):
                out = slice(group * rows, (group + 1) * rows)
                tap = weight[out, :, i, j]
                sizes.append(2.5 * inner.size(tap).item())
                dual += inner.dual(tap).item() / 2.5
                direction[out, :, i, j] = inner.direction(tap).dense() / 2.5
    slack = tolerance(torch.float64, weight.numel())
    assert norm.size(weight).item() == pytest.approx(max(sizes), rel=slack)
    assert norm.dual(weight).item() == pytest.approx(dual, rel=slack)
    assert torch.allclose(norm.direction(weight).dense(), direction, rtol=0, atol=slack)


def test_every_tap_of_a_per_tap_draw_has_norm_1_over_the_gain() -> None:
    weight = PerTap(Spectral(), gain=3.0, groups=2).draw((6, 2, 3, 3), seeded(), CPU, torch.float64)
    taps = weight.reshape(2, 3, 2, 9).permute(3, 0, 1, 2)
    sizes = torch.linalg.matrix_norm(taps, ord=2) * math.sqrt(2 / 3)
    assert torch.allclose(sizes, torch.full_like(sizes, 1 / 3))


@grouped
@inners
def test_per_tap_of_a_transposed_kernel_is_that_of_the_kernel_with_each_groups_fans_exchanged(
    inner: Norm, groups: int
) -> None:
    weight = gaussian(6, 4 // groups, 2, 3)
    exchanged = torch.cat([part.transpose(0, 1) for part in weight.chunk(groups)])
    plain, transposed = PerTap(inner, 2.5, groups), PerTap(inner, 2.5, groups, transposed=True)
    assert transposed.size(exchanged).item() == plain.size(weight).item()
    assert transposed.dual(exchanged).item() == plain.dual(weight).item()


@grouped
@inners
def test_unfolded_is_a_loop_over_groups(inner: Norm, groups: int) -> None:
    norm = Unfolded(inner, groups=groups)
    weight = gaussian(6, 4 // groups, 2, 3)
    parts = [part.flatten(1) for part in weight.chunk(groups)]
    slack = tolerance(torch.float64, weight.numel())
    assert norm.size(weight).item() == pytest.approx(max(inner.size(part).item() for part in parts), rel=slack)
    assert norm.dual(weight).item() == pytest.approx(sum(inner.dual(part).item() for part in parts), rel=slack)
    directions = torch.cat([inner.direction(part).dense() for part in parts]).reshape(weight.shape)
    assert torch.allclose(norm.direction(weight).dense(), directions, rtol=0, atol=slack)


@grouped
@inners
def test_unfolded_of_a_transposed_kernel_is_a_loop_over_patches_and_groups(inner: Norm, groups: int) -> None:
    patches = ((0, 5), (1, 3, 2), (4,))
    norm = Unfolded(inner, groups, transposed=True, patches=patches)
    weight = gaussian(6, 4 // groups, 2, 3)
    sizes, dual, direction = [], 0.0, torch.zeros_like(weight).flatten(2)
    rows = 6 // groups
    for group in range(groups):
        into = slice(group * rows, (group + 1) * rows)
        for patch in patches:
            taps = [weight[into].flatten(2)[:, :, tap].mT for tap in patch]
            matrix = torch.cat(taps, 1)
            sizes.append(inner.size(matrix).item())
            dual += inner.dual(matrix).item()
            for tap, part in zip(patch, inner.direction(matrix).dense().split(rows, 1), strict=True):
                direction[into, :, tap] = part.mT
    slack = tolerance(torch.float64, weight.numel())
    assert norm.size(weight).item() == pytest.approx(max(sizes), rel=slack)
    assert norm.dual(weight).item() == pytest.approx(dual, rel=slack)
    assert torch.allclose(norm.direction(weight).dense(), direction.reshape(weight.shape), rtol=0, atol=slack)


@pytest.mark.parametrize("patches", [((0, 1), (1,)), ((0, 2),), ((1,), (2,)), ((0,), ()), ((0, -1),)])
def test_patches_hold_each_tap_once(patches: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InvalidArgument, match="Name each of 0, 1, 2"):
        Unfolded(Spectral(), patches=patches)


def test_a_kernel_of_other_taps_than_the_patches_hold_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="a kernel of 4 taps, but its patches hold 3"):
        Unfolded(Spectral(), patches=((0, 2), (1,))).size(gaussian(3, 2, 4))
