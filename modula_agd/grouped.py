"""An optimizer's dealings with ``torch.optim``: groups of parameters, what is remembered of each, saving and copying."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modula_agd import memory
from modula_agd.error import InvalidArgument
from modula_agd.holder import named, parameters, refuse
from modula_agd.many import copy_
from modula_agd.method import Method
from modula_agd.placement import spread
from modula_agd.polar import working_dtype
from modula_agd.space import finite
from modula_agd.state import WAYS, WEIGHT_SIZED, State

Rates = list[float | Tensor]
"""What multiplies the step of each group: a number that was looked at, or a tensor that the device looks at."""


@dataclass
class Now:
    """What is of this moment and goes into no checkpoint; one object, which wrappers that copy an optimizer's attributes share.

    Args:
        swapped: whether the model holds averaged weights.
        applied: the multipliers of the last step, by parameter.
        watched: the descents of a step, on their way from the device, and the event of their arrival.
    """

    swapped: bool = False
    applied: dict[str, float | Tensor] = field(default_factory=dict)
    watched: tuple[Tensor, torch.Event] | None = None


class Grouped(torch.optim.Optimizer):
    """An optimizer of a network's parameters, in groups, with the memory of a method.

    Attributes:
        method: whose steps are made.
        averaging: whether averaged weights are kept.
        maximize: whether gradients are those of the negative of the loss.
        capturable: whether all that is remembered stays where it is.
    """

    method: Method
    averaging: bool
    maximize: bool
    capturable: bool
    _inner: nn.Module
    _now: Now
    _own: tuple[str, ...] = ("method", "averaging", "maximize", "capturable", "_inner")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the network, such as those that were frozen before, with an ``lr`` of their own.

        Raises:
            InvalidArgument: a parameter is none of the network's, or in a group already.
        """
        taken = [parameter for group in self.param_groups for parameter in group["params"]]
        members = named(param_group, parameters(self._inner, self.method.atoms), taken)
        refuse(param_group, "a group of AGD")
        # names are the network's, whatever the model around it calls them
        rest = {key: value for key, value in param_group.items() if key not in ("params", "param_names")}
        super().add_param_group({**rest, "params": members})
        for name, parameter in members:
            self._allocate(name, parameter, parameter.requires_grad)

    def _forget(self) -> None:
        """Give up what is of the time before a state was loaded."""

    def _live(self, what: str) -> None:
        if self._now.swapped:
            raise InvalidArgument(
                f"{what} was called inside averaged(), where the model holds the weights to evaluate. Leave the block first."
            )

    def _lasting(self) -> list[str]:
        """Parameters whose directions serve several steps."""
        params = parameters(self._inner, self.method.atoms)
        periods = self.method.periods(next(iter(params.values())).device)
        return [name for name, period in periods.items() if period > 1]

    def _allocate(self, name: str, parameter: Tensor, moves: bool) -> None:
        method, wide = self.method, working_dtype(parameter.dtype)
        wanted = {}
        if moves and method.masses[name] > 0:
            wanted = {"momentum": wide, "lead": method.kept_dtype(wide)} if method.momentum is not None else {}
            if name in method.keeps(parameter.device):
                wanted["directions"] = method.kept_dtype(wide, method.periods(parameter.device)[name])
            if self.averaging:
                wanted["average"] = wide
        memory.allocate(self.state[parameter], parameter, wanted)

    def _follow(self) -> None:
        """Take what is remembered to where the model is now: parameters may have been moved to another device since."""
        numbers, device = self.param_groups[0]["agd"], self.param_groups[0]["params"][0].device
        if numbers["t"].device == device:
            return
        for name in memory.NUMBERS:
            numbers[name] = numbers[name].to("cpu" if name == "clock" else device)
        numbers["buffers"] = {name: value.to(device) for name, value in numbers["buffers"].items()}
        for entry in self._entries().values():
            entry |= {key: entry[key].to(device) for key in memory.KEYS.values() if key in entry}

    def _trained(self) -> dict[str, Tensor]:
        """The parameters of all groups by the network's names."""
        return {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def _parameters(self) -> dict[str, Tensor]:
        """All of the network's parameters, in its order."""
        trained = self._trained()
        others = parameters(self._inner, self.method.atoms) if len(trained) < len(self.method.atoms) else {}
        return {name: trained[name] if name in trained else others[name] for name in self.method.atoms}

    def _statistics(self) -> dict[str, Tensor]:
        """Running statistics, which belong to the weights and are averaged with them."""
        return dict(self._inner.named_buffers())

    def _entries(self) -> dict[str, dict[str, Any]]:
        return {name: self.state[parameter] for name, parameter in self._trained().items()}

    @property
    def current(self) -> State:
        """What the last update did, as ``Method.update`` returns it; its tensors are the optimizer's own."""
        return memory.recalled(self._entries(), self.param_groups[0]["agd"])

    @current.setter
    def current(self, state: State) -> None:
        entries, numbers, params = self._entries(), self.param_groups[0]["agd"], self._trained()
        fresh = {
            name for name, entry in entries.items() if "average" in entry and not entry.get("begun")
        } & state.momentum.keys()
        if fresh:
            for name in fresh:
                # the next step starts one, at the weights as they then are
                del entries[name]["average"]
            state = state._replace(**self._without_ways(fresh, state._asdict()))
        for what in WEIGHT_SIZED:
            for name, value in getattr(state, what).items():
                entry, key = entries[name], memory.KEYS[what]
                value = value if key in entry else spread(value, params[name])
                memory.keep(entry, key, value, in_place=self.capturable)
        fresh_numbers = {name: getattr(state, name) for name in memory.NUMBERS}
        if self.capturable:
            copy_({name: numbers[name] for name in fresh_numbers}, fresh_numbers)
        else:
            numbers |= fresh_numbers
        for name, entry in entries.items():
            if self.method.momentum is not None:
                entry["begun"] = int(name in state.momentum)
            if entry.get("begun") and name not in state.directions:
                entry.pop("direction", None)

    def _without_ways(self, names: Set[str], numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the state's numbers tell of ways, but 0 for parameters whose average is yet to start. Waits for the device."""
        kept = numbers["slopes"].new_tensor([float(name not in names) for name in self.method.atoms])
        return {what: numbers[what] * kept for what in WAYS}

    def _rates(self) -> Rates:
        """The multiplier of each group.

        Raises:
            InvalidArgument: one that can be looked at is no number ≥ 0.
        """
        rates: Rates = []
        for index, group in enumerate(self.param_groups):
            rate = told = group["lr"]
            if isinstance(rate, Tensor) and rate.numel() == 1:
                if self.capturable or rate.device.type != "cpu" or torch.compiler.is_compiling():
                    rates.append(rate if rate.ndim == 0 else rate.reshape(()))
                    continue
                told = rate.item()
            if not (finite(told) and told >= 0):
                raise InvalidArgument(
                    f"the multiplier param_groups[{index}]['lr'] of AGD is {rate!r}, which is not a finite number ≥ 0"
                )
            rates.append(float(told))
        return rates

    def _by_name(self, rates: Rates) -> dict[str, float | Tensor]:
        """The multiplier of each parameter."""
        groups = zip(self.param_groups, rates, strict=True)
        return {name: rate for group, rate in groups for name in group["param_names"]}

    def __getstate__(self) -> dict[str, Any]:
        # torch's own lists what it copies and pickles, and would leave the method behind
        self._live("copying or pickling")
        mine = {name: getattr(self, name) for name in self._own}
        return {**super().__getstate__(), **mine, "_now": Now(applied=self._now.applied)}

    def __repr__(self) -> str:
        lines = [f"Parameter Group {i}\n    lr: {group['lr']}" for i, group in enumerate(self.param_groups)]
        return "\n".join(["AGD (", *lines, ")"])

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's: tensors and plain numbers, the optimizer's own, in the places that ``modula_agd.memory`` tells."""
        numbers = self.param_groups[0]["agd"]
        if self.capturable:
            # what a captured graph replays, no host counts
            numbers["clock"].copy_(numbers["steps"])
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, whole or not at all; micro-batches that were being accumulated are given up.

        Raises:
            InvalidArgument: the state is another optimizer's, another network's or a newer version's.
        """
        self._live("load_state_dict()")
        # torch's own would cast what is kept in float32 beside half-precision weights
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, dict(state_dict)) or state_dict
        momentum = self.method.momentum is not None
        state, groups = memory.read(
            state_dict, self.param_groups, self.current, self._statistics(), has_momentum=momentum
        )
        self.state.clear()
        self.state.update(state)
        self.param_groups[:] = groups
        entries, numbers = self._entries(), self.param_groups[0]["agd"]
        if not self.averaging:
            # they would never be renewed
            for entry in entries.values():
                entry.pop("average", None)
        # the next step starts one, at the weights as they then are
        late = {n for n, entry in entries.items() if self.averaging and entry.get("begun") and "average" not in entry}
        for name, parameter in self._trained().items():
            if name not in late:
                self._allocate(name, parameter, parameter.requires_grad)
        if late:
            numbers |= self._without_ways(late, numbers)
        self._forget()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
