"""How changes pass through what was captured: views, writes, branches, states, and functions of every shape."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modula_agd import InvalidArgument, Spectral, from_torch
from modula_agd.norm import Transposed


class Lines(nn.Module):
    """A forward given as a function of the module and the input."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.lines = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.lines(self, *inputs)


def depth(forward: Callable[..., Any], *inputs: Tensor, **parts: nn.Module) -> float:
    for part in parts.values():
        for p in part.parameters():
            nn.init.orthogonal_(p) if p.ndim == 2 else nn.init.zeros_(p)
    return float(from_torch(Lines(forward, **parts), inputs, scores=False).bound().depth)


def square(bias: bool = False) -> nn.Linear:
    return nn.Linear(8, 8, bias=bias)


def halves() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": square(), "b": nn.Linear(8, 4, bias=False), "c": nn.Linear(8, 4, bias=False)}


def written(s: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], 8)
    h[:, :4] = s.b(x)
    h[:, 4:] += s.c(x)
    return s.a(h)


def test_what_is_written_into_a_part_moves_the_whole() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    beside = depth(lambda s, x: s.a(torch.cat([s.b(x), s.c(x)], 1)), x, **halves())
    into = depth(written, x, **halves())
    assert into == pytest.approx(beside, rel=0.05)


def test_many_parts_side_by_side_are_as_deep_as_one() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))

    def forward(s: Any, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in s.children()], 1)

    found = [depth(forward, x, **{f"p{i}": square() for i in range(count)}) for count in (1, 12)]
    assert found == pytest.approx([1, 1], rel=0.01)


def test_a_view_made_before_sees_what_is_written_after() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.b(x)
        v = h.view(-1, 2, 4)
        h += s.c(x)
        return s.a(v.flatten(1))

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"a": square(), "b": square(), "c": square()}
    both = depth(forward, x, **parts)
    parts["c"].requires_grad_(False)
    assert both > depth(forward, x, **parts) + 0.2


def test_a_branch_that_does_not_reach_the_output_is_left_out() -> None:
    def forward(s: Any, x: Tensor, labels: Tensor) -> Any:
        scores = s.a(x)
        extra = s.b(x)
        return {"loss": nn.functional.cross_entropy(scores, labels) + extra.sum(), "logits": scores}

    model = Lines(forward, a=nn.Linear(8, 3), b=square())
    network = from_torch(model, (torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))
    assert set(network.weights()) == {"a.weight", "a.bias"}


def test_a_starting_state_counts() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        _, (h, c) = s.first(x)
        return s.second(x, (h, c))[0][:, -1]

    x = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    parts = {"first": nn.LSTM(8, 8, batch_first=True), "second": nn.LSTM(8, 8, batch_first=True)}
    both = depth(forward, x, **parts)
    parts["first"].requires_grad_(False)
    assert both > depth(forward, x, **parts) + 0.1


@pytest.mark.parametrize(
    ("wave", "least"),
    [
        (lambda h: torch.sin(30 * h), 10.0),
        (lambda h: torch.exp(3 * h), 3.0),
        (lambda h: torch.sinh(5 * h), 5.0),
        (lambda h: (h + 10) - 10, 0.5),
        (lambda h: h * h.norm(dim=1, keepdim=True), 1.9),
        (lambda h: h / h.norm(dim=1, keepdim=True), 0.9),
        (torch.tanh, 0.9),
    ],
    ids=["sin", "exp", "sinh", "cancelling", "times its size", "by its size", "tanh"],
)
def test_a_change_comes_out_as_large_as_it_can(wave, least: float) -> None:
    """The depth against the largest relative change of the output that small changes of the weight were seen to make."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    found = depth(lambda s, x: wave(s.a(x)), x, a=square())
    assert found >= least
    model = Lines(lambda s, x: wave(s.a(x)), a=square())
    nn.init.orthogonal_(model.a.weight)
    with torch.no_grad():
        before, worst = model(x), 0.0
        for seed in range(20):
            u = nn.init.orthogonal_(torch.empty(8, 8), generator=torch.Generator().manual_seed(seed))
            model.a.weight.add_(1e-4 * u)
            worst = max(worst, float((model(x) - before).norm() / before.norm()) / 1e-4)
            model.a.weight.sub_(1e-4 * u)
    assert found >= 0.6 * worst


def test_experts_by_einsum_are_matrices() -> None:
    model = Lines(lambda s, x: torch.einsum("bd,edh->ebh", x, s.w).mean(0))
    model.w = nn.Parameter(torch.randn(4, 8, 6) / 8**0.5)
    network = from_torch(model, torch.randn(16, 8), scores=False)
    assert network.weights()["w"].norm == Transposed(Spectral())


def test_what_a_forward_changes_is_put_back() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.a.weight.data.mul_(0.5)
        x += 1
        return s.a(x)

    model, x = Lines(forward, a=square()), torch.zeros(4, 8)
    before = model.a.weight.detach().clone()
    # export refuses such a write, and what ran before it is undone
    with pytest.raises(InvalidArgument):
        from_torch(model, x, scores=False)
    assert torch.equal(model.a.weight, before)
    assert not x.any()
