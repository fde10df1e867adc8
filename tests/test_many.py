"""Many tensors at once: as one by one, but in few operations; and how few a whole step is."""

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from modula_agd import AGD, CrossEntropy, Linear, Logits, ReLU, agd
from modula_agd.directed import Directed
from modula_agd.many import cast, copy_, is_finite, scaled, unless, unless_
from modula_agd.norm import Direction
from support import gaussian
from wrong_layers import Overshooting, RowwiseLinear

VIEWS = {"detach", "view", "_unsafe_view", "t", "transpose", "expand", "select", "slice", "unbind", "split", "alias"}
VIEWS |= {"unsqueeze", "squeeze", "permute", "empty", "empty_like", "as_strided", "split_with_sizes", "diagonal"}


class Counted(TorchDispatchMode):
    """Counts operations that are more than another look at the same memory."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def some(*dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    return {f"{dtype}"[6:]: gaussian(3, 4, seed=index).to(dtype) for index, dtype in enumerate(dtypes)}


def test_finite_is_what_torch_says() -> None:
    x = torch.tensor([0.0, -0.0, 1e308, -1e308, 5e-324, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    assert torch.equal(is_finite(x), x.isfinite())
    assert torch.equal(is_finite(x.bfloat16()), x.bfloat16().isfinite())


def test_a_cast_keeps_the_order_and_what_is_of_its_dtype_already() -> None:
    tensors = some(torch.float32, torch.bfloat16, torch.float64)
    found = cast(tensors, dict.fromkeys(tensors, torch.float32))
    assert list(found) == list(tensors)
    assert found["float32"] is tensors["float32"]
    assert all(torch.equal(x, tensors[name].float()) for name, x in found.items())


def test_casts_and_multiples_run_under_vmap() -> None:
    x = gaussian(5, 3).float()
    half = torch.vmap(lambda row: cast({"a": row}, {"a": torch.bfloat16})["a"])(x)
    assert torch.equal(half, x.bfloat16())
    assert torch.equal(torch.vmap(lambda row: scaled([row], [0.5])[0])(x), x / 2)


def test_values_are_written_over_places_of_any_dtype() -> None:
    places = some(torch.float32, torch.bfloat16, torch.float64)
    values = {name: gaussian(3, 4, seed=7) for name in places}
    kept = dict(places)
    copy_(places, values)
    for name, x in places.items():
        assert x is kept[name]
        assert torch.equal(x, values[name].to(x.dtype))


@pytest.mark.parametrize("finite", [True, False])
def test_what_is_left_out_is_so_in_place_too(finite: bool) -> None:
    flag = torch.tensor(finite)
    old = some(torch.float32, torch.bfloat16, torch.float64)
    new = {name: gaussian(3, 4, seed=5).to(x.dtype) for name, x in old.items()} | {"first": gaussian(2)}
    # of another dtype than before, which nothing is written over
    new["float64"] = new["float64"].float()
    wanted = unless(flag, {name: x.clone() for name, x in old.items()}, {name: x.clone() for name, x in new.items()})
    found = unless_(flag, old, new)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in wanted.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert found["float32"] is old["float32"]
    assert found["bfloat16"] is old["bfloat16"]


def test_what_stays_as_it_is_is_not_touched() -> None:
    old = some(torch.float32)
    before = old["float32"].clone()
    assert unless_(torch.tensor(False), old, dict(old))["float32"] is old["float32"]
    assert torch.equal(old["float32"], before)
    new = some(torch.bfloat16)
    assert unless_(None, {}, new) == new


def test_what_may_be_nan_is_written_over_nothing() -> None:
    old, new = some(torch.float32), {"float32": torch.full((3, 4), torch.nan)}
    before = old["float32"].clone()
    found = unless_(torch.tensor(False), old, new, {"float32"})
    assert torch.equal(found["float32"], before)
    assert torch.equal(old["float32"], before)


def naive(norm: Overshooting, gradient: torch.Tensor) -> Direction:
    """A direction as one would write it: of short gradients the squares underflow, and 0/0 is NaN."""
    return Direction(gradient / gradient.square().sum().sqrt(), 1 / norm.factor(gradient.shape))


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"nonfinite": "skip"}], ids=str)
def test_a_norm_of_ones_own_that_gives_nan_moves_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Directed, "_masked", lambda *_: True)
    monkeypatch.setattr(Overshooting, "direction", naive)
    monkeypatch.setattr(RowwiseLinear, "norm", property(lambda _: Overshooting()))
    model = (Linear(Logits(5), 6) @ ReLU() @ RowwiseLinear(6, 4)).to_torch(0)
    optimizer = AGD(model, CrossEntropy(), refresh=1, **options)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    for length in (1e-25, 1e-25, 1e-25):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = gaussian(*parameter.shape, seed=index).float() * length
        optimizer.step()
    assert int(optimizer.current.skipped) == 3
    assert all(torch.equal(*both) for both in zip(model.parameters(), kept, strict=True))
    assert all(direction.isfinite().all() for direction in optimizer.current.directions.values())


def test_an_update_is_differentiated_as_the_pure_function_that_it_is() -> None:
    net = Linear(Logits(5), 6) @ ReLU() @ Linear(6, 4)
    method, params = agd(net, CrossEntropy(), refresh=1), net.init(0)
    grads = [{name: gaussian(*x.shape, seed=seed).float() for name, x in params.items()} for seed in range(2)]
    _, state = method.update(grads[0], method.init(params), params)
    lead = {name: x.float().requires_grad_() for name, x in state.lead.items()}
    updates, _ = method.update(grads[1], state._replace(lead=lead), params)
    found = torch.autograd.grad(sum(x.sum() for x in updates.values()), list(lead.values()))
    assert all(x.isfinite().all() and x.any() for x in found)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(x.detach(), torch.ones_like(x)) for name, x in lead.items()}
        updates, _ = method.update(grads[1], state._replace(lead=dual), params)
        tangents = [forward_ad.unpack_dual(x).tangent for x in updates.values()]
    along = sum(x.sum() for x in found)
    assert sum(x.sum() for x in tangents).item() == pytest.approx(along.item(), rel=1e-2)


def operations(depth: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Of one step of ``depth`` layers of one shape, decided as on an accelerator: nothing is looked at."""
    monkeypatch.setattr(Directed, "_masked", lambda *_: True)
    net = Linear(Logits(5), 16) @ (ReLU() @ Linear(16, 16)) ** depth
    model = net.to_torch(0)
    optimizer = AGD(model, CrossEntropy(), refresh=1, **options)
    for step in range(3):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = gaussian(*parameter.shape, seed=100 * step + index).float()
        with Counted() as counted:
            optimizer.step()
    return counted.count


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_a_further_weight_costs_few_operations(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (operations(depth, monkeypatch, **options) for depth in (2, 10))
    # three products with the gradient, for two of which something is cast or subtracted; the gradient that is kept unless it is
    # NaN; the update itself
    assert many - few == 8 * 7
    assert few < 650
