"""What ``torch.optim`` and the tools around it expect of an optimizer, for every dtype, kind of groups and option."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modula_agd import (
    AGD,
    MLP,
    BatchNorm,
    CrossEntropy,
    Fading,
    InvalidArgument,
    Linear,
    Logits,
    Module,
    ReLU,
    SpaceMismatch,
    agd,
)
from modula_agd.holder import FOREIGN
from modula_agd.memory import FORMAT, KEYS
from support import DTYPES, gaussian, same

NET = MLP(Logits(3), 5, 4, 3, bias=True)
STATISTICS = Linear(Logits(3), 5) @ ReLU() @ BatchNorm() @ Linear(5, 4)
LOSS = CrossEntropy()
NAMES = list(NET.weights())

GROUPS: dict[str, Callable[[nn.Module], Any]] = {
    "all": lambda model: None,
    "tensors": lambda model: model.parameters(),
    "named": lambda model: list(model.named_parameters()),
    "two": lambda model: [
        {"params": [model.get_parameter("0.weight")], "lr": 0.5},
        {"params": [(n, p) for n, p in model.named_parameters() if n != "0.weight"]},
    ],
    "some": lambda model: [{"params": ["0.weight", "3.weight"], "lr": torch.tensor(0.25)}],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "full batch": {"momentum": None},
    "no average": {"averaging": False},
    "Frobenius": {"direction": "frobenius"},
    "skip": {"nonfinite": "skip"},
    "decay": {"decay": 0.2},
    "fading": {"decay": Fading()},
    "kept directions": {"refresh": 3},
    "tracked": {"sizes": "tracked"},
    "capturable": {"capturable": True, "refresh": 1},
}
# every option in every dtype, and every kind of groups with the options that see to them
CASES = [(dtype, "two", option) for dtype in DTYPES for option in OPTIONS]
CASES += [(torch.float32, kind, option) for kind in GROUPS if kind != "two" for option in ("default", "capturable")]
each_case = pytest.mark.parametrize(("dtype", "groups", "options"), CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_option = pytest.mark.parametrize("options", OPTIONS)


def backward(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    loss = LOSS(model(gaussian(7, 4, seed=step, dtype=dtype)), (torch.arange(7) + step) % 3)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def made(
    dtype: torch.dtype = torch.float32, groups: str = "all", options: str = "default", seed: int = 0, net: Module = NET
) -> tuple[nn.Module, AGD]:
    model = net.to_torch(seed, dtype=dtype)
    return model, AGD(model, LOSS, GROUPS[groups](model), **OPTIONS[options])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- the matrix ------------------------------------------------------------------------------------------------------------


@each_case
def test_what_is_saved_resumes_bit_for_bit_and_is_tensors_and_plain_numbers(dtype, groups, options) -> None:
    model, optimizer = made(dtype, groups, options)
    train(model, optimizer, range(4))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    plain = (Tensor, int, float, str)
    assert all(isinstance(leaf, plain) for leaf in tree_leaves(saved))
    assert same(saved["optimizer"], optimizer.state_dict())
    other, resumed = made(dtype, groups, options, seed=9)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(copy.deepcopy(saved["optimizer"]))
    # no dtype is changed on the way
    assert same(resumed.state_dict(), saved["optimizer"])
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    assert same(weights(model), weights(other))
    assert same(optimizer.state_dict(), resumed.state_dict())
    if optimizer.averaging:
        assert same(optimizer.averaged_state(), resumed.averaged_state())


@each_case
def test_a_step_lowers_the_loss_moves_what_is_in_a_group_and_nothing_on_a_zero_gradient(dtype, groups, options) -> None:
    model, optimizer = made(dtype, groups, options)
    start, trained = weights(model), optimizer._trained()
    first = float(backward(model, 0).detach())
    optimizer.zero_grad()
    for _ in range(12):
        optimizer.zero_grad(set_to_none=False)
        last = backward(model, 0)
        optimizer.step()
    assert float(last.detach()) < first
    after = weights(model)
    assert {name for name, w in after.items() if not torch.equal(w, start[name])} == trained.keys()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert same(weights(model), after)


@each_option
@pytest.mark.parametrize("groups", ["all", "two"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_of_model_and_optimizer_go_on_alike(groups, options, duplicate) -> None:
    model, optimizer = made(groups=groups, options=options)
    train(model, optimizer, range(3))
    other, twin = duplicate((model, optimizer))
    assert twin._trained()["0.weight"] is other.get_parameter("0.weight")
    train(model, optimizer, range(3, 6))
    train(other, twin, range(3, 6))
    assert same(weights(model), weights(other))
    assert same(optimizer.state_dict(), twin.state_dict())


@each_option
@each_dtype
def test_the_state_of_a_parameter_has_the_same_keys_from_the_first_step_to_the_last(dtype, options) -> None:
    model, optimizer = made(dtype, options=options)
    before = {p: set(optimizer.state[p]) for p in model.parameters()}
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    short = torch.float64 if dtype == torch.float64 else torch.bfloat16
    for name, p in model.named_parameters():
        tensors = {key: value for key, value in optimizer.state[p].items() if key != "begun"}
        serves = optimizer.method.periods(p.device)[name] > 1
        dtypes = dict.fromkeys(KEYS.values(), wide) | {"lead": short, "direction": wide if serves else short}
        assert {key: (value.shape, value.dtype) for key, value in tensors.items()} == {
            key: (p.shape, dtypes[key]) for key in tensors
        }
        assert ("momentum_buffer" in tensors) == ("lead" in tensors) == (optimizer.method.momentum is not None)
        assert ("average" in tensors) == optimizer.averaging
    numbers = set(optimizer.param_groups[0]["agd"])
    train(model, optimizer, range(3))
    assert {p: set(optimizer.state[p]) for p in model.parameters()} == before
    assert set(optimizer.param_groups[0]["agd"]) == numbers


# -- groups ----------------------------------------------------------------------------------------------------------------


def test_the_multiplier_of_a_group_multiplies_the_derived_step_of_its_parameters_alone() -> None:
    start = weights(made()[0])
    (whole, plain), (parts, grouped) = made(), made(groups="two")
    train(whole, plain, range(1))
    train(parts, grouped, range(1))
    assert float(plain.current.t) == float(grouped.current.t)
    for name, w0 in start.items():
        share = 0.5 if name == "0.weight" else 1.0
        torch.testing.assert_close(weights(parts)[name] - w0, share * (weights(whole)[name] - w0))


def test_a_group_of_multiplier_0_stands_still_and_learns_its_direction_all_the_same() -> None:
    model, optimizer = made(groups="two")
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    train(model, optimizer, range(2))
    after = weights(model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["3.weight"], before["3.weight"])
    assert optimizer.state[model.get_parameter("0.weight")]["momentum_buffer"].any()


def test_newly_unfrozen_parameters_join_as_a_group_and_are_averaged_from_then_on() -> None:
    net = MLP(Logits(3), 5, 4, 2)
    model = net.to_torch(0)
    late = model.get_parameter("0.weight").requires_grad_(False)
    optimizer = AGD(model, LOSS, ["2.weight"])
    scheduler = schedulers.StepLR(optimizer, 2, gamma=0.5)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    assert torch.equal(late, net.init(0)["0.weight"])
    assert late not in optimizer.state
    late.requires_grad_(True)
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    assert torch.equal(optimizer.averaged_state()["0.weight"], late)
    train(model, optimizer, range(3, 6))
    assert not torch.equal(late, net.init(0)["0.weight"])
    # about one of the first six steps in the average yet: between where it stood and where it is
    assert float((optimizer.averaged_state()["0.weight"] - net.init(0)["0.weight"]).norm()) > 0
    other = net.to_torch(1)
    again = AGD(other, LOSS, [{"params": ["2.weight"]}, {"params": ["0.weight"]}])
    again.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]
    train(model, optimizer, range(6, 8))
    train(other, again, range(6, 8))
    assert same(weights(model), weights(other))


def test_a_parameter_that_is_unfrozen_without_a_word_begins_as_if_it_were_new() -> None:
    model, optimizer = made()
    late = model.get_parameter("3.weight").requires_grad_(False)
    optimizer = AGD(model, LOSS)
    train(model, optimizer, range(3))
    assert set(optimizer.state[late]) == {"begun"}
    late.requires_grad_(True)
    optimizer.zero_grad()
    backward(model, 3)
    gradient = late.grad
    assert gradient is not None
    optimizer.step()
    torch.testing.assert_close(optimizer.state[late]["momentum_buffer"], 0.05 * gradient)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda m: [], "no parameter"),
        (lambda m: [{"params": []}], "no parameter"),
        (lambda m: [nn.Parameter(torch.zeros(2))], "none of the network's parameters"),
        (lambda m: ["nope"], "'nope', which is none"),
        (lambda m: [("nope", nn.Parameter(torch.zeros(2)))], "'nope', which is none"),
        (lambda m: [{"params": ["0.weight"]}, {"params": [m.get_parameter("0.weight")]}], "in a group already"),
        (lambda m: ["0.weight", "0.weight"], "in a group already"),
        (lambda m: [{"params": set(m.parameters())}], "list"),
        (lambda m: [{"params": 3}], "list"),
        (lambda m: [{"lr": 1.0}], "'params'"),
        (lambda m: [{"params": ["0.weight"], "weight_decay": 0.1}], "decay="),
        (lambda m: [{"params": ["0.weight"], "momentum": 0.9}], "momentum="),
    ],
)
def test_groups_that_cannot_be_are_refused(groups, message: str) -> None:
    model = NET.to_torch(0)
    with pytest.raises(InvalidArgument, match=message):
        AGD(model, LOSS, groups(model))
    optimizer = AGD(model, LOSS, ["1.bias"])
    for group in ({"params": ["1.bias"]}, {"params": []}, {"params": nn.Parameter(torch.zeros(5))}, ["3.weight"]):
        with pytest.raises(InvalidArgument):
            optimizer.add_param_group(group)  # type: ignore[arg-type]
    assert [group["param_names"] for group in optimizer.param_groups] == [["1.bias"]]


def test_options_that_are_off_pass_and_a_group_may_carry_notes_of_its_own() -> None:
    model = NET.to_torch(0)
    groups = [{"params": model.parameters(), "weight_decay": 0.0, "maximize": False, "foreach": None, "note": "mine"}]
    optimizer = AGD(model, LOSS, groups)
    train(model, optimizer, range(2))
    assert optimizer.state_dict()["param_groups"][0]["note"] == "mine"
    assert "Parameter Group 0" in repr(optimizer)
    assert "lr: 1.0" in repr(optimizer)


@pytest.mark.parametrize("name", [*FOREIGN, "lr", "rate"])
def test_an_option_of_another_optimizer_is_refused_with_the_remedy(name: str) -> None:
    if name in ("momentum", "capturable"):
        assert AGD(NET.to_torch(0), LOSS, **{name: False if name == "capturable" else 0.5})
    else:
        with pytest.raises(InvalidArgument, match=name):
            AGD(NET.to_torch(0), LOSS, **{name: 0.5})
        with pytest.raises(InvalidArgument, match=name):
            AGD(NET.to_torch(0), agd(NET, LOSS), **{name: 0.5})
    for flag in ("averaging", "capturable"):
        with pytest.raises(InvalidArgument, match=flag):
            AGD(NET.to_torch(0), LOSS, **{flag: "yes"})


# -- state -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved_in", "loaded_in"), [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_loading_into_another_dtype_keeps_what_was_saved_and_training_goes_on(saved_in, loaded_in) -> None:
    model, optimizer = made(saved_in)
    train(model, optimizer, range(3))
    other, resumed = made(loaded_in)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert same(resumed.state_dict(), optimizer.state_dict())
    train(other, resumed, range(3, 6))
    assert int(resumed.current.steps) == 6
    wide = torch.float32 if loaded_in == torch.bfloat16 else loaded_in
    assert {m.dtype for m in resumed.current.momentum.values()} == {wide}


def test_what_was_loaded_is_a_copy_and_running_statistics_are_in_it() -> None:
    model, optimizer = made(net=STATISTICS)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other, resumed = made(net=STATISTICS, seed=1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    train(other, resumed, range(3, 6))
    assert same(saved, kept)
    buffers = kept["param_groups"][0]["agd"]["buffers"]
    assert buffers.keys() == dict(model.named_buffers()).keys() != set()
    assert all(value.any() for value in buffers.values())


def test_the_state_follows_the_model_to_another_dtype_and_back() -> None:
    model, optimizer = made()
    train(model, optimizer, range(2))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        train(model, optimizer, range(2, 4))
        assert all(weight.dtype == dtype and weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("tell", [{"format": FORMAT + 1}, {"format": "new"}])
def test_a_newer_state_says_so(tell) -> None:
    _, optimizer = made()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["agd"] |= tell
    with pytest.raises(InvalidArgument, match="newer version"):
        optimizer.load_state_dict(saved)


def test_an_older_state_says_so() -> None:
    _, optimizer = made()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["agd"]["format"] = FORMAT - 1
    with pytest.raises(InvalidArgument, match=r"older version.*Load the weights"):
        optimizer.load_state_dict(saved)


def test_states_of_other_optimizers_and_of_before_are_refused() -> None:
    model, optimizer = made()
    old = {"state": {}, "param_groups": [{"lr": 1.0, "params": [0]}], "agd": {}, "average": {}, "parameters": {}}
    for kind in (torch.optim.Adam, torch.optim.SGD):
        foreign = kind(model.parameters(), lr=0.1)
        train(model, foreign, range(1))
        with pytest.raises(InvalidArgument, match="no state of AGD"):
            optimizer.load_state_dict(foreign.state_dict())
    for other in (old, None, [], {}):
        with pytest.raises(InvalidArgument, match="no state of AGD"):
            optimizer.load_state_dict(other)  # type: ignore[arg-type]


# -- hooks, closures, schedulers -------------------------------------------------------------------------------------------


def test_hooks_are_called_in_order_and_may_change_what_passes() -> None:
    model, optimizer = made()
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before step"))
    optimizer.register_step_post_hook(lambda *_: called.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda _: called.append("before save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    assert called == ["before step", "after step"] * 2 + ["before save"]
    assert saved["mine"] == 1

    _, resumed = made()
    renamed = {"states": saved["state"], "param_groups": saved["param_groups"]}
    resumed.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": state["states"]})
    resumed.register_load_state_dict_post_hook(lambda o: called.append(f"loaded {int(o.current.steps)}"))
    resumed.load_state_dict(renamed)
    assert called[-1] == "loaded 2"
    assert same(resumed.current, optimizer.current)


@pytest.mark.parametrize("groups", ["all", "two"])
def test_a_closure_is_called_once_with_gradients_on(groups: str) -> None:
    (model, optimizer), (other, plain) = made(groups=groups), made(groups=groups)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        calls.append(backward(model, len(calls)))
        return calls[-1]

    for step in range(3):
        assert optimizer.step(closure) is calls[-1]
        train(other, plain, range(step, step + 1))
    assert len(calls) == 3
    assert same(weights(model), weights(other))
    assert {"predicted", "realised"} <= optimizer.scalars().keys()


def _sequential(optimizer: AGD) -> schedulers.LRScheduler:
    warmup = schedulers.LinearLR(optimizer, 0.1, total_iters=3)
    return schedulers.SequentialLR(optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, 5)], [3])


SCHEDULERS: dict[str, Callable[[AGD], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1.0, 7, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": _sequential,
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.ConstantLR(o, 0.5, 3)]
    ),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_acts_on_the_multiplier(name: str, tensor: bool) -> None:
    model, optimizer = made()
    if tensor:
        optimizer.param_groups[0]["lr"] = torch.tensor(1.0, dtype=torch.float64)
    scheduler = SCHEDULERS[name](optimizer)
    other, by_hand = made()
    seen = []
    for step in range(6):
        rate = optimizer.param_groups[0]["lr"]
        assert isinstance(rate, Tensor) == tensor
        seen.append(float(rate))
        by_hand.param_groups[0]["lr"] = float(rate)
        train(model, optimizer, range(step, step + 1))
        train(other, by_hand, range(step, step + 1))
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    assert len(set(seen)) > 1
    assert max(seen) <= 1 + 1e-9
    assert same(weights(model), weights(other))


def test_a_scheduler_resumes_with_the_optimizer() -> None:
    model, optimizer = made(groups="two")
    scheduler = schedulers.ExponentialLR(optimizer, 0.8)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    saved = through_a_file([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    other, resumed = made(groups="two")
    again = schedulers.ExponentialLR(resumed, 0.8)
    for target, state in zip((other, resumed, again), saved, strict=True):
        target.load_state_dict(state)
    for step in range(3, 6):
        for m, o, s in ((model, optimizer, scheduler), (other, resumed, again)):
            train(m, o, range(step, step + 1))
            s.step()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in resumed.param_groups]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.8**6)
    assert same(weights(model), weights(other))


# -- mixed precision -------------------------------------------------------------------------------------------------------


def test_a_grad_scaler_leaves_out_the_step_of_an_infinite_gradient_and_changes_no_other() -> None:
    (model, optimizer), (other, plain) = made(), made()
    # a power of two scales without rounding
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        optimizer.zero_grad()
        loss = LOSS(model(gaussian(7, 4, seed=step, dtype=torch.float32)), (torch.arange(7) + step) % 3)
        scaler.scale(loss).backward()
        if step == 2:
            gradient = model.get_parameter("0.weight").grad
            assert gradient is not None
            gradient[0, 0] = torch.inf
            before = weights(model), copy.deepcopy(optimizer.state_dict())
        if step % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert same((weights(model), optimizer.state_dict()), before)
            assert scaler.get_scale() == 2.0**9
        else:
            train(other, plain, range(step, step + 1))
    assert int(optimizer.current.steps) == 4
    assert same(weights(model), weights(other))


@each_dtype
def test_autocast_trains(dtype) -> None:
    model, optimizer = made(dtype)
    x = gaussian(32, 4, dtype=dtype)
    y, values = x[:, :3].argmax(1), []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x)
            loss = LOSS(outputs, y)
        assert outputs.dtype in (torch.bfloat16, dtype)
        loss.backward()
        optimizer.step(value=loss)
        values.append(float(loss.detach()))
    assert values[-1] < 0.9 * values[0]


# -- graphs ----------------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """What a device graph does, on a CPU: records every operation with its operands, and replays them where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func is not torch.ops.aten._local_scalar_dense.default or args[0].dtype == torch.int64, (
            "the host asked for a value of the step"
        )
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            fresh = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize(
    "options", [{}, {"decay": 0.1}, {"decay": Fading()}, {"direction": "frobenius"}, {"momentum": None}], ids=str
)
def test_a_captured_step_can_be_replayed(options: dict[str, Any]) -> None:
    options = {"nonfinite": "skip", "refresh": 1, **options}
    model, other = NET.to_torch(0), NET.to_torch(0)
    captured = AGD(model, LOSS, capturable=True, averaging=True, **options)
    plain = AGD(other, LOSS, averaging=True, **options)
    captured.param_groups[0]["lr"] = torch.tensor(1.0)

    def gradients(step: int) -> None:
        other.zero_grad()
        backward(other, step)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert theirs.grad is not None
            mine.grad = theirs.grad.clone() if mine.grad is None else mine.grad.copy_(theirs.grad)

    for step in range(2):
        gradients(step)
        captured.step()
        plain.step()
    places = [leaf.data_ptr() for leaf in tree_leaves(captured.state_dict()) if isinstance(leaf, Tensor)]
    gradients(2)
    recorder = Recorder()
    with recorder:
        captured.step()
    plain.step()
    for step in range(3, 7):
        gradients(step)
        with torch.no_grad():
            captured.param_groups[0]["lr"].fill_(0.5**step)
            recorder.replay()
        plain.param_groups[0]["lr"] = 0.5**step
        plain.step()
    saved = captured.state_dict()
    assert [leaf.data_ptr() for leaf in tree_leaves(saved) if isinstance(leaf, Tensor)] == places
    assert int(captured.current.steps) == 7 == int(captured.current.clock)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    average = captured.averaged_state()
    for name, value in plain.averaged_state().items():
        torch.testing.assert_close(average[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [float("nan"), -1.0, float("inf")])
def test_a_multiplier_that_only_the_device_sees_and_that_is_none_moves_nothing(rate: float) -> None:
    model, optimizer = made(options="capturable")
    optimizer.param_groups[0]["lr"] = torch.tensor(rate)
    before = weights(model)
    train(model, optimizer, range(2))
    assert same(weights(model), before)
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    train(model, optimizer, range(2, 3))
    assert not same(weights(model), before)


def test_directions_that_serve_several_steps_cannot_be_captured() -> None:
    with pytest.raises(InvalidArgument, match="refresh=1"):
        AGD(NET.to_torch(0), LOSS, capturable=True, refresh=2)
    assert AGD(NET.to_torch(0), LOSS, capturable=True, refresh=2, momentum=None)


@pytest.fixture
def graphs() -> Iterator[list[int]]:
    """The number of operations in each graph that is compiled."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def counting(graphs: list[int]) -> Callable:
    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    return backend


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"nonfinite": "skip"}, {"decay": 0.1, "direction": "frobenius"}], ids=str
)
def test_a_compiled_update_is_compiled_once_for_each_kind_of_state(options: dict[str, Any], graphs) -> None:
    # one short side of 128 has a kept direction in plain code
    net = Linear(Logits(130), 128) @ ReLU() @ Linear(128, 4)
    method = agd(net, LOSS, **options)
    update = torch.compile(method.update, backend=counting(graphs), fullgraph=True)
    params = net.init(0)
    state, counts = method.init(params), []
    for step in range(6):
        x, y = gaussian(7, 4, seed=step, dtype=torch.float32), torch.arange(7)
        grads = torch.func.grad(method.objective)(params, x, y)
        updates, state = update(grads, state, params)
        params = {name: weight + updates[name] for name, weight in params.items()}
        counts.append(len(graphs))
    # with momentum the first state differs from all that follow: nothing has been measured
    kinds = 1 if method.momentum is None else 2
    assert counts == [1, kinds, kinds, kinds, kinds, kinds]


@pytest.mark.parametrize(
    "options",
    ["default", "capturable", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full batch", "skip"))],
)
def test_a_compiled_step_agrees_and_is_not_compiled_again(options: str, graphs) -> None:
    net = MLP(Logits(3), 5, 4, 2)
    (model, optimizer), (other, plain) = (made(options=options, net=net) for _ in range(2))
    for o in (optimizer, plain):
        o.param_groups[0]["lr"] = torch.tensor(1.0)
    step = torch.compile(optimizer.step, backend=counting(graphs), fullgraph=True)
    counts = []
    for index in range(6):
        for rate in (optimizer.param_groups[0]["lr"], plain.param_groups[0]["lr"]):
            rate.fill_(1 / (1 + index))
        optimizer.zero_grad()
        backward(model, index)
        step()
        train(other, plain, range(index, index + 1))
        counts.append(len(graphs))
    # one graph, and another once everything has begun
    assert counts == [1, 2, 2, 2, 2, 2]
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# -- models around a network -----------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As frameworks have it: the network in an attribute, and what it does not know beside it."""

    def __init__(self, model: nn.Module, frozen: bool = True) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"net": model})
        self.head = nn.Linear(3, 3).requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner["net"](x))


