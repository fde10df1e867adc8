"""Where a network's parameters are in a model, and which of them an optimizer was given.

A model is a network's own ``torch.nn`` face, or holds one: a wrapper of a framework, ``DistributedDataParallel``, what ``torch.compile``
returns. With a method at hand any module will do whose parameters have the names of the method's network.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.method import Method
from modula_agd.network import Network
from modula_agd.torch_module import TorchModule

FOREIGN = {
    "weight_decay": "Pass decay= to AGD, which is relative to the declared sizes.",
    "momentum": "Pass momentum= to AGD itself; one serves the whole network.",
    "betas": "Pass momentum= to AGD itself; one serves the whole network.",
    "dampening": "Leave it out: the momentum is a mean, and its scale does not matter.",
    "nesterov": "Leave it out: the fresh gradient measures the descent instead.",
    "eps": "Leave it out: directions are of unit norm.",
    "amsgrad": "Leave it out.",
    "maximize": "Pass maximize=True to AGD itself.",
    "differentiable": "Leave it out: call method.update, a pure function, and differentiate that.",
    "foreach": "Leave it out: weights of equal shapes are taken together anyhow.",
    "fused": "Leave it out: there is no fused kernel.",
    "capturable": "Pass capturable=True to AGD itself.",
}
"""What torch's own optimizers know and this one does not, with the remedy."""


def refuse(options: Mapping[str, Any], where: str) -> None:
    """Raise ``InvalidArgument`` for an option of another optimizer, unless it is off (False, None, 0)."""
    for name, value in options.items():
        if name in FOREIGN and (isinstance(value, Tensor) or value):
            raise InvalidArgument(f"{where} was given {name}={value!r}, which AGD does not know. {FOREIGN[name]}")


def holder(model: object, method: Method | None) -> nn.Module:
    """The module in ``model`` whose parameters are a network's.

    Args:
        model: that module itself, or one around it.
        method: a ready one, whose network tells which of several is meant, or which names the parameters have.

    Raises:
        SpaceMismatch: there is none.
        InvalidArgument: there are several.
    """
    modules = list(model.named_modules()) if isinstance(model, nn.Module) else []
    faces = [(path, module) for path, module in modules if isinstance(module, TorchModule)]
    if len(faces) > 1 and method is not None:
        faces = [(path, face) for path, face in faces if face.network == method.network] or faces
    found: list[tuple[str, nn.Module]] = [*faces]
    if not found and method is not None:
        names = method.atoms.keys()
        found = [(path, module) for path, module in modules if names <= dict(module.named_parameters()).keys()]
    if isinstance(model, Network):
        raise SpaceMismatch(
            "AGD was given a network itself, which holds no parameters. Pass model = network.to_torch()."
        )
    if not isinstance(model, nn.Module):
        raise SpaceMismatch(
            f"AGD takes the model, not {type(model).__name__}: AGD(model, CrossEntropy()). Parameters to train are the argument groups."
        )
    if not found:
        remedy = (
            "Pass example_inputs=..., a batch as its forward takes it, and AGD captures it; or compose the network from modula_agd "
            "modules and pass network.to_torch(), or a module that holds it."
        )
        if method is not None:
            remedy = f"The method is for parameters {', '.join(method.atoms)}. {remedy}"
        raise SpaceMismatch(f"AGD was given a {type(model).__name__}, whose layers declare no bounds. {remedy}")
    if len(found) > 1:
        raise InvalidArgument(
            f"AGD was given a {type(model).__name__} that holds several networks: {', '.join(path for path, _ in found)}. Pass the one "
            "that this optimizer trains, and make one AGD for each."
        )
    return found[0][1]


def unwrapped(model: Any) -> Any:
    """The user's own module in what ``torch.compile`` and the data-parallel wrappers make of it."""
    while isinstance(model, nn.Module):
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner
    return model


def outside(model: nn.Module, inner: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the model that the network does not know."""
    known = {id(parameter) for parameter in parameters(inner, names).values()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in known]


def parameters(inner: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The network's parameters by name, in its order."""
    found = dict(inner.named_parameters())
    return {name: found[name] for name in names}


def named(group: object, known: Mapping[str, Tensor], taken: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """A group's parameters with the network's names.

    Args:
        group: a dictionary whose "params" are tensors, names, or pairs as ``named_parameters`` gives them.
        known: the network's parameters by name.
        taken: parameters of the groups before.

    Raises:
        InvalidArgument: one is not the network's, or is in a group already, or there is none.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise InvalidArgument(f"AGD takes groups of parameters as dictionaries with 'params', but was given {group!r}")
    members = group["params"]
    if isinstance(members, Tensor | str):
        members = [members]
    if isinstance(members, set) or not isinstance(members, Iterable):
        raise InvalidArgument(
            f"a group of AGD was given {type(members).__name__} of parameters; pass a list, whose order is always the same"
        )
    names, used, found = {id(p): name for name, p in known.items()}, {id(p) for p in taken}, []
    for member in members:
        parameter = member[1] if isinstance(member, tuple) and len(member) == 2 else member
        parameter = known.get(parameter) if isinstance(parameter, str) else parameter
        name = names.get(id(parameter))
        if not isinstance(parameter, torch.Tensor) or name is None:
            what = f"a tensor of shape {tuple(member.shape)}" if isinstance(member, Tensor) else repr(member)
            if isinstance(member, tuple):
                what = repr(member[0])
            raise InvalidArgument(
                f"a group of AGD was given {what}, which is none of the network's parameters {', '.join(known)}. What the network does "
                "not know declares no bound: compose it into the network, or give it to another optimizer."
            )
        if id(parameter) in used:
            raise InvalidArgument(f"a group of AGD was given {name!r}, which is in a group already. Name it once.")
        used.add(id(parameter))
        found.append((name, parameter))
    if not found:
        raise InvalidArgument("a group of AGD was given no parameter. Leave the group out.")
    return found
