"""The engine: what one update does, its numerics, its purity, and the transformations that it works under."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from modula_agd import (
    METHODS,
    MLP,
    Bias,
    Certified,
    ClosedForm,
    Conv2d,
    CrossEntropy,
    Embedding,
    ExactGrowth,
    Features,
    Flatten,
    Grade,
    InvalidArgument,
    Linear,
    Logits,
    Mean,
    Method,
    Module,
    NonFiniteGradient,
    ReLU,
    ResMLP,
    Scale,
    Sequence,
    SpaceMismatch,
    SquareLoss,
    State,
    Tanh,
    UnhalvedSquareLoss,
    UnknownBound,
    agd,
    published,
)
from modula_agd.module import Branches
from support import DTYPES, gaussian, seeded, tolerance

F64 = {"dtype": torch.float64}
NET = MLP(Logits(3), 5, 4, 3, bias=True)
SMOOTH = Linear(3, 5) @ Tanh() @ Linear(5, 4)
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "closed form, Frobenius": {"search": ClosedForm(), "direction": "frobenius"},
    "tracked, proved": {"sizes": "tracked", "constants": "proved"},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def problem(
    net: Module = NET, samples: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights, inputs and class indices."""
    assert isinstance(net.domain, Features)
    assert net.codomain is not None
    inputs = gaussian(samples, net.domain.width, dtype=dtype)
    return net.init(0, dtype=dtype), inputs, torch.arange(samples) % net.codomain.width


def gradients(method: Method, params: dict[str, Tensor], *batch: Tensor) -> dict[str, Tensor]:
    return torch.func.grad(method.objective)(params, *batch)


def step(method: Method, params: dict[str, Tensor], *batch: Tensor) -> tuple[dict[str, Tensor], State]:
    return method.update(gradients(method, params, *batch), method.init(params), params)


def moved(params: dict[str, Tensor], updates: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight + updates.get(name, torch.zeros_like(weight)) for name, weight in params.items()}


# -- what an update is -----------------------------------------------------------------------------------------------------


@each_option
def test_each_weight_moves_by_its_mass_times_t_relative_to_its_size(options: dict[str, Any]) -> None:
    net = Linear(Logits(3), 5) @ (0.7 * ReLU()) @ Bias(5, size=0.3) @ Scale(5, mass=2.0) @ Linear(5, 4, size=1.5)
    method = agd(net, CrossEntropy(), **options)
    params, *batch = problem(net)
    updates, state = step(method, params, *batch)
    frobenius = options.get("direction") == "frobenius"
    for (name, atom), size in zip(net.atoms(), state.sizes, strict=True):
        norm = atom.norm.euclidean if frobenius else atom.norm
        relative = (norm.size(updates[name]) / (atom.mass * size)).item()
        expected = state.t.item() * method.strides[name]
        assert relative == pytest.approx(expected, rel=4e-3)
        assert relative <= expected * (1 + tolerance(torch.float64, params[name].numel()))


@each_option
def test_the_descent_is_the_derivative_of_the_loss_along_the_update(options: dict[str, Any]) -> None:
    method = agd(NET, CrossEntropy(), **options)
    params, *batch = problem()
    grads = gradients(method, params, *batch)
    updates, state = method.update(grads, method.init(params), params)
    slope = sum((grads[name] * updates[name]).sum().item() / method.strides[name] for name in params)
    assert slope == pytest.approx(-(state.t * state.descent).item())
    weights = state.sizes * torch.tensor([atom.mass for _, atom in NET.atoms()])
    assert state.descent.item() == pytest.approx((state.descents * weights).sum().item())
    assert (state.descents > 0).all()


def test_the_state_says_what_the_search_found() -> None:
    method = agd(NET, CrossEntropy())
    params, *batch = problem()
    _, state = step(method, params, *batch)
    bound = NET.bound()
    assert state.magnitude.item() == pytest.approx(bound.magnitude)
    assert state.depth.item() == pytest.approx(bound.depth)
    assert state.eta.item() == pytest.approx(state.t.item() * bound.depth)
    assert state.steps.item() == 1
    assert state.skipped.item() == 0
    assert -(state.t * state.descent).item() < state.change.item() < 0


