"""What the optimizer remembers, in the places where ``torch.optim`` and its checkpoints look for it.

``state[p]`` of each parameter p, a dictionary of the same keys from the first step to the last:

* "begun": 1 once p has had a gradient, 0 before; what follows means nothing while it is 0;
* "momentum_buffer": m of p's shape, where there is momentum; float32 for half precision;
* "lead": l of p's shape, beside it; bfloat16 but for double precision and where full precision was asked for;
* "direction": u of p's shape, where curvature or balance is measured along it, or one direction serves several steps; as short
  as the lead where it does no more than measure;
* "average": w̄ of p's shape, where weights are averaged; float32 for half precision.

``param_groups[0]["agd"]``: "format", the numbers of ``State`` by their names, "buffers", the averaged running statistics by name, and
"measured", what the capture of a model in plain ``torch.nn`` measured.
Tensors of the weights' shapes are in the first place alone, so that what shards parameters can shard them alike.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.placement import is_spread, local, placed, spread
from modula_agd.state import WEIGHT_SIZED, State, complaint, not_finite, odd_tensors

FORMAT = 6
"""Of what ``state_dict`` returns; raised when an older version could not read it."""
NUMBERS = tuple(field for field in State._fields if field not in WEIGHT_SIZED)
KEYS = {"momentum": "momentum_buffer", "lead": "lead", "directions": "direction", "average": "average"}
"""The place of each tensor of a weight's size, by what it is called elsewhere."""

Entries = Mapping[str, dict[str, Any]]


def allocate(entry: dict[str, Any], parameter: Tensor, wanted: Mapping[str, torch.dtype]) -> None:
    """Make what the state of a parameter lacks.

    Args:
        entry: ``state[p]``.
        parameter: p.
        wanted: the dtypes of what it shall have, by the names of ``KEYS``.
    """
    begun = entry.setdefault("begun", 0)
    like = parameter.detach()
    for what, dtype in wanted.items():
        # a direction that is missing later on is made when it is needed
        if KEYS[what] in entry or (what == "directions" and begun):
            continue
        entry[KEYS[what]] = like.to(dtype, copy=True) if what == "average" else torch.zeros_like(like, dtype=dtype)
        entry["begun"] = 0 if what == "momentum" else entry["begun"]


def recalled(entries: Entries, numbers: Mapping[str, Any]) -> State:
    """The state of the method, made of what is remembered.

    Args:
        entries: ``state[p]`` of each parameter by name.
        numbers: ``param_groups[0]["agd"]``.
    """
    begun = {name: entry for name, entry in entries.items() if entry.get("begun")}
    sized: dict[str, Any] = {
        what: {name: entry[KEYS[what]] for name, entry in begun.items() if KEYS[what] in entry} for what in WEIGHT_SIZED
    }
    return State(**{name: numbers[name] for name in NUMBERS}, **sized)


def keep(entry: dict[str, Any], key: str, value: Tensor, *, in_place: bool) -> None:
    """Put a tensor, or what this process holds of one, in its place: where the old one is if ``in_place``."""
    old = entry.get(key)
    if old is not None and is_spread(old):
        if local(old) is not value:
            entry[key] = spread(value, old)
    elif not in_place or old is None or (old.shape, old.dtype, old.device) != (value.shape, value.dtype, value.device):
        entry[key] = value
    elif old is not value:
        old.copy_(value)


def read(
    saved: object, groups: list[dict[str, Any]], like: State, buffers: Mapping[str, Tensor], *, has_momentum: bool
) -> tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]]]:
    """Copies of a saved state's entries by parameter, and of its groups; no dtype is changed. Waits for the device.

    Args:
        saved: what ``state_dict`` returned.
        groups: the optimizer's own.
        like: the state of the method that shall go on.
        buffers: the model's running statistics by name.
        has_momentum: whether the method has.

    Raises:
        InvalidArgument: the state is another optimizer's, another network's or a newer version's, or cannot be.
    """
    theirs = _list_of_groups(saved)
    numbers = theirs[0].get("agd") if theirs else None
    if (
        not isinstance(saved, Mapping)
        or not isinstance(saved.get("state"), Mapping)
        or not isinstance(numbers, Mapping)
    ):
        raise InvalidArgument(
            "load_state_dict was given no state of AGD, or one of an older version. "
            "Load the state that AGD saved for the same network."
        )
    found = numbers.get("format")
    if isinstance(found, int) and found < FORMAT:
        raise InvalidArgument(
            f"load_state_dict was given a state of format {found}, which an older version of modula_agd wrote; this one goes on "
            f"from format {FORMAT} alone, as weights that lag go further since. Load the weights and start the "
            "optimizer anew."
        )
    if not isinstance(found, int) or found > FORMAT:
        raise InvalidArgument(
            f"load_state_dict was given a state of format {found!r}, which a newer version of modula_agd wrote; this one reads formats up "
            f"to {FORMAT}. Update modula_agd, or load the weights alone and start the optimizer anew."
        )
    _check_groups(theirs, groups)
    names = [name for group in groups for name in group["param_names"]]
    params = [parameter for group in groups for parameter in group["params"]]
    ids = [key for group in theirs for key in group["params"]]
    entries = {name: saved["state"].get(key) or {} for name, key in zip(names, ids, strict=True)}
    shapes = {name: tuple(p.shape) for name, p in zip(names, params, strict=True)}
    wrong = _complaint(entries, numbers, shapes, like, buffers)
    if wrong is not None:
        raise InvalidArgument(
            f"load_state_dict was given a state of AGD that cannot be: {wrong}. Load it as AGD saved it for the same network, or start "
            "anew."
        )
    if not has_momentum and any({"momentum_buffer", "lead"} & entry.keys() for entry in entries.values()):
        raise InvalidArgument(
            "load_state_dict was given the state of a method with momentum, but this one has none. Build AGD with the "
            "momentum that it was saved with."
        )
    mine: dict[Tensor, dict[str, Any]] = {}
    for name, parameter in zip(names, params, strict=True):
        entry = entries[name]
        mine[parameter] = {"begun": int(entry.get("begun", 0))}
        # copies: the optimizer writes over its own
        tensors = {key: entry[key] for key in KEYS.values() if key in entry}
        mine[parameter] |= {
            key: placed(value.detach().to(parameter.device, copy=True), parameter) for key, value in tensors.items()
        }
    return mine, _groups(theirs, groups, numbers, like)


