"""Blocks divided by their largest entry: no square under- or overflows, empty blocks stay empty, NaN stays NaN."""

import pytest
import torch

from modula_agd.rescale import rescale
from support import gaussian, tolerance


def test_each_block_ends_with_largest_entry_1_and_its_peak_beside_it() -> None:
    x = torch.tensor([[3.0, -4.0], [0.5, 0.25]])
    scaled, peak = rescale(x, (1,))
    assert torch.equal(scaled, torch.tensor([[0.75, -1.0], [1.0, 0.5]]))
    assert torch.equal(peak, torch.tensor([[4.0], [0.5]]))


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_scaled_times_peak_is_the_input_for_any_choice_of_blocks(dims: tuple[int, ...]) -> None:
    x = gaussian(3, 4, 5)
    scaled, peak = rescale(x, dims)
    assert torch.allclose(scaled * peak, x, rtol=tolerance(torch.float64), atol=0)
    assert torch.equal(scaled.abs().amax(dims, keepdim=True), torch.ones_like(peak))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_rescaled_blocks_neither_underflow_nor_overflow(scale: float) -> None:
    x = gaussian(4, 4, dtype=torch.float32)
    scaled, _ = rescale(x * scale, (1,))
    reference, _ = rescale(x, (1,))
    assert torch.allclose(scaled.norm(dim=1), reference.norm(dim=1), rtol=tolerance(torch.float32, 4), atol=0)


def test_zero_and_denormal_blocks_are_zero_with_peak_zero() -> None:
    scaled, peak = rescale(torch.tensor([[0.0, 0.0], [1e-41, -1e-41], [1e-41, 1.0]]), (1,))
    assert not scaled[:2].any()
    assert not peak[:2].any()
    assert peak[2] == 1


def test_nan_and_infinity_show_as_nan_in_their_own_block_alone() -> None:
    scaled, _ = rescale(torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [2.0, 1.0]]), (1,))
    assert scaled[0].isnan().any()
    assert scaled[1].isnan().any()
    assert torch.equal(scaled[2], torch.tensor([1.0, 0.5]))