@pytest.mark.parametrize("name", METHODS)
def test_every_named_method_lowers_the_loss(name: str) -> None:
    method = METHODS[name](SMOOTH, SquareLoss())
    params, inputs, _ = problem(SMOOTH)
    targets = gaussian(7, 3, seed=3)
    state = method.init(params)
    values = []
    for _ in range(20):
        grads, value = torch.func.grad_and_value(method.objective)(params, inputs, targets)
        evidence = method.evidence(params, inputs, targets) if method.needs_evidence else None
        updates, state = method.update(grads, state, params, evidence)
        params = moved(params, updates)
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]
    assert state.steps.item() == 20


def test_the_published_method_counts_tensors_and_takes_magnitude_1_whatever_the_bound_says() -> None:
    net = 3 * (Linear(3, 4) + Bias(3, size=5.0) @ Linear(3, 4))
    assert (net.bound().ceiling, net.bound().magnitude) == (1, 21)
    params, inputs, _ = problem(net)
    _, state = step(published(net, SquareLoss()), params, inputs, gaussian(7, 3, seed=3))
    gradient = state.descent.item() / 3
    assert state.eta.item() == pytest.approx(math.log((1 + math.sqrt(1 + 4 * gradient)) / 2))
    assert state.t.item() == pytest.approx(state.eta.item() / 3)


def test_tracked_sizes_bound_the_current_norms_and_keep_their_floors() -> None:
    method = agd(NET, CrossEntropy(), sizes="tracked")
    params, *batch = problem()
    params["0.weight"] = 3 * params["0.weight"]
    params["6.weight"] = torch.zeros_like(params["6.weight"])
    _, state = step(method, params, *batch)
    for (name, atom), size in zip(NET.atoms(), state.sizes.tolist(), strict=True):
        assert size >= max(atom.norm.size(params[name]).item(), atom.floor)
        assert size <= max(1.02 * atom.norm.size(params[name]).item(), atom.floor)
    sizes = dict(zip(params, state.sizes.tolist(), strict=True))
    assert state.magnitude.item() == pytest.approx(NET.bound(sizes=sizes).magnitude)


def test_prescribed_sizes_are_the_declared_ones_whatever_the_weights_are() -> None:
    method = agd(NET, CrossEntropy())
    params, *batch = problem()
    _, state = step(method, {name: 3 * weight for name, weight in params.items()}, *batch)
    assert state.sizes.tolist() == [atom.size for _, atom in NET.atoms()]


def test_the_frobenius_direction_descends_less() -> None:
    params, *batch = problem()
    descents = [
        step(agd(NET, CrossEntropy(), direction=direction), params, *batch)[1].descent.item()
        for direction in ("spectral", "frobenius")
    ]
    assert descents[0] > descents[1]


def test_a_larger_declared_magnitude_or_proved_constants_shorten_the_step() -> None:
    params, *batch = problem()
    net = Linear(Logits(3), 5) @ (2 * Tanh()) @ Linear(5, 4)
    params = net.init(0, **F64)
    t = step(agd(net, CrossEntropy()), params, *batch)[1].t
    assert step(agd(net, CrossEntropy(), magnitude=3.0), params, *batch)[1].t < t
    assert step(agd(net, CrossEntropy(), constants="proved"), params, *batch)[1].t < t


def test_cross_entropy_on_features_pays_for_the_conversion_when_proved() -> None:
    net = Linear(9, 4)
    params, *batch = problem(net)
    typical, proved = (
        step(agd(net, CrossEntropy(), constants=constants, search=ClosedForm()), params, *batch)[1]
        for constants in ("typical", "proved")
    )
    # the curvature is 9 times larger, so a short step is 9 times shorter
    assert proved.t.item() < typical.t.item() / 4


def test_the_step_of_a_residual_network_shrinks_with_its_blocks_in_the_closed_form_alone() -> None:
    steps: dict[str, list[float]] = {"exact": [], "closed-form": []}
    for blocks in (2, 8, 32):
        net = ResMLP(Logits(3), 5, 4, blocks)
        params, *batch = problem(net)
        for name, ts in steps.items():
            ts.append(step(METHODS[name](net, CrossEntropy()), params, *batch)[1].t.item())
    assert min(steps["exact"]) > 0.7 * max(steps["exact"])
    assert steps["closed-form"][1] < steps["closed-form"][0] / 3
    assert steps["closed-form"][2] < steps["closed-form"][1] / 3


# -- zero, missing, frozen -------------------------------------------------------------------------------------------------