@pytest.mark.parametrize("wrap", [nn.Sequential, Wrapper, lambda m: torch.compile(m, backend="eager")])
def test_a_network_is_found_inside_of_a_model(wrap) -> None:
    model, other = NET.to_torch(0), NET.to_torch(0)
    outer = wrap(model)
    optimizer, plain = AGD(outer, LOSS), AGD(other, LOSS)
    assert [group["param_names"] for group in optimizer.param_groups] == [NAMES]
    train(outer, optimizer, range(2))
    assert not same(weights(model), NET.init(0))
    if not isinstance(outer, Wrapper):
        train(other, plain, range(2))
        assert same(weights(model), weights(other))
    # groups may be named as the wrapper names them
    again = AGD(outer, LOSS, [{"params": [(n, p) for n, p in outer.named_parameters() if p.requires_grad]}])
    assert again.param_groups[0]["param_names"] == NAMES
    again.load_state_dict(optimizer.state_dict())


def test_a_gradient_that_the_network_does_not_know_is_refused_and_an_unused_parameter_is_not() -> None:
    outer = Wrapper(NET.to_torch(0), frozen=False)
    optimizer = AGD(outer, LOSS)
    before = weights(outer)
    backward(outer.inner["net"], 0)
    optimizer.step()
    assert torch.equal(outer.head.weight, before["head.weight"])
    before = weights(outer)
    backward(outer, 1)
    with pytest.raises(InvalidArgument, match=r"gradients of head\.weight, head\.bias"):
        optimizer.step()
    assert same(weights(outer), before)
    # whoever trains it elsewhere passes the part
    AGD(outer.inner["net"], LOSS).step()


