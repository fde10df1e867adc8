"""What passes through a network beside the data: buffers and randomness, purely, and into ``torch.nn`` and its compiler."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from modula_agd import (
    AGD,
    GPT,
    BatchNorm,
    Bias,
    Conv2d,
    CrossEntropy,
    Dropout,
    Embedding,
    Image,
    InvalidArgument,
    Linear,
    Logits,
    Mean,
    Module,
    ReLU,
    Scale,
    Sequence,
    Shared,
    SpaceMismatch,
    SquareLoss,
    Tanh,
    agd,
)
from support import gaussian, seeded

F64 = {"dtype": torch.float64}
NETWORK = (
    Linear(Logits(3), 4) @ Mean() @ ReLU() @ Bias(Image(4)) @ Scale(Image(4)) @ BatchNorm() @ Conv2d(4, 2, 3, padding=1)
)
X, Y = gaussian(6, 2, 4, 4, dtype=torch.float32), torch.arange(6) % 3


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- run -------------------------------------------------------------------------------------------------------------------


def test_without_statistics_and_randomness_a_run_is_a_call() -> None:
    net = Linear(2, 3) @ Tanh() @ Linear(3, 4)
    params, x = net.init(0), torch.ones(2, 4)
    out, buffers = net.run(params, x)
    assert torch.equal(out, net(params, x))
    assert buffers == {}
    assert net.buffers() == {}


def test_a_run_changes_none_of_its_arguments() -> None:
    params, buffers, x = NETWORK.init(0), NETWORK.buffers(), X.clone()
    before = copy.deepcopy((params, buffers, x))
    _, after = NETWORK.run(params, x, buffers)
    assert equal(params, before[0])
    assert equal(buffers, before[1])
    assert torch.equal(x, before[2])
    assert not equal(after, buffers)
    assert NETWORK.buffers().keys() == after.keys()


def test_statistics_of_other_layers_pass_unchanged() -> None:
    apart = {"elsewhere.running_mean": torch.ones(2)}
    _, after = NETWORK.run(NETWORK.init(0), X, {**NETWORK.buffers(), **apart})
    assert after["elsewhere.running_mean"] is apart["elsewhere.running_mean"]


def test_two_runs_share_nothing() -> None:
    params = NETWORK.init(0)
    assert equal(NETWORK.run(params, X)[1], NETWORK.run(params, X)[1])


@pytest.mark.parametrize("net", [Linear(Sequence(3), Sequence(4)), Embedding(4, 3) + 2 * Embedding(4, 3)], ids=repr)
def test_evaluation_takes_a_single_sample(net: Module) -> None:
    x = torch.ones(5, 4) if net.domain == Sequence(4) else torch.ones(5, dtype=torch.int64)
    assert torch.equal(net(net.init(0), x), net(net.init(0), x[None])[0])


def test_a_batch_of_vectors_is_no_sequence_to_train_on() -> None:
    net = Linear(Logits(3), Sequence(4)) @ Tanh() @ Linear(Sequence(4), Sequence(4))
    params, x = net.init(0), torch.ones(7, 4)
    for use in (net.run, lambda p, x: agd(net, CrossEntropy()).objective(p, x, Y), lambda p, x: net.to_torch(0)(x)):
        with pytest.raises(SpaceMismatch, match=r"7 samples of one position as x\[:, None\].*x\[None\]"):
            use(params, x)
    assert net.run(params, x[:, None])[0].shape == (7, 1, 3)


@pytest.mark.parametrize("x", [X.long(), X[0, 0], X.double(), [1.0], None, (X,)])
def test_wrong_batches_are_refused_in_training_too(x: Any) -> None:
    with pytest.raises(SpaceMismatch):
        NETWORK.run(NETWORK.init(0), x)


@pytest.mark.parametrize("wrong", [None, X, list(NETWORK.init(0).values()), NETWORK.to_torch(0).parameters()])
def test_parameters_are_a_dictionary(wrong: Any) -> None:
    for use in (NETWORK, NETWORK.run):
        with pytest.raises(InvalidArgument, match="in the place of its parameters"):
            use(wrong, X)


def test_a_missing_parameter_is_named() -> None:
    params = NETWORK.init(0)
    del params["2.scale"]
    with pytest.raises(InvalidArgument, match=r"2\.scale"):
        NETWORK.run(params, X)


# -- torch.nn --------------------------------------------------------------------------------------------------------------


def test_the_torch_face_has_parameters_and_buffers_by_name() -> None:
    model = NETWORK.to_torch(0, **F64)
    assert set(model.state_dict()) == set(NETWORK.init(0)) | set(NETWORK.buffers())
    assert [name for name, _ in model.named_buffers()] == ["1.running_mean", "1.running_var"]
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}
    assert equal(dict(model.named_parameters()), NETWORK.init(0, **F64))


def test_training_renews_the_buffers_in_place_and_evaluation_does_not() -> None:
    model = NETWORK.to_torch(0)
    held, start = dict(model.named_buffers()), copy.deepcopy(dict(model.named_buffers()))
    model.eval()
    out = model(X)
    assert equal(dict(model.named_buffers()), start)
    torch.testing.assert_close(out, NETWORK(NETWORK.init(0), X, start))
    model.train()
    out = model(X)
    expected, renewed = NETWORK.run(NETWORK.init(0), X, start)
    torch.testing.assert_close(out, expected)
    assert equal(dict(model.named_buffers()), renewed)
    assert all(model.get_buffer(name) is value for name, value in held.items())


def test_two_passes_before_one_backward_are_as_in_torch() -> None:
    # renewing in place must not spoil what the first pass keeps for its gradient
    model = NETWORK.to_torch(0)
    (model(X).sum() + model(X + 1).sum()).backward()
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters() if value.grad is not None)


def test_state_dicts_load_and_models_copy_and_pickle() -> None:
    model = NETWORK.to_torch(0)
    model(X)
    other = NETWORK.to_torch(1)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.eval()(X), model.eval()(X))
        twin.train()(X)
        model.train()
    assert not equal(dict(copy.deepcopy(model).train().named_buffers()), dict(other.named_buffers()))


def test_functional_call_takes_parameters_and_buffers_from_outside() -> None:
    model, params, start = NETWORK.to_torch(0), NETWORK.init(1), NETWORK.buffers()
    given = {name: value.clone() for name, value in start.items()}
    out = torch.func.functional_call(model, (params, given), (X,))
    expected, renewed = NETWORK.run(params, X, start)
    torch.testing.assert_close(out, expected)
    assert equal(given, renewed)
    assert equal(dict(model.named_buffers()), start)
    model.eval()
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, (p, renewed), (X,)).square().sum())(params)
    assert grads.keys() == params.keys()


def test_a_network_without_weights_has_a_torch_face() -> None:
    model = (ReLU() @ Mean()).bind(Image(2)).to_torch(0)
    assert torch.equal(model(X), X.mean((2, 3)).relu())


def test_the_optimizer_trains_a_model_with_batch_norm_and_dropout() -> None:
    net = Linear(Logits(3), 8) @ Dropout(0.1) @ ReLU() @ BatchNorm() @ Linear(8, 4)
    model = net.to_torch(0)
    model.generator = seeded()
    optimizer, x, values = AGD(model, CrossEntropy(), momentum=0.95), gaussian(12, 4, dtype=torch.float32), []
    y = torch.arange(12) % 3
    for _ in range(30):
        optimizer.zero_grad()
        loss = CrossEntropy()(model(x), y)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-5:]) < 0.95 * sum(values[:5])
    model.eval()
    assert CrossEntropy()(model(x), y) < values[0]


# -- gradients and compilation ---------------------------------------------------------------------------------------------


def test_the_objective_is_the_loss_of_a_training_pass() -> None:
    method, params = agd(NETWORK, CrossEntropy()), NETWORK.init(0)
    assert torch.equal(method.objective(params, X, Y), CrossEntropy()(NETWORK.run(params, X)[0], Y))
    assert torch.equal(method.objective(params, X, Y), CrossEntropy()(NETWORK.to_torch(0).train()(X), Y))


def test_functional_and_recorded_gradients_agree() -> None:
    method, params, x = agd(NETWORK, CrossEntropy()), NETWORK.init(0, **F64), X.double()
    grads = torch.func.grad(method.objective)(params, x, Y)
    model = NETWORK.to_torch(0, **F64)
    CrossEntropy()(model(x), Y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (GPT(7, 8, 2, 1, 5), torch.arange(10).reshape(2, 5) % 7),
        (GPT(7, 8, 2, 1, 5, tied=True, rotary=True, bias=True, affine=True), torch.arange(10).reshape(2, 5) % 7),
        (NETWORK, X),
    ],
    ids=["GPT", "GPT, tied and rotary", "BatchNorm"],
)
def test_networks_compile_whole(net: Module, x: Tensor) -> None:
    params, buffers = net.init(0), net.buffers()
    torch.compiler.reset()
    trained = torch.compile(net.run, backend="eager", fullgraph=True)
    evaluated = torch.compile(net, backend="eager", fullgraph=True)
    out, renewed = trained(params, x, buffers)
    expected, after = net.run(params, x, buffers)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(renewed, after)
    torch.testing.assert_close(evaluated(params, x, renewed), net(params, x, renewed))
    model = net.to_torch(0)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(dict(model.named_buffers()), after)


def test_a_shared_name_of_the_torch_face_is_its_parameter_name() -> None:
    model = (Shared("w", Linear(3, 3)) @ Tanh() @ Shared("w", Linear(3, 3))).to_torch(0)
    assert list(model.state_dict()) == ["w.weight"]
    SquareLoss()(model(torch.ones(2, 3)), torch.zeros(2, 3)).backward()
    assert model.get_parameter("w.weight").grad is not None