@each_option
def test_a_zero_gradient_gives_a_zero_step(options: dict[str, Any]) -> None:
    method = agd(NET, CrossEntropy(), **options)
    params, *_ = problem()
    grads = {name: torch.zeros_like(weight) for name, weight in params.items()}
    updates, state = method.update(grads, method.init(params), params)
    assert not any(update.any() for update in updates.values())
    assert (state.t.item(), state.eta.item(), state.descent.item(), state.change.item()) == (0, 0, 0, 0)


@each_option
def test_a_part_without_gradient_stays_and_the_others_move(options: dict[str, Any]) -> None:
    method = agd(NET, CrossEntropy(), **options)
    params, *batch = problem()
    grads: dict[str, Tensor | None] = dict(gradients(method, params, *batch))
    grads["0.weight"] = None
    del grads["3.weight"]
    grads["1.bias"] = torch.zeros_like(params["1.bias"])
    updates, state = method.update(grads, method.init(params), params)
    assert set(updates) == {"1.bias", "4.bias", "6.weight", "7.bias"}
    assert not updates["1.bias"].any()
    assert updates["6.weight"].any()
    by_name = dict(zip(params, state.descents.tolist(), strict=True))
    assert by_name["0.weight"] == by_name["3.weight"] == by_name["1.bias"] == 0 < by_name["6.weight"]


def test_no_gradient_at_all_is_no_step() -> None:
    method = agd(NET, CrossEntropy())
    params, *_ = problem()
    updates, state = method.update({}, method.init(params), params)
    assert updates == {}
    assert state.t == 0


def test_a_frozen_part_neither_moves_nor_counts() -> None:
    net = Linear(Logits(3), 5) @ Linear(5, 5).with_mass(0) @ Linear(5, 4)
    method = agd(net, CrossEntropy())
    params, *batch = problem(net)
    grads = gradients(method, params, *batch)
    grads["1.weight"] = torch.full_like(grads["1.weight"], math.nan)
    updates, state = method.update(grads, method.init(params), params)
    assert set(updates) == {"0.weight", "2.weight"}
    assert state.depth == 2


def test_a_rare_tokens_row_stays_while_the_others_move() -> None:
    net = Linear(Logits(7), Sequence(4)) @ Embedding(4, 7)
    method = agd(net, CrossEntropy())
    tokens = torch.tensor([[0, 1, 2], [1, 1, 5]])
    updates, _ = step(method, net.init(0, **F64), tokens, tokens)
    still = updates["0.weight"].abs().sum(1) == 0
    assert still.tolist() == [False, False, False, True, True, False, True]


# -- non-finite gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@each_option
def test_a_nonfinite_gradient_raises_names_its_parameter_and_touches_nothing(
    options: dict[str, Any], poison: float
) -> None:
    method = agd(NET, CrossEntropy(), **options)
    params, *batch = problem()
    before = {name: weight.clone() for name, weight in params.items()}
    grads = gradients(method, params, *batch)
    grads["3.weight"][1, 2] = poison
    grads["7.bias"][0] = poison
    with pytest.raises(NonFiniteGradient, match=r"gradient of '3\.weight', '7\.bias' holds NaN or infinity"):
        method.update(grads, method.init(params), params)
    assert all(torch.equal(params[name], before[name]) for name in params)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@each_option
def test_skip_leaves_the_weights_counts_and_goes_on(options: dict[str, Any], poison: float) -> None:
    method = agd(NET, CrossEntropy(), nonfinite="skip", momentum=None, **options)
    params, *batch = problem()
    good = gradients(method, params, *batch)
    bad = {name: gradient.clone() for name, gradient in good.items()}
    bad["3.weight"][1, 2] = poison
    updates, state = method.update(bad, method.init(params), params)
    assert not any(update.any() for update in updates.values())
    assert (state.skipped.item(), state.steps.item(), state.t.item()) == (1, 1, 0)
    with pytest.raises(NonFiniteGradient, match=r"'3\.weight'"):
        method.check(state)
    updates, state = method.update(good, state, params)
    assert all(update.any() for update in updates.values())
    assert (state.skipped.item(), state.steps.item()) == (1, 2)
    method.check(state)


