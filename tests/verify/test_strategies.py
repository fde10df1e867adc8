"""The strategies reach the corners that they are there for."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from modula_agd import Features, Image, Multiply, Sequence, Volume
from modula_agd.convolution import Conv1d, Conv2d, ConvTranspose2d, ConvTranspose3d
from modula_agd.module import Compose, Scaled, Sum
from modula_agd.verify.draw import INPUT_KINDS, MATRIX_KINDS, ModuleDraw, activation, generators, matrix
from modula_agd.verify.strategies import loss_draws, module_draws, networks, norm_draws, objectives

QUICK = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
FINDING = settings(max_examples=2000, database=None, derandomize=True, phases=[Phase.generate])


def _parts(module):
    yield module
    for _, child in module.children:
        yield from _parts(child)


@pytest.mark.parametrize("kind", MATRIX_KINDS)
@pytest.mark.parametrize("shape", [(3, 4), (4, 2), (1, 3), (3, 1), (1, 1)])
def test_matrices_have_the_spectrum_that_their_kind_names(kind, shape):
    x = matrix(kind, shape, torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(x)
    rank = int((s > 1e-9 * s[0].clamp(min=1e-300)).sum())
    if kind in ("orthogonal", "identity"):
        assert torch.allclose(s, torch.ones_like(s))
    elif kind in ("ones", "rank one"):
        assert rank == 1
    elif kind == "zero":
        assert not x.any()
    elif kind == "spread" and len(s) > 1:
        assert s[-1] < 0.1 * s[0]
    assert x.shape == shape


def test_kernels_are_stacks_of_matrices():
    kernel = matrix("orthogonal", (4, 3, 2, 2), torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(kernel.permute(2, 3, 0, 1))
    assert torch.allclose(singular, torch.ones_like(singular))


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("space", [Features(3), Sequence(3), Image(3), Volume(3)], ids=repr)
def test_activations_fit_their_space(kind, space):
    x = activation(kind, space, ModuleDraw(), next(generators(0)))
    assert space.fits(x)
    if kind == "scattered" and not isinstance(space, Features):
        features = x.movedim(1, -1) if isinstance(space, Image | Volume) else x
        assert ((features != 0).sum(-1) == 1).all()
        assert (features.flatten(1, -2).sum(1) > 0).all()  # every channel somewhere


@pytest.mark.parametrize(
    "reached",
    [
        lambda d: d.weights == "zero",
        lambda d: d.t == 0.0,
        lambda d: 0 < d.t < 1e-5,
        lambda d: d.t > 1.5,
        lambda d: d.magnitude > 300,
        lambda d: d.magnitude < 3e-3,
        lambda d: d.attack > 0,
        lambda d: d.weights == "ones" and d.steps == "along" and d.inputs == "constant",
        lambda d: d.batch == 1,
    ],
)
def test_module_draws_reach(reached):
    assert reached(find(module_draws(), reached, settings=FINDING))


def test_norm_draws_reach_huge_and_tiny_scales():
    assert find(norm_draws(), lambda d: d.exponent <= -12, settings=FINDING).exponent <= -12
    assert find(norm_draws(), lambda d: d.exponent >= 12, settings=FINDING).exponent >= 12


def test_loss_draws_reach_the_flat_tails_and_the_origin():
    assert find(loss_draws(), lambda d: d.scale == 0.0, settings=FINDING).scale == 0.0
    assert find(loss_draws(), lambda d: d.scale > 10 and d.delta > 10, settings=FINDING).scale > 10


@pytest.mark.parametrize("kind", [Sum, Scaled, Multiply, Compose])
def test_networks_contain_every_construction(kind):
    network = find(networks(), lambda n: any(isinstance(part, kind) for part in _parts(n)), settings=FINDING)
    assert any(isinstance(part, kind) for part in _parts(network))


@pytest.mark.parametrize("stem", ["Tokens", "Sequence", "Image", "Volume", "Features"])
def test_networks_start_from_every_space(stem):
    assert type(find(networks(), lambda n: type(n.domain).__name__ == stem, settings=FINDING).domain).__name__ == stem


@pytest.mark.parametrize("kind", [Conv1d, Conv2d, ConvTranspose2d, ConvTranspose3d])
@pytest.mark.parametrize(
    "option",
    [lambda c: c.geometry == "patch", lambda c: c.groups > 1, lambda c: c.dilation > 1, lambda c: c.stride > 1],
    ids=["patch", "grouped", "dilated", "strided"],
)
def test_networks_contain_every_kind_of_convolution(kind, option):
    def has(network):
        return any(isinstance(part, kind) and option(part) for part in _parts(network))

    assert has(find(networks(), has, settings=FINDING))


@QUICK
@given(networks(), st.integers(0, 10))
def test_networks_run_and_are_bounded_in_size(network, seed):
    params = network.init(seed, dtype=torch.float64)
    x = activation("gaussian", network.domain, ModuleDraw(side=4), next(generators(seed)))
    assert network.codomain.fits(network(params, x))
    assert len(params) <= 60


@QUICK
@given(objectives(smooth=True))
def test_smooth_networks_have_a_second_order_bound(objective):
    assert objective.network.bound(0.1, constants="proved").error is not None
