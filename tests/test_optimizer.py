"""The ``torch.optim`` face does what the functional method does, and behaves as optimizers behave; so does the ``nn`` face."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from modula_agd import (
    AGD,
    GELU,
    MLP,
    Abs,
    Certified,
    ClosedForm,
    CrossEntropy,
    InvalidArgument,
    LeakyReLU,
    Linear,
    Logits,
    Module,
    NonFiniteGradient,
    Sigmoid,
    SiLU,
    SpaceMismatch,
    SquareLoss,
    Tanh,
    agd,
)
from modula_agd.averaging import averaged
from modula_agd.torch_module import TorchModule
from support import gaussian, same

NET = MLP(Logits(3), 5, 4, 3, bias=True)
LOSS = CrossEntropy()
INPUTS, TARGETS = gaussian(7, 4), torch.arange(7) % 3


def model_of(net: Module = NET, seed: int = 0) -> TorchModule:
    return net.to_torch(seed, dtype=torch.float64)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(INPUTS), TARGETS).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def equal(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


# -- the same steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"sizes": "tracked"}, {"search": ClosedForm(), "direction": "frobenius"}, {"nonfinite": "skip"}]
)
def test_thirty_steps_equal_those_of_the_functional_method(options: dict[str, Any]) -> None:
    model = model_of()
    optimizer = AGD(model, LOSS, **options)
    method = agd(NET, LOSS, **options)
    params = weights(model)
    state, average = method.init(params), None
    for step in range(30):
        train(model, optimizer, 1)
        leaves = {name: weight.requires_grad_() for name, weight in params.items()}
        grads = torch.autograd.grad(method.objective(leaves, INPUTS, TARGETS), list(leaves.values()))
        updates, state = method.update(dict(zip(leaves, grads, strict=True)), state, leaves, average=average)
        params = {name: weight.detach() + updates[name] for name, weight in leaves.items()}
        average = averaged(average, params, step + 1)
    # written over in place, a product and a sum are rounded once instead of twice
    for mine, theirs in zip(
        tree_leaves((weights(model), optimizer.current)), tree_leaves((params, state)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_ready_method_is_taken_as_it_is() -> None:
    first, second = model_of(), model_of()
    train(first, AGD(first, agd(NET, LOSS, search=ClosedForm())), 3)
    train(second, AGD(second, LOSS, search=ClosedForm()), 3)
    assert equal(weights(first), weights(second))


def test_a_closure_gives_the_gradient_and_its_value_is_returned() -> None:
    first, second = model_of(), model_of()
    optimizer = AGD(first, LOSS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = LOSS(first(INPUTS), TARGETS)
        value.backward()
        return value

    value = optimizer.step(closure)
    assert value.item() == LOSS(second(INPUTS), TARGETS).item()
    train(second, AGD(second, LOSS), 1)
    assert equal(weights(first), weights(second))
    assert AGD(second, LOSS).step() is None


def test_a_certified_step_takes_its_evidence() -> None:
    net, targets = Linear(3, 5) @ Tanh() @ Linear(5, 4), gaussian(7, 3)
    model = model_of(net)
    optimizer = AGD(model, SquareLoss(), search=Certified())
    SquareLoss()(model(INPUTS), targets).backward()
    with pytest.raises(InvalidArgument, match="without evidence"):
        optimizer.step()
    optimizer.step(evidence=optimizer.method.evidence(dict(model.named_parameters()), INPUTS, targets))
    assert optimizer.current.t > 0


# -- as optimizers behave --------------------------------------------------------------------------------------------------


def test_lr_is_1_and_multiplies_the_update() -> None:
    start, whole, half = model_of(), model_of(), model_of()
    optimizer = AGD(half, LOSS)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0]
    optimizer.param_groups[0]["lr"] = 0.5
    train(half, optimizer, 1)
    train(whole, AGD(whole, LOSS), 1)
    for (name, w0), w1, w2 in zip(weights(start).items(), whole.parameters(), half.parameters(), strict=True):
        assert torch.allclose(w2 - w0, (w1 - w0) / 2), name
        assert not torch.equal(w1, w0)


def test_a_scheduler_acts_on_the_multiplier() -> None:
    model, other = model_of(), model_of()
    optimizer = AGD(model, LOSS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    by_hand = AGD(other, LOSS)
    for epoch in range(3):
        train(model, optimizer, 1)
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.5**epoch
        train(other, by_hand, 1)
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert equal(weights(model), weights(other))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_after_zero_grad_a_step_moves_nothing(set_to_none: bool) -> None:
    model = model_of()
    optimizer = AGD(model, LOSS)
    LOSS(model(INPUTS), TARGETS).backward()
    before = weights(model)
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    assert equal(weights(model), before)
    assert optimizer.current.t == 0
    # a first gradient of zeros is a momentum of zeros, which the next one fills
    train(model, optimizer, 2)
    assert not equal(weights(model), before)


def test_a_parameter_that_takes_no_gradient_stays() -> None:
    model = model_of()
    model.get_parameter("3.weight").requires_grad_(False)
    before = weights(model)
    train(model, AGD(model, LOSS), 2)
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == set(before) - {"3.weight"}


def test_a_nonfinite_gradient_raises_with_every_weight_untouched() -> None:
    model = model_of()
    optimizer = AGD(model, LOSS)
    train(model, optimizer, 1)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    LOSS(model(INPUTS), TARGETS).backward()
    gradient = model.get_parameter("6.weight").grad
    assert gradient is not None
    gradient[0, 0] = math.nan
    with pytest.raises(NonFiniteGradient, match=r"'6\.weight'"):
        optimizer.step()
    assert equal(weights(model), before)
    assert same(optimizer.state_dict(), state)


def test_no_state_of_a_weights_size_is_kept() -> None:
    model = model_of(MLP(Logits(3), 60, 4, 3))
    optimizer = AGD(model, LOSS, momentum=None)
    train(model, optimizer, 2)
    sizes = [value.numel() for value in tree_leaves(optimizer.state_dict()) if isinstance(value, Tensor)]
    assert max(sizes) <= 3


@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_state_dict_round_trip_continues_bit_for_bit(through_a_file: bool) -> None:
    model, other = model_of(), model_of(seed=9)
    optimizer, resumed = AGD(model, LOSS), AGD(other, LOSS)
    optimizer.param_groups[0]["lr"] = 0.75
    train(model, optimizer, 5)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if through_a_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.75
    assert resumed.current.steps == 5
    assert all(
        torch.equal(x, y) for x, y in zip(tree_leaves(resumed.current), tree_leaves(optimizer.current), strict=True)
    )
    train(model, optimizer, 5)
    train(other, resumed, 5)
    assert equal(weights(model), weights(other))
    assert resumed.current.steps == 10


def test_a_foreign_state_is_an_error_and_changes_nothing() -> None:
    model = model_of()
    optimizer = AGD(model, LOSS)
    train(model, optimizer, 1)
    adam = torch.optim.Adam(model.parameters())
    small = AGD(model_of(MLP(Logits(3), 5, 4, 2)), LOSS)
    state = copy.deepcopy(optimizer.state_dict())
    for foreign in (adam.state_dict(), small.state_dict(), {}):
        with pytest.raises(InvalidArgument, match="Load the state that AGD saved for the same network"):
            optimizer.load_state_dict(foreign)
        assert same(optimizer.state_dict(), state)


@pytest.mark.parametrize("model", [nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3))])
def test_a_model_without_declared_bounds_is_an_error(model: nn.Module) -> None:
    with pytest.raises(SpaceMismatch, match=rf"given a {type(model).__name__}, whose layers declare no bounds"):
        AGD(model, LOSS)


def test_options_beside_a_ready_method_are_an_error() -> None:
    with pytest.raises(InvalidArgument, match=r"\['direction', 'sizes'\]. Pass them to agd\(\)"):
        AGD(model_of(), agd(NET, LOSS), sizes="tracked", direction="frobenius")


def test_a_method_of_another_network_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="built for a network with parameters"):
        AGD(model_of(), agd(MLP(Logits(3), 5, 4, 2), LOSS))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_model_and_optimizer_together_continues_alike(duplicate: Any) -> None:
    model = model_of()
    optimizer = AGD(model, LOSS)
    train(model, optimizer, 3)
    other_model, other = duplicate((model, optimizer))
    train(model, optimizer, 3)
    train(other_model, other, 3)
    assert other.current.steps == 6
    assert equal(weights(model), weights(other_model))


# -- the nn face -----------------------------------------------------------------------------------------------------------


def test_the_torch_face_computes_the_network_and_owns_its_weights() -> None:
    params = NET.init(0, dtype=torch.float64)
    model = TorchModule(NET, params)
    assert list(model.state_dict()) == list(params)
    assert torch.equal(model(INPUTS), NET(params, INPUTS))
    with torch.no_grad():
        params["0.weight"].zero_()
    assert model.get_parameter("0.weight").any()
    assert all(isinstance(weight, nn.Parameter) and weight.requires_grad for weight in model.parameters())
    assert "Linear(Logits(3), 5)" in repr(model)


def test_the_torch_face_converts_like_any_module() -> None:
    model = model_of().float()
    assert model(INPUTS.float()).dtype == torch.float32
    assert model_of(Linear(3, 4)).get_parameter("weight").shape == (3, 4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize(
    "net", [NET, Linear(3, 5) @ (GELU() @ SiLU() @ Abs() @ LeakyReLU(0.2)) @ Sigmoid() @ Tanh() @ Linear(5, 4)]
)
def test_a_torch_face_can_be_copied_and_pickled(net: Module, duplicate: Any) -> None:
    model = model_of(net)
    other = duplicate(model)
    assert other.network == net
    assert torch.equal(other(INPUTS), model(INPUTS))
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert next(model.parameters()).any()