# -- dtypes and shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@each_option
def test_low_precision_takes_nearly_the_step_of_float64(options: dict[str, Any], dtype: torch.dtype) -> None:
    method = agd(NET, CrossEntropy(), **options)
    params, *batch = problem()
    grads = {name: gradient.to(dtype) for name, gradient in gradients(method, params, *batch).items()}
    low = {name: weight.to(dtype) for name, weight in params.items()}
    updates, state = method.update(grads, method.init(low), low)
    exact_grads = {name: gradient.double() for name, gradient in grads.items()}
    exact_params = {name: weight.double() for name, weight in low.items()}
    exact_updates, exact_state = method.update(exact_grads, method.init(exact_params), exact_params)
    assert state.t.item() == pytest.approx(exact_state.t.item(), rel=tolerance(dtype, 1000))
    assert state.t.dtype == state.descents.dtype == torch.float64
    for name, update in updates.items():
        assert update.dtype == dtype
        # the iteration for the polar factor amplifies rounding by its slope at 0, about 2,000 at the smallest values
        scale = exact_updates[name].abs().amax().item()
        assert (update.double() - exact_updates[name]).abs().amax().item() <= scale * tolerance(dtype, 2000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_gradients_give_a_finite_step_in_every_dtype(dtype: torch.dtype, scale: float) -> None:
    for options in OPTIONS.values():
        method = agd(NET, CrossEntropy(), **options)
        params, *batch = problem()
        grads = {name: (scale * g).to(dtype) for name, g in gradients(method, params, *batch).items()}
        low = {name: weight.to(dtype) for name, weight in params.items()}
        updates, state = method.update(grads, method.init(low), low)
        assert all(update.isfinite().all() for update in updates.values())
        assert state.t > 0
        assert state.change < 0


def test_a_batch_of_one_takes_a_step() -> None:
    params, *batch = problem(samples=1)
    updates, state = step(agd(NET, CrossEntropy()), params, *batch)
    assert state.t > 0
    assert all(update.isfinite().all() for update in updates.values())


@each_option
def test_layers_of_one_feature_take_a_step(options: dict[str, Any]) -> None:
    net = Linear(1, 1) @ Tanh() @ Bias(1) @ Linear(1, 1)
    method = agd(net, SquareLoss(), **options)
    updates, state = step(method, net.init(0, **F64), gaussian(3, 1), gaussian(3, 1, seed=1))
    assert state.t > 0
    assert all(update.isfinite().all() and update.any() for update in updates.values())


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Linear(Logits(3), 8) @ Flatten(2, 2) @ ReLU() @ Conv2d(2, 3, padding=1, groups=1), (3, 2, 2)),
        (Linear(Logits(3), 4) @ Mean() @ Conv2d(4, 2, 1), (2, 3, 3)),
        (Linear(Logits(3), 4) @ Mean() @ Conv2d(4, 4, 3, groups=4) @ Conv2d(4, 2, (1, 2)), (2, 5, 5)),
    ],
)
@each_option
def test_convolutional_networks_take_a_step(net: Module, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    updates, state = step(
        agd(net, CrossEntropy(), **options), net.init(0, **F64), gaussian(3, *shape), torch.tensor([0, 1, 2])
    )
    assert state.t > 0
    assert all(update.isfinite().all() and update.any() for update in updates.values())


# -- purity and state ------------------------------------------------------------------------------------------------------


@each_option
def test_an_update_changes_none_of_its_arguments(options: dict[str, Any]) -> None:
    method = agd(NET, CrossEntropy(), **options)
    params, *batch = problem()
    grads, state = gradients(method, params, *batch), method.init(params)
    before = [value.clone() for value in (*params.values(), *grads.values(), *tree_leaves(state))]
    first, after = method.update(grads, state, params)
    assert all(
        torch.equal(x, y) for x, y in zip(before, (*params.values(), *grads.values(), *tree_leaves(state)), strict=True)
    )
    second, again = method.update(grads, state, params)
    assert all(torch.equal(first[name], second[name]) for name in params)
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves(after), tree_leaves(again), strict=True))
    storages = {weight.data_ptr() for weight in (*params.values(), *grads.values())}
    assert not storages & {update.data_ptr() for update in first.values()}


@each_option
def test_the_state_holds_tensors_only_and_none_of_a_weights_size(options: dict[str, Any]) -> None:
    net = MLP(Logits(3), 50, 40, 3)
    method = agd(net, CrossEntropy(), momentum=None, **options)
    params, *batch = problem(net)
    for state in (method.init(params), step(method, params, *batch)[1]):
        assert all(isinstance(value, Tensor) for value in tree_leaves(state))
        assert all(value.numel() <= len(params) for value in tree_leaves(state))
        assert not any(value.requires_grad for value in tree_leaves(state))


