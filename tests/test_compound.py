"""Whole architectures: their names, spaces and depths."""

import math

import pytest
import torch

from modula_agd import (
    MLP,
    Conv2d,
    Features,
    Identity,
    InvalidArgument,
    Linear,
    Logits,
    Module,
    ResMLP,
    Tanh,
    residual,
)
from support import gaussian


def weights(network: Module) -> list[str]:
    return [name for name, _ in network.atoms()]


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
def test_an_mlp_has_its_depth_in_atoms_and_in_the_bound(depth: int) -> None:
    net = MLP(Logits(3), 5, 4, depth)
    assert weights(net) == (["weight"] if depth == 1 else [f"{2 * index}.weight" for index in range(depth)])
    assert (net.domain, net.codomain) == (Features(4), Logits(3))
    bound = net.bound()
    assert bound.depth == bound.ceiling == pytest.approx(depth)
    assert bound.magnitude == pytest.approx(1)


def test_an_mlp_is_linear_maps_with_rectifiers_between_them() -> None:
    net = MLP(3, 5, 4, 3)
    params, x = net.init(0, dtype=torch.float64), gaussian(6, 4)
    h = x
    for index, weight in enumerate(params.values()):
        h = (h if index == 0 else math.sqrt(2) * h.relu()) @ weight.mT
    assert torch.allclose(net(params, x), h)


def test_a_bias_follows_each_linear_map_where_asked() -> None:
    assert weights(MLP(3, 5, 4, 2, bias=True)) == ["0.weight", "1.bias", "3.weight", "4.bias"]
    assert weights(MLP(3, 5, 4, 1, bias=True)) == ["0.weight", "1.bias"]


@pytest.mark.parametrize("blocks", [1, 2, 5, 32])
def test_the_depth_of_a_residual_mlp_does_not_grow_with_its_blocks(blocks: int) -> None:
    net = ResMLP(3, 5, 4, blocks)
    assert len(weights(net)) == 2 + 2 * blocks
    bound = net.bound()
    assert bound.depth == pytest.approx(2 + 2)
    assert bound.magnitude == pytest.approx(1)
    assert bound.ceiling == pytest.approx(2 + 2 * blocks)


def test_a_residual_stack_averages_each_block_with_its_input() -> None:
    net = residual(Tanh() @ Linear(4, 4), 2)
    params, x = net.init(0, dtype=torch.float64), gaussian(6, 4)
    h = x
    for weight in params.values():
        h = h / 2 + torch.tanh(h @ weight.mT) / 2
    assert torch.allclose(net(params, x), h)


def test_one_residual_block_is_the_block() -> None:
    block = Tanh() @ Linear(4, 4)
    assert residual(block, 1) == block


def test_blocks_of_more_layers_are_deeper() -> None:
    net = ResMLP(Logits(3), 5, 4, 4, block_depth=3, bias=True)
    assert len(weights(net)) == 2 * (2 + 4 * 3)
    assert len(weights(ResMLP(Logits(3), 5, 4, 4, block_depth=3))) == 2 + 4 * 3
    assert ResMLP(3, 5, 4, 4, block_depth=3).bound().depth == pytest.approx(2 + 3)


def test_a_residual_block_must_keep_its_space() -> None:
    with pytest.raises(InvalidArgument, match=r"maps Features\(4\) to Features\(3\)"):
        residual(Linear(3, 4), 2)
    assert residual(Conv2d(4, 4, padding=1), 2).domain == residual(Conv2d(4, 4, padding=1), 2).codomain


@pytest.mark.parametrize(
    "build",
    [
        lambda: MLP(3, 5, 4, 0),
        lambda: MLP(3, 0, 4, 2),
        lambda: ResMLP(3, 5, 4, 0),
        lambda: ResMLP(3, 5, 4, 2, block_depth=0),
        lambda: residual(Identity(), 0),
    ],
)
def test_a_number_out_of_range_is_an_error(build: object) -> None:
    with pytest.raises(InvalidArgument):
        build()  # pyright: ignore[reportCallIssue]
