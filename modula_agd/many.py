"""Many tensors at once: a step on an accelerator costs what it launches, and of small tensors one kernel each is most of that.

Torch has one kernel for many tensors, which its own optimizers use; derivatives and transforms of ``torch.func`` have none. What is owned
may be written over (the trailing underscore).
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import forward_ad


def is_finite(x: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """``x.isfinite()``, which of floating-point numbers is four operations, in two."""
    return x.abs() < math.inf


def one_by_one(tensors: Iterable[Tensor]) -> bool:
    """Whether something is at work on these for which torch has no kernel of many: a transform of ``torch.func``, or a derivative."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return True
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return recorded or forward_ad._current_level >= 0


def cast(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Each in its dtype; what is of it already is itself."""
    if one_by_one(tensors.values()):
        return {name: x.to(dtypes[name]) for name, x in tensors.items()}
    fresh = {n: torch.empty_like(x, dtype=dtypes[n]) for n, x in tensors.items() if x.dtype != dtypes[n]}
    copy_(fresh, tensors)
    return {name: fresh.get(name, x) for name, x in tensors.items()}


def scaled(tensors: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    """Each times a Python number."""
    if one_by_one(tensors) or not tensors:
        return [x * factor for x, factor in zip(tensors, factors, strict=True)]
    return list(torch._foreach_mul(list(tensors), list(factors)))  # pyright: ignore[reportPrivateImportUsage]


def scale_(tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
    """The same, written over each."""
    if one_by_one(tensors) or not tensors:
        for x, factor in zip(tensors, factors, strict=True):
            x.mul_(factor)
    else:
        torch._foreach_mul_(list(tensors), list(factors))  # pyright: ignore[reportPrivateImportUsage]


def between(starts: Mapping[str, Tensor], ends: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """That share of the way to each end from the start of its name."""
    if one_by_one([*ends.values(), *(starts[name] for name in ends)]) or not ends:
        return {name: starts[name].lerp(end, share) for name, end in ends.items()}
    found = torch._foreach_lerp([starts[name] for name in ends], list(ends.values()), share)  # pyright: ignore
    return dict(zip(ends, found, strict=True))


def copy_(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write each value over what has its name among the places, cast to that one's dtype."""
    kinds: dict[object, list[str]] = {}
    for name, x in places.items():
        kinds.setdefault((x.dtype, values[name].dtype, x.device, values[name].device), []).append(name)
    for names in kinds.values():
        torch._foreach_copy_([places[name] for name in names], [values[name] for name in names])  # pyright: ignore


def unless(finite: Bool[Tensor, ""] | None, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new tensors where ``finite``, or where that has been looked at (None); otherwise the old ones, or 0 without."""
    if finite is None:
        return dict(new)

    def chosen(x: Tensor, before: Tensor | None) -> Tensor:
        return (
            x if x is before else torch.where(finite, x, torch.zeros_like(x) if before is None else before.to(x.dtype))
        )

    # one after the other, as each is as large as its weight
    return {name: chosen(x, old.get(name)) for name, x in new.items()}


def unless_(
    finite: Bool[Tensor, ""] | None,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    unsure: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """The same, written over the old tensors that are of a new one's dtype.

    Args:
        finite: as for ``unless``.
        old: finite.
        new: finite, but for those that are unsure; what is written over an old one is written over, too.
        unsure: names of new ones that nothing is written over with, as NaN times 0 is NaN.
    """
    if finite is None:
        return dict(new)
    both = {n: x for n, x in new.items() if n in old and n not in unsure}
    names = [name for name, x in both.items() if x is not old[name] and x.dtype == old[name].dtype]
    for dtype in {old[name].dtype for name in names}:
        olds, news = ([x[name] for name in names if old[name].dtype == dtype] for x in (old, new))
        passes = finite.to(dtype)
        torch._foreach_mul_(olds, 1 - passes)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(news, passes)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(olds, news)  # pyright: ignore[reportPrivateImportUsage]
    rest = unless(finite, old, {name: x for name, x in new.items() if name not in names})
    return {name: rest[name] if name in rest else old[name] for name in new}