def test_an_update_detaches_gradients_and_weights() -> None:
    method = agd(NET, CrossEntropy(), sizes="tracked")
    params, *batch = problem()
    leaves = {name: weight.requires_grad_() for name, weight in params.items()}
    grads = torch.autograd.grad(method.objective(leaves, *batch), list(leaves.values()), create_graph=True)
    updates, state = method.update(dict(zip(leaves, grads, strict=True)), method.init(leaves), leaves)
    assert not any(update.requires_grad for update in updates.values())
    assert not any(value.requires_grad for value in tree_leaves(state))


def test_the_objective_is_the_loss_of_the_networks_outputs() -> None:
    method = agd(NET, CrossEntropy())
    params, inputs, targets = problem()
    assert method.objective(params, inputs, targets) == CrossEntropy()(NET(params, inputs), targets)


# -- certified -------------------------------------------------------------------------------------------------------------


def test_evidence_is_the_residual_and_the_largest_input() -> None:
    method = agd(SMOOTH, SquareLoss(), search=Certified())
    params, inputs, _ = problem(SMOOTH)
    targets = gaussian(7, 3, seed=3)
    residual, magnitude = method.evidence(params, inputs, targets)
    error = (SMOOTH(params, inputs) - targets).square().mean(1).sqrt()
    assert residual.item() == pytest.approx(error.mean().item())
    assert magnitude.item() == pytest.approx(inputs.square().mean(1).sqrt().max().item())
    assert not residual.requires_grad


def test_a_certified_update_without_evidence_is_an_error() -> None:
    method = agd(SMOOTH, SquareLoss(), search=Certified())
    params, inputs, _ = problem(SMOOTH)
    with pytest.raises(InvalidArgument, match=r"without evidence.*evidence=method\.evidence"):
        step(method, params, inputs, gaussian(7, 3))


@pytest.mark.parametrize(
    "net", [SMOOTH, Linear(3, 5) @ Linear(5, 5) @ Linear(5, 4), Bias(3) @ Linear(3, 5) @ Scale(5) @ Linear(5, 4)]
)
def test_every_certified_step_descends_by_at_least_what_it_promised(net: Module) -> None:
    method = agd(net, SquareLoss(), search=Certified())
    inputs, targets = 2 * gaussian(7, 4), 3 * gaussian(7, 3, seed=3)
    params = net.init(0, **F64)
    state, last = method.init(params), math.inf
    for _ in range(30):
        grads, value = torch.func.grad_and_value(method.objective)(params, inputs, targets)
        assert value.item() <= last
        updates, state = method.update(grads, state, params, method.evidence(params, inputs, targets))
        assert state.change < 0
        params, last = moved(params, updates), value.item() + state.change.item() + 1e-12 * value.item()


def test_a_certified_batch_of_zeros_is_no_error() -> None:
    method = agd(SMOOTH, SquareLoss(), search=Certified())
    params = SMOOTH.init(0, **F64)
    inputs, targets = torch.zeros(2, 4, dtype=torch.float64), gaussian(2, 3)
    grads = gradients(method, params, inputs, targets)
    updates, _ = method.update(grads, method.init(params), params, method.evidence(params, inputs, targets))
    assert all(update.isfinite().all() for update in updates.values())


def test_certificates_name_what_they_assume() -> None:
    proved = agd(SMOOTH, SquareLoss(), search=Certified()).certificate()
    assert (proved.grade, proved.assumptions) == (Grade.PROVED, ())
    exact = agd(Linear(3, 4), CrossEntropy()).certificate()
    assert exact.grade == Grade.ASSUMED
    named = "\n".join(exact.assumptions)
    for part in ("orthogonality", "prescribed sizes", "output norm: 1, typical"):
        assert part in named
    tracked = agd(Linear(Logits(3), 4), CrossEntropy(), sizes="tracked", momentum=None).certificate()
    assert [text.split(":")[0] for text in tracked.assumptions] == ["orthogonality"]
    code = published(Linear(3, 4), UnhalvedSquareLoss()).certificate()
    assert any("curvature of UnhalvedSquareLoss: 1, assumed" in text for text in code.assumptions)


# -- transformations -------------------------------------------------------------------------------------------------------


