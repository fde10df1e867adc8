"""Declarations: the bounds of operators that the library does not know, in a line or two.

declare(torch.ops.mine.swirl.default, lipschitz=1.0, source="a rotation")
declare(torch.ops.mine.gate.default, rule=lambda call: call.settled(call.bound(call.argument(0))))
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from modula_agd.bridge.flow import Call, Rule, stretched
from modula_agd.bridge.graph import Node, operator_name
from modula_agd.bridge.rules import RULES
from modula_agd.error import InvalidArgument, UnknownBound
from modula_agd.space import finite

DECLARED: dict[str, Rule] = {}
"""What users declared, by operator; it comes before the library's own."""


def declare(
    operator: Any, *, lipschitz: float | None = None, source: str | None = None, rule: Rule | None = None
) -> None:
    """Say how an operator passes a perturbation on, in every captured model, from now on.

    Args:
        operator: ``torch.ops.namespace.name``, with or without overload, or the name as an error gave it.
        lipschitz: a constant c: its first argument's change comes out at most c times as large. Where the result is 0 at 0 and no
            more than that much larger than what goes in, this is all.
        source: whence the constant, required with it.
        rule: instead, a function from a ``Call`` to the ``Bound`` of the result: ``call.bound(call.argument(0))`` is that of the
            first argument, ``call.product(x, call.argument(1))`` its product with a weight, and ``call.settled(bound)`` has the
            measured magnitude.

    Raises:
        InvalidArgument: neither or both are given, or the constant has no source.
    """
    name = _name(operator)
    if (rule is None) == (lipschitz is None):
        raise InvalidArgument(f"declare({name}) takes either lipschitz=..., with its source, or rule=...")
    if rule is not None:
        if not callable(rule):
            raise InvalidArgument(f"declare({name}) was given the rule {rule!r}, which cannot be called")
        DECLARED[name] = rule
        return
    if not (finite(lipschitz) and lipschitz is not None and lipschitz > 0):
        raise InvalidArgument(f"declare({name}) was given lipschitz={lipschitz!r}, which must be a finite number > 0")
    if not isinstance(source, str) or not source.strip():
        raise InvalidArgument(
            f"declare({name}, lipschitz={lipschitz}) has no source. Say whence the constant comes: source='...'."
        )
    constant = float(lipschitz)

    def bond(call: Call) -> Any:
        x = call.bound(call.argument(0))
        most = replace(x, magnitude=constant * x.magnitude)
        return stretched(call.settled(most), 1 / call.correction(most.magnitude)).assuming(
            f"Lipschitz constant of {name}: {constant:g} ({source})"
        )

    DECLARED[name] = bond


def undeclare(operator: Any) -> None:
    """Take a declaration back.

    Raises:
        InvalidArgument: there is none.
    """
    name = _name(operator)
    if name not in DECLARED:
        raise InvalidArgument(
            f"undeclare({name}): nothing was declared of it; declared are {sorted(DECLARED) or 'none'}"
        )
    del DECLARED[name]


def _name(operator: Any) -> str:
    if isinstance(operator, torch._ops.OpOverloadPacket):
        operator = getattr(operator, operator.overloads()[0])
    if isinstance(operator, torch._ops.OpOverload):
        return operator_name(operator)
    if isinstance(operator, str) and operator:
        return operator.removeprefix("torch.ops.").removeprefix("aten.").split(".")[0].replace("aten::", "")
    raise InvalidArgument(
        f"declare takes an operator such as torch.ops.aten.relu.default, or its name, but was given {operator!r}"
    )


def rule_of(node: Node) -> Rule:
    """The rule of a call.

    Raises:
        UnknownBound: there is none; says which operator, called where, and what to do.
    """
    name = node.operator
    rule: Callable[[Call], Any] | None = DECLARED.get(name) or RULES.get(name)
    if rule is None:
        remedy = f"Declare one: declare({name!r}, lipschitz=c, source='...'), or declare({name!r}, rule=...) for more than one argument."
        if name.startswith("wrap_with"):
            remedy = "It is a region of autocast or of set_grad_enabled in the forward: put it around the call of the model instead."
        raise UnknownBound(
            f"the model calls the operator {node.target}, of which no bound is known, {node.where}. {remedy}"
        )
    return rule