def measured(saved: object) -> Tensor | None:
    """What the capture of a model measured, in a saved state; None of another network's."""
    theirs = _list_of_groups(saved)
    numbers = theirs[0].get("agd") if theirs else None
    found = numbers.get("measured") if isinstance(numbers, Mapping) else None
    return found if isinstance(found, Tensor) and found.ndim == 1 else None


def _list_of_groups(saved: object) -> list[Any]:
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return []
    return groups


def _check_groups(theirs: list[Any], groups: list[dict[str, Any]]) -> None:
    """Raise ``InvalidArgument`` unless saved groups hold as many parameters of the same names as this optimizer's."""
    sizes = [[len(group.get("params", ())) for group in those] for those in (theirs, groups)]
    if sizes[0] != sizes[1]:
        raise InvalidArgument(
            f"load_state_dict was given parameter groups of {sizes[0]} parameters, but this optimizer has {sizes[1]}. Build AGD with the "
            "groups that it was saved with. Load the state that AGD saved for the same network."
        )
    for saved, mine in zip(theirs, groups, strict=True):
        names = saved.get("param_names")
        if names is not None and list(names) != mine["param_names"]:
            raise InvalidArgument(
                f"load_state_dict was given the state of a network with parameters {', '.join(map(str, names))}, but this one has "
                f"{', '.join(mine['param_names'])}. Load the state that AGD saved for the same network."
            )
        if "lr" not in saved:
            raise InvalidArgument("load_state_dict was given a state of AGD whose parameter groups hold no lr")


def _complaint(
    entries: Entries,
    numbers: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    like: State,
    buffers: Mapping[str, Tensor],
) -> str | None:
    """Why a state cannot be restored, as a clause."""
    wrong = complaint(numbers, like)
    if not all(isinstance(entry, Mapping) for entry in entries.values()):
        return "its state of a parameter is no dictionary"
    begun = {name for name, entry in entries.items() if entry.get("begun")}
    for what, key in KEYS.items():
        tensors = {name: entry[key] for name, entry in entries.items() if key in entry}
        wrong = (
            wrong
            or odd_tensors(what, tensors, shapes)
            or not_finite(what, {name: local(x) for name, x in tensors.items()})
        )
        # a kept direction is made anew where there is none
        lacking = begun - tensors.keys() if tensors and what != "directions" else set()
        # the two are of the same gradients
        lacking |= {n for n in begun if "momentum_buffer" in entries[n]} - tensors.keys() if what == "lead" else set()
        if lacking:
            wrong = wrong or f"its {what} lacks {', '.join(map(repr, sorted(lacking)))}"
    statistics = numbers.get("buffers", {})
    floating = {name: tuple(value.shape) for name, value in buffers.items() if value.is_floating_point()}
    real = {name: value for name, value in statistics.items() if name in floating}
    wrong = wrong or odd_tensors("average", real, floating) or not_finite("average", real)
    if wrong is None and statistics and statistics.keys() != buffers.keys():
        wrong = f"its average lacks {', '.join(map(repr, sorted(statistics.keys() ^ buffers.keys())))}"
    return wrong


def _groups(
    theirs: list[Any], groups: list[dict[str, Any]], numbers: Mapping[str, Any], like: State
) -> list[dict[str, Any]]:
    """The optimizer's groups with what was saved of them."""
    plain = [{key: value for key, value in group.items() if key not in ("params", "agd")} for group in theirs]
    fresh = [
        {"param_names": mine["param_names"], **deepcopy(saved), "params": mine["params"]}
        for saved, mine in zip(plain, groups, strict=True)
    ]
    here = like._asdict()
    told: dict[str, Any] = {name: numbers[name].detach().to(here[name], copy=True) for name in NUMBERS}
    # what a captured graph replays, no host counts
    told["clock"] = told["steps"].to("cpu", copy=True)
    buffers = {
        name: value.detach().to(here["t"].device, copy=True) for name, value in numbers.get("buffers", {}).items()
    }
    seen = {key: numbers[key].detach().to("cpu", copy=True) for key in ("measured",) if key in numbers}
    fresh[0]["agd"] = {"format": FORMAT, **told, "buffers": buffers, **seen}
    return fresh