def test_gradients_by_torch_func_are_those_of_backward() -> None:
    method = agd(NET, CrossEntropy())
    params, inputs, targets = problem()
    model = NET.to_torch(**F64)
    model.load_state_dict(params)
    CrossEntropy()(model(inputs), targets).backward()
    grads = gradients(method, params, inputs, targets)
    assert all(torch.allclose(grads[name], weight.grad) for name, weight in model.named_parameters())  # pyright: ignore


def test_functional_call_runs_the_torch_face_with_other_weights() -> None:
    params, inputs, _ = problem()
    other = NET.init(5, **F64)
    model = NET.to_torch(**F64)
    assert torch.equal(torch.func.functional_call(model, other, (inputs,)), NET(other, inputs))
    assert not torch.equal(NET(other, inputs), NET(params, inputs))


def ensemble() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    members = [NET.init(seed, **F64) for seed in range(3)]
    return {name: torch.stack([member[name] for member in members]) for name in members[0]}, members


def test_an_ensemble_of_weights_runs_under_vmap() -> None:
    stacked, members = ensemble()
    inputs = gaussian(6, 4)
    together = torch.vmap(NET, in_dims=(0, None))(stacked, inputs)
    for index, member in enumerate(members):
        assert torch.allclose(together[index], NET(member, inputs))


def test_single_samples_run_under_vmap() -> None:
    params, inputs, _ = problem()
    assert torch.allclose(torch.vmap(lambda x: NET(params, x))(inputs), NET(params, inputs))


@each_option
def test_an_ensemble_is_updated_under_vmap(options: dict[str, Any]) -> None:
    method = agd(NET, CrossEntropy(), nonfinite="skip", **options)
    stacked, members = ensemble()
    _, inputs, targets = problem()
    grads = torch.vmap(torch.func.grad(method.objective), in_dims=(0, None, None))(stacked, inputs, targets)
    grads["3.weight"][2, 0, 0] = math.nan
    state = method.init(members[0])
    updates, after = torch.vmap(lambda g, p: method.update(g, state, p))(grads, stacked)
    assert after.skipped.tolist() == [0, 0, 1]
    for index, member in enumerate(members):
        alone, single = method.update({name: g[index] for name, g in grads.items()}, state, member)
        assert after.t[index].item() == pytest.approx(single.t.item(), rel=tolerance(torch.float64, 1000))
        assert all(torch.allclose(updates[name][index], alone[name], atol=1e-12) for name in alone)
        if "search" not in options:
            assert all(torch.allclose(after.lead[name][index], single.lead[name]) for name in alone)


# torch's own forward mode warns about torch.jit when it is first used
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_jvp_along_the_update_is_minus_t_times_the_descent() -> None:
    method = agd(NET, CrossEntropy(), rows="declared")
    params, *batch = problem()
    updates, state = step(method, params, *batch)
    _, slope = torch.func.jvp(lambda p: method.objective(p, *batch), (params,), (updates,))
    assert slope.item() == pytest.approx(-(state.t * state.descent).item())


@pytest.fixture
def compiler() -> Any:
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


@each_option
def test_network_and_update_are_one_graph_for_the_compiler(options: dict[str, Any], compiler: Callable) -> None:
    method = agd(NET, CrossEntropy(), **options)
    params, inputs, targets = problem()
    run, update = (compiler(function, backend="eager", fullgraph=True) for function in (NET, method.update))
    assert torch.equal(run(params, inputs), NET(params, inputs))
    grads, state = gradients(method, params, inputs, targets), method.init(params)
    expected, expected_state = method.update(grads, state, params)
    updates, after = update(grads, state, params)
    assert all(torch.equal(updates[name], expected[name]) for name in params)
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves(after), tree_leaves(expected_state), strict=True))


def test_a_compiled_update_never_lets_a_nonfinite_gradient_reach_a_weight(compiler: Callable) -> None:
    # compiled code cannot raise on a value, so the step is masked and counted as on an accelerator
    method = agd(NET, CrossEntropy())
    params, *batch = problem()
    grads, state = gradients(method, params, *batch), method.init(params)
    grads["3.weight"][0, 0] = math.nan
    updates, after = compiler(method.update, backend="eager", fullgraph=True)(grads, state, params)
    assert not any(update.any() for update in updates.values())
    assert after.skipped.item() == 1
    with pytest.raises(NonFiniteGradient, match=r"'3\.weight'"):
        method.check(after)