def test_of_several_networks_one_must_be_named() -> None:
    two = nn.ModuleDict({"a": NET.to_torch(0), "b": STATISTICS.to_torch(0)})
    with pytest.raises(InvalidArgument, match="several networks: a, b"):
        AGD(two, LOSS)
    assert AGD(two["b"], LOSS)._inner is two["b"]
    assert AGD(two, agd(STATISTICS, LOSS))._inner is two["b"]


def test_with_a_method_any_module_will_do_whose_parameters_have_its_names() -> None:
    net = Linear(Logits(3), 5) @ ReLU() @ Linear(5, 4)
    face = net.to_torch(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    model.load_state_dict(face.state_dict())
    with pytest.raises(SpaceMismatch, match="declare no bounds"):
        AGD(model, LOSS)
    with pytest.raises(SpaceMismatch, match=r"parameters 0\.weight"):
        AGD(nn.Linear(3, 3), agd(net, LOSS))
    with pytest.raises(InvalidArgument, match="shape"):
        AGD(nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)), agd(net, LOSS))
    outer = nn.ModuleDict({"deep": model})
    optimizer, plain = AGD(outer, agd(net, LOSS)), AGD(face, LOSS)
    train(model, optimizer, range(3))
    train(face, plain, range(3))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, face.get_parameter(name))


