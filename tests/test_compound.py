"""Whole architectures: their names, spaces and depths."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from modula_agd import (
    MLP,
    Conv2d,
    CrossEntropy,
    Features,
    Identity,
    InvalidArgument,
    LayerNorm,
    Linear,
    Logits,
    Module,
    ResMLP,
    RMSNorm,
    Sequence,
    SpaceMismatch,
    SwiGLU,
    Tanh,
    residual,
)
from modula_agd.compound import mixed, normalised
from support import gaussian, trained


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


# -- parts that the other networks share -----------------------------------------------------------------------------------


def test_one_connection_averages_or_adds() -> None:
    branch, x = Tanh() @ Linear(4, 4), gaussian(6, 4)
    weight = branch.init(0, dtype=torch.float64)["0.weight"]
    h = torch.tanh(x @ weight.mT)
    convex, total = mixed(Identity(), branch, 4), mixed(Identity(), branch, 4, "sum")
    torch.testing.assert_close(convex({"1.0.weight": weight}, x), 0.75 * x + 0.25 * h)
    torch.testing.assert_close(total({"1.0.weight": weight}, x), x + h)
    assert mixed(Identity(), branch, 1) == branch


def test_several_blocks_take_turns_and_all_count() -> None:
    first, second, x = Tanh() @ Linear(4, 4), Linear(4, 4), gaussian(6, 4)
    net = residual((first, second), 2)
    params = net.init(0, dtype=torch.float64)
    a, b, c, d = params.values()
    h = 0.75 * x + 0.25 * torch.tanh(x @ a.mT)
    h = 0.75 * h + 0.25 * h @ b.mT
    h = 0.75 * h + 0.25 * torch.tanh(h @ c.mT)
    h = 0.75 * h + 0.25 * h @ d.mT
    torch.testing.assert_close(net(params, x), h)
    depths = [residual((first, second), blocks).bound(constants="proved").depth for blocks in (1, 2, 8, 64)]
    assert depths == pytest.approx([1.0] * 4)


def test_the_sum_form_grows_with_its_blocks() -> None:
    bounds = [residual(Linear(4, 4), blocks, form="sum").bound() for blocks in (1, 2, 8)]
    assert [bound.magnitude for bound in bounds] == pytest.approx([2, 4, 256])
    assert [bound.depth for bound in bounds] == pytest.approx([0.5, 1, 4])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("space", [Features(4), Sequence(4)], ids=str)
def test_a_gated_layer_multiplies_two_branches(space: Features | Sequence, bias: bool) -> None:
    net, x = SwiGLU(space, 6, bias=bias), gaussian(5, 4) if space == Features(4) else gaussian(5, 3, 4)
    assert (net.domain, net.codomain) == (space, space)
    params = {name: gaussian(*value.shape, seed=i) for i, (name, value) in enumerate(net.init(0).items())}
    assert sum(value.numel() for value in params.values()) == 3 * 4 * 6 + bias * (6 + 6 + 4)
    if bias:
        gate, gate_bias, up, up_bias, down, down_bias = params.values()
    else:
        (gate, up, down), gate_bias, up_bias, down_bias = params.values(), 0, 0, 0
    inner = functional.silu(x @ gate.mT + gate_bias) * (x @ up.mT + up_bias)
    torch.testing.assert_close(net(params, x), inner @ down.mT + down_bias)
    if not bias:
        bound = net.bound()
        assert (bound.depth, bound.ceiling) == (pytest.approx(3), pytest.approx(3))
    assert SwiGLU(4, 6).domain == Features(4)


# with momentum some fit it within ten steps, and steps follow what is left of the descent some tens later
@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"momentum": 0.95, "steps": 60}], ids=["full batch", "momentum"]
)
@pytest.mark.parametrize(
    "network",
    [
        MLP(Logits(3), 8, 4, 3),
        MLP(Logits(3), 8, 4, 3, bias=True),
        ResMLP(Logits(3), 8, 4, 3),
        ResMLP(Logits(3), 8, 4, 2, block_depth=1, bias=True),
        Linear(Logits(3), 4) @ SwiGLU(4, 8),
        # stacked, what enters a product is normalised: without, its degree doubles with each block
        Linear(Logits(3), 4) @ residual(SwiGLU(4, 8) @ RMSNorm(), 3),
        Linear(Logits(3), 4) @ residual(SwiGLU(4, 8, bias=True) @ RMSNorm(), 2, form="sum"),
    ],
    ids=["MLP", "MLP with biases", "ResMLP", "ResMLP with biases", "gated", "gated stack", "gated sum"],
)
def test_each_learns_a_small_batch(network: Module, options: dict[str, Any]) -> None:
    before, after = trained(network, CrossEntropy(), gaussian(6, 4), torch.arange(6) % 3, **options)
    assert after < 0.95 * before
    assert 0 < network.bound().depth <= network.bound().ceiling < math.inf


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None, "2", (2,)])
def test_numbers_are_positive_integers(wrong: Any) -> None:
    for build in (
        lambda: MLP(3, wrong, 4, 2),
        lambda: MLP(3, 5, 4, wrong),
        lambda: ResMLP(3, 5, 4, wrong),
        lambda: residual(Linear(3, 3), wrong),
        lambda: mixed(Identity(), Linear(3, 3), wrong),
        lambda: SwiGLU(wrong, 6),
        lambda: SwiGLU(4, wrong),
    ):
        with pytest.raises(InvalidArgument, match="integer of at least 1"):
            build()


@pytest.mark.parametrize("wrong", [3, None, "block", (), (3,), torch.relu])
def test_a_block_is_a_module(wrong: Any) -> None:
    with pytest.raises(SpaceMismatch, match="give a module"):
        residual(wrong, 2)
    with pytest.raises(SpaceMismatch, match="not a module"):
        mixed(Identity(), wrong, 2)
    with pytest.raises(SpaceMismatch, match="not a module"):
        mixed(wrong, Linear(3, 3), 2)


@pytest.mark.parametrize("wrong", ["none", None, 1, 0.0])
def test_choices_are_checked(wrong: Any) -> None:
    for build in (
        lambda: MLP(3, 5, 4, 2, bias=wrong),
        lambda: ResMLP(3, 5, 4, 2, bias=wrong),
        lambda: SwiGLU(4, 6, bias=wrong),
        lambda: normalised(LayerNorm(), Features(4), wrong),
    ):
        with pytest.raises(InvalidArgument, match="True or False"):
            build()
    with pytest.raises(InvalidArgument, match="'convex' or 'sum'"):
        residual(Linear(3, 3), 2, form=wrong)
    with pytest.raises(SpaceMismatch, match=r"Logits\(4\)"):
        SwiGLU(Logits(4), 6)
