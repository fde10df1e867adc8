"""Many tensors at once: a step on an accelerator costs what it launches, and of small tensors one kernel each is most of that.

Torch has one kernel for many tensors, which its own optimizers use; transforms of ``torch.func`` have none. What an optimizer owns is
written over (the trailing underscore).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def is_finite(x: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """``x.isfinite()``, which of floating-point numbers is four operations, in two."""
    return x.abs() < math.inf


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, such as ``vmap``."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def cast(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Each in its dtype; what is of it already is itself."""
    if transformed():
        return {name: x.to(dtypes[name]) for name, x in tensors.items()}
    fresh = {n: torch.empty_like(x, dtype=dtypes[n]) for n, x in tensors.items() if x.dtype != dtypes[n]}
    copy_(fresh, tensors)
    return {name: fresh.get(name, x) for name, x in tensors.items()}


def scaled(tensors: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    """Each times a Python number."""
    if transformed():
        return [x * factor for x, factor in zip(tensors, factors, strict=True)]
    return list(torch._foreach_mul(list(tensors), list(factors))) if tensors else []  # pyright: ignore


def between(starts: Sequence[Tensor], ends: Sequence[Tensor], share: float) -> list[Tensor]:
    """Each start, and that share of the way to its end."""
    if transformed():
        return [start.lerp(end, share) for start, end in zip(starts, ends, strict=True)]
    return list(torch._foreach_lerp(list(starts), list(ends), share)) if starts else []  # pyright: ignore


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
    before = {n: old[n].to(x.dtype) if n in old else torch.zeros_like(x) for n, x in new.items() if x is not old.get(n)}
    return {n: torch.where(finite, x, before[n]) if n in before else x for n, x in new.items()}


def unless_(finite: Bool[Tensor, ""] | None, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, written over the old tensors that are of a new one's dtype. Of such, the new one is finite, and is written over, too."""
    if finite is None:
        return dict(new)
    names = [name for name, x in new.items() if name in old and x is not old[name] and x.dtype == old[name].dtype]
    for dtype in {old[name].dtype for name in names}:
        olds, news = ([x[name] for name in names if old[name].dtype == dtype] for x in (old, new))
        taken = finite.to(dtype)
        torch._foreach_mul_(olds, 1 - taken)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(news, taken)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(olds, news)  # pyright: ignore[reportPrivateImportUsage]
    rest = unless(finite, old, {name: x for name, x in new.items() if name not in names})
    return {name: rest[name] if name in rest else old[name] for name in new}