# and its code generator about its own parts
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_network_and_update_run_compiled_to_machine_code(compiler: Callable) -> None:
    method = agd(NET, CrossEntropy())
    params, inputs, targets = problem()
    assert torch.allclose(compiler(NET)(params, inputs), NET(params, inputs))
    grads, state = gradients(method, params, inputs, targets), method.init(params)
    expected, _ = method.update(grads, state, params)
    updates, _ = compiler(method.update)(grads, state, params)
    assert all(torch.allclose(updates[name], expected[name], atol=1e-12) for name in params)


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "diagonal"}, r"direction='diagonal'; choose one of \('spectral', 'frobenius'\)"),
        ({"sizes": "guessed"}, r"sizes='guessed'; choose one of \('prescribed', 'tracked'\)"),
        ({"constants": "hoped"}, r"constants='hoped'; choose one of \('typical', 'proved'\)"),
        ({"nonfinite": "ignore"}, r"nonfinite='ignore'; choose one of \('raise', 'skip'\)"),
        ({"magnitude": 0.0}, "magnitude=0.0; the inputs' norm bound must be > 0"),
        ({"magnitude": math.nan}, "magnitude=nan"),
        ({"search": Certified(), "sizes": "prescribed"}, "certified search was combined with prescribed sizes"),
        ({"search": Certified(), "constants": "typical"}, "typical constants, which certify nothing"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_the_right_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        agd(SMOOTH, SquareLoss(), **options)


@pytest.mark.parametrize(
    ("net", "loss"), [(torch.nn.Linear(3, 4), SquareLoss()), (SMOOTH, torch.nn.MSELoss()), (SquareLoss(), SMOOTH)]
)
def test_what_is_not_a_network_and_a_loss_is_an_error(net: Any, loss: Any) -> None:
    with pytest.raises(SpaceMismatch, match=rf"got {type(net).__name__} and {type(loss).__name__}"):
        agd(net, loss)


def test_a_network_without_spaces_weights_or_a_single_output_is_an_error() -> None:
    with pytest.raises(UnknownBound, match="no settled spaces"):
        agd(Linear(3, 4) @ Mean(), SquareLoss())
    with pytest.raises(InvalidArgument, match="no weight to train"):
        agd(SMOOTH.with_mass(0), SquareLoss())
    with pytest.raises(InvalidArgument, match="no weight to train"):
        agd(Tanh(), SquareLoss())
    with pytest.raises(UnknownBound, match="tuple"):
        agd(Branches((Linear(3, 4), Linear(3, 4))), SquareLoss())


def test_a_certified_method_for_a_kinked_network_is_an_error() -> None:
    with pytest.raises(UnknownBound, match="ReLU"):
        agd(NET, CrossEntropy(), search=Certified())


def test_parameters_that_are_not_the_networks_are_an_error() -> None:
    method = agd(SMOOTH, SquareLoss())
    params = SMOOTH.init(seeded())
    with pytest.raises(
        InvalidArgument, match=r"parameters \['0\.weight', '2\.weight'\], but was given \['0\.weight'\]"
    ):
        method.init({"0.weight": params["0.weight"]})
    with pytest.raises(InvalidArgument, match=r"'extra'"):
        method.init({**params, "extra": torch.zeros(1)})
    with pytest.raises(InvalidArgument, match=r"'2\.weight' has shape \(5, 3\), but its module declares \(3, 5\)"):
        method.init({**params, "2.weight": params["2.weight"].mT})


def test_a_gradient_that_fits_no_parameter_is_an_error() -> None:
    method = agd(SMOOTH, SquareLoss())
    params = SMOOTH.init(seeded())
    state = method.init(params)
    with pytest.raises(InvalidArgument, match=r"'3\.weight', which is not among the parameters"):
        method.update({"3.weight": torch.zeros(1)}, state, params)
    with pytest.raises(InvalidArgument, match=r"gradient of '0\.weight' has shape \(1,\), the parameter \(5, 4\)"):
        method.update({"0.weight": torch.zeros(1)}, state, params)


def test_methods_are_values() -> None:
    assert agd(SMOOTH, SquareLoss()) == agd(SMOOTH, SquareLoss())
    assert agd(SMOOTH, SquareLoss()) != agd(SMOOTH, SquareLoss(), search=ClosedForm())
    assert agd(SMOOTH, SquareLoss()).search == ExactGrowth()
    with pytest.raises(AttributeError):
        agd(SMOOTH, SquareLoss()).magnitude = 2.0  # pyright: ignore[reportAttributeAccessIssue]
