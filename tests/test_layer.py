"""What a new layer must declare, and what follows from the declaration alone."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from modula_agd import (
    Atom,
    Bond,
    Features,
    Gain,
    InvalidArgument,
    Linear,
    ReLU,
    Scale,
    Sign,
    Space,
    SpaceMismatch,
    UnknownBound,
)
from support import gaussian


@dataclass(frozen=True)
class Halved(Bond):
    gain: ClassVar[Gain] = Gain.exact(0.5, "a multiple")
    at_zero: ClassVar[float] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@dataclass(frozen=True)
class Shifted(Bond):
    """Declares by field and by property, as a bond with parameters does."""

    at_zero: float
    slope: float = 1.0

    @property
    def gain(self) -> Gain:
        return Gain.exact(abs(self.slope), "a multiple")

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + self.at_zero


@dataclass(frozen=True)
class Gate(Atom):
    """An atom as a user would write one."""

    width: int
    mass: float = field(default=2.0, kw_only=True)

    @property
    def domain(self) -> Space:
        return Features(self.width)

    @property
    def codomain(self) -> Space:
        return Features(self.width)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def norm(self) -> Sign:
        return Sign()

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        return weight * x


@pytest.mark.parametrize(
    ("declared", "missing"),
    [
        ({}, "gain"),
        ({"at_zero": 0.0}, "gain"),
        ({"gain": Gain.exact(1.0, "test")}, "at_zero"),
    ],
)
def test_a_bond_that_does_not_declare_its_constants_is_an_error(declared: dict[str, Any], missing: str) -> None:
    with pytest.raises(UnknownBound, match=rf"the bond Careless does not declare `{missing}`.*Gain\.exact"):
        type("Careless", (Bond,), {**declared, "forward": lambda self, x: x})


def test_a_bond_declares_by_class_attribute_field_or_property() -> None:
    bound = (Halved() @ Shifted(3.0, slope=2.0) @ Linear(4, 4)).bound()
    assert bound.magnitude == pytest.approx((3.0 + 2.0) / 2)
    # the shift carries no change: relative changes shrink to 2/5
    assert bound.depth == pytest.approx(2 / 5)


def test_a_bond_keeps_its_space_and_has_no_second_order_bound_by_default() -> None:
    assert Halved().bind(Features(3)).codomain == Features(3)
    assert Halved().curvature is None
    assert Halved().limit == math.inf
    assert (Halved() @ Linear(3, 3)).bound().error is None


def test_a_bond_on_one_tensor_refuses_a_tuple() -> None:
    with pytest.raises(SpaceMismatch, match=r"Halved\(.*\(Features\(4\), Features\(4\)\)"):
        Halved() @ (Linear(4, 3), Linear(4, 3))


def test_a_bond_is_bound_to_one_space_for_good() -> None:
    relu = ReLU().bind(Features(3))
    assert relu.bind(Features(3)) == relu
    with pytest.raises(SpaceMismatch, match=r"takes Features\(3\), .* gives Features\(4\)"):
        relu.bind(Features(4))


def test_an_atom_of_a_users_own_composes_draws_and_bounds() -> None:
    net = Linear(2, 3) @ Gate(3, size=5.0)
    params = net.init(0, dtype=torch.float64)
    assert list(params) == ["0.weight", "1.weight"]
    assert params["0.weight"].abs().tolist() == [5.0] * 3
    x = gaussian(4, 3)
    assert torch.equal(net(params, x), (x * params["0.weight"]) @ params["1.weight"].mT)
    bound = net.bound()
    assert (bound.magnitude, bound.depth, bound.ceiling) == (5.0, 3.0, 3.0)


@pytest.mark.parametrize("what", ["mass", "size"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 10**400])
def test_mass_and_size_must_be_finite_and_not_negative(what: str, value) -> None:
    with pytest.raises(InvalidArgument, match=f"Gate was given {what} {value!r}"):
        Gate(3, **{what: value})


def test_a_size_of_zero_is_refused_and_a_mass_of_zero_is_not() -> None:
    with pytest.raises(InvalidArgument, match="a size is a finite number > 0"):
        Gate(3, size=0.0)
    assert Gate(3, mass=0.0).mass == 0


def test_a_mass_multiplies_the_one_there_is() -> None:
    assert Gate(3).with_mass(3.0) == Gate(3, mass=6.0)


def test_an_atom_draws_its_declared_size_rounded_once() -> None:
    atom = Linear(5, 7, size=0.3)
    exact = atom.init(3, dtype=torch.float64)["weight"]
    assert atom.norm.size(exact).item() == pytest.approx(0.3)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(atom.init(3, dtype=dtype)["weight"], exact.to(dtype))


def test_the_floor_of_a_tracked_size_is_a_hundredth_of_the_declared_one() -> None:
    assert Linear(3, 3, size=2.0).floor == pytest.approx(0.02)
    assert Scale(3).floor == pytest.approx(0.01)


def test_a_missing_parameter_is_named_with_those_that_are_there() -> None:
    net = Linear(2, 3) @ ReLU() @ Gate(3)
    params = net.init(0)
    del params["2.weight"]
    with pytest.raises(InvalidArgument, match=r"parameter '2\.weight'.*\['0\.weight'\]"):
        net(params, torch.ones(1, 3))


def test_a_bare_number_is_no_gain() -> None:
    with pytest.raises(UnknownBound, match=r"the bond Bare declares `gain` as the bare number 1\.0.*Gain\.exact"):

        @dataclass(frozen=True)
        class Bare(Bond):
            gain: ClassVar[float] = 1.0
            at_zero: ClassVar[float] = 0.0

            def forward(self, x: Tensor) -> Tensor:
                return x


def test_a_bond_on_a_tuple_needs_a_rule_of_its_own() -> None:
    @dataclass(frozen=True)
    class First(Bond):
        gain: ClassVar[Gain] = Gain.exact(1.0, "nothing happens")
        at_zero: ClassVar[float] = 0.0

        def codomain_of(self, domain: Space) -> Space:
            return Features(3)

        def forward(self, x: Any) -> Tensor:
            return x[0]

    with pytest.raises(UnknownBound, match=r"First\(\) takes a tuple.*Override rule"):
        (First() @ (Linear(3, 3), Linear(3, 3))).bound()