# -- checkpoints of torch.distributed --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("case", ["plain", "statistics", "frozen first", "full batch", "kept directions", "wrapped"])
def test_a_distributed_checkpoint_resumes_bit_for_bit(case: str, flatten: bool, tmp_path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    def build(seed: int) -> tuple[nn.Module, AGD]:
        options = case if case in OPTIONS else "default"
        model, optimizer = made(options=options, seed=seed, net=STATISTICS if case == "statistics" else NET)
        if case == "frozen first":
            model.get_parameter("0.weight").requires_grad_(False)
            optimizer = AGD(model, LOSS)
        if case == "wrapped":
            model = nn.Sequential(model)
            optimizer = AGD(model, LOSS)
        return model, optimizer

    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = build(0)
    train(model, optimizer, range(4))
    states = get_state_dict(model, optimizer, options=how)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=tmp_path, no_dist=True)

    other, resumed = build(1)
    # a fresh optimizer tells where to read to
    template = get_state_dict(other, resumed, options=how)
    assert int(resumed.current.steps) == 0
    target = {"model": template[0], "optimizer": template[1]}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=target["model"], optim_state_dict=target["optimizer"], options=how)
    assert same(resumed.current, optimizer.current)
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    assert same(weights(model), weights(other))
    if optimizer.averaging:
        assert same(optimizer.averaged_state(), resumed.averaged_state())


@pytest.mark.parametrize("accumulate", [False, True])
def test_maximising_the_negative_is_minimising(accumulate: bool) -> None:
    weights = []
    for sign in (1, -1):
        model = MLP(Logits(3), 16, 8, 2).to_torch(0)
        optimizer = AGD(model, CrossEntropy(), maximize=sign < 0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for _ in range(2 if accumulate else 1):
                x = torch.randn(16, 8, generator=generator)
                value = sign * CrossEntropy()(model(x), x[:, :3].argmax(1))
                value.backward()
                if accumulate:
                    optimizer.accumulate()
            optimizer.step(value=value.detach())
            optimizer.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
        weights[-1].append(torch.tensor(optimizer.scalars()["realised"]))
    for first, second in zip(*weights, strict=True):
        assert torch.equal(first, second)
