"""The ``torch.optim.Optimizer`` face of the engine, for training loops in the usual style."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modula_agd.agd import agd
from modula_agd.averaging import average_, averaged
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.explanation import Explanation, explain
from modula_agd.held_out import renewed
from modula_agd.inspection import check_gradients
from modula_agd.loss import Loss
from modula_agd.majorisation import Evidence
from modula_agd.method import Method
from modula_agd.polar import working_dtype
from modula_agd.space import finite
from modula_agd.state import WEIGHT_SIZED, State, complaint, not_finite, odd_tensors
from modula_agd.torch_module import TorchModule

_OWN = ("_names", "_model", "_average", "_swapped", "_micro", "_count")


class AGD(torch.optim.Optimizer):
    """Automatic gradient descent on a model made by ``network.to_torch()``.

    ``lr`` in the parameter group multiplies the derived step. It is 1 and needs no tuning; it is there for schedulers and
    monitors that expect it.

    Args:
        model: a network's ``torch.nn`` face.
        loss: what is minimised, or a ``Method`` built beforehand.
        averaging: whether to keep averaged weights (one buffer of the weights' size), for ``averaged()``; by default where there
            is momentum.
        options: as for ``agd``.
    """

    def __init__(self, model: nn.Module, loss: Loss | Method, *, averaging: bool | None = None, **options: Any) -> None:
        if not isinstance(model, TorchModule):
            raise SpaceMismatch(
                f"AGD was given a {type(model).__name__}, whose layers declare no bounds. Compose the network from modula_agd "
                "modules and pass network.to_torch()."
            )
        if isinstance(loss, Method) and options:
            raise InvalidArgument(
                f"AGD was given a ready method and the options {sorted(options)}. Pass them to agd() instead."
            )
        if "lr" in options:
            raise InvalidArgument(
                "AGD was given a learning rate, but derives its step from the network and the loss. Leave lr out; a multiplier "
                "of the derived step, 1.0 by default, is param_groups[0]['lr']."
            )
        self.method = loss if isinstance(loss, Method) else agd(model.network, loss, **options)  # pyright: ignore
        if self.method.network != model.network:
            raise InvalidArgument(
                f"AGD was given a method built for a network with parameters {sorted(self.method.atoms)}, {self.method.network!r}, "
                f"but a model of {model.network!r}. Build the method for the model's network."
            )
        self._names = [name for name, _ in model.named_parameters()]
        self._model = model
        if averaging is not None and not isinstance(averaging, bool):
            raise InvalidArgument(f"AGD was given averaging={averaging!r}, which must be True or False")
        self.averaging = self.method.momentum is not None if averaging is None else averaging
        self._average: dict[str, Tensor] = {}
        self._swapped = False
        self._micro: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._count = 0
        super().__init__(model.parameters(), {"lr": 1.0})
        self.current: State = self.method.init(self._parameters())
        self._watched: tuple[Tensor, torch.Event] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the network's parameters are one group, made at construction; ``with_mass`` sets a part's share.

        Raises:
            InvalidArgument: always, but for the first group.
        """
        if self.param_groups:
            raise InvalidArgument(
                "add_param_group was called on AGD, whose step is one number for the whole network. "
                "Give a part its own share with module.with_mass(...), or freeze it with with_mass(0)."
            )
        super().add_param_group(param_group)

    def _parameters(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self.param_groups[0]["params"], strict=True))

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradient of one micro-batch in and clear it; call it after each ``backward()`` of a mean loss, then ``step()``.

        Every second micro-batch makes the direction fresher, and the others measure the descent along it, which they have not
        seen. With a single one, or without momentum, it is a step as usual. Micro-batches count alike, whatever their sizes. A step,
        done or refused, ends the accumulation, and so does ``discard()``; ``zero_grad()`` and ``state_dict()`` do not touch it.

        Raises:
            InvalidArgument: a parameter has a gradient in one micro-batch and none in another, or one that no step takes; nothing
                was taken in or cleared.
        """
        self._live("accumulate()")
        params = self._parameters()
        found = {name: parameter.grad for name, parameter in params.items() if parameter.grad is not None}
        check_gradients(self.method.atoms, found, params)
        first = self._micro[0]
        if self._count and found.keys() != first.keys():
            odd = ", ".join(map(repr, sorted(found.keys() ^ first.keys())))
            raise InvalidArgument(
                f"accumulate() met other parameters with a gradient than in the first micro-batch: {odd}. Let every micro-batch of a "
                "step use the same parameters, or start anew with discard()."
            )
        mine = self._micro[self._count % 2]
        for name, gradient in found.items():
            # sums of many half-precision gradients would stand still
            wide = gradient.to(working_dtype(gradient.dtype))
            mine[name] = mine[name].add_(wide) if name in mine else wide.clone()
            params[name].grad = None
        self._count += 1

    def discard(self) -> None:
        """Forget the micro-batches that ``accumulate()`` has taken in since the last step."""
        self._micro, self._count = ({}, {}), 0

    def _live(self, what: str) -> None:
        if self._swapped:
            raise InvalidArgument(
                f"{what} was called inside averaged(), where the model holds the weights to evaluate. Leave the block first."
            )

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Callable[[], Any] | None = None,
        evidence: Evidence | None = None,
        value: Tensor | float | None = None,
    ) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients; its value is returned.
            evidence: R and a₀ of the batch, for a certified search: ``optimizer.method.evidence(...)``.
            value: the mean loss of the batch, one number, for ``explain()`` to tell predicted from realised decrease; a closure's
                own otherwise.

        Raises:
            NonFiniteGradient: with the weights untouched; on an accelerator at the first step after the device knows.
            InvalidArgument: the model holds averaged weights, or the multiplier is no number ≥ 0.
        """
        self._live("step()")
        rate = self.param_groups[0]["lr"]
        # multiplying weights by a 0-d tensor in place would look at it as well
        told = rate.item() if isinstance(rate, Tensor) and rate.ndim == 0 else rate
        if not (finite(told) and told >= 0):
            raise InvalidArgument(
                f"the multiplier param_groups[0]['lr'] of AGD is {rate!r}, which is not a finite number ≥ 0"
            )
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        self._look()
        loss = value if value is not None else returned if isinstance(returned, Tensor | float) else None
        try:
            self._move(float(told), evidence, loss)
        finally:
            self.discard()
        self._watch()
        return returned

    def _move(self, multiplier: float, evidence: Evidence | None, loss: Tensor | float | None) -> None:
        """Decide on a step, then write it over weights, momentum and average; nothing is written if deciding fails."""
        params = self._parameters()
        before = self.current
        grads, seen, part = self._gathered(params)
        move = self.method.decide(grads, seen, params, evidence, loss)
        if move.finite is None and not finite(multiplier * float(move.state.t)):
            raise InvalidArgument(
                f"the multiplier param_groups[0]['lr'] of AGD is {multiplier:g}, which takes a step to infinity"
            )
        for name, direction in move.directions.items():
            weight, factor, base = params[name], multiplier * move.factor(name, direction), direction.base
            if move.finite is not None:
                # NaN times 0 is NaN: what may not move is taken out of the direction, too
                base, factor = torch.where(move.finite, base, 0.0), torch.where(move.finite, factor, 0.0)
            if name in move.shrink:
                kept = (1 - multiplier * move.shrink[name]).clamp(min=0.0)
                weight.mul_(torch.where(move.finite, kept, 1.0) if move.finite is not None else kept)
            if weight.dtype == base.dtype:
                weight.addcmul_(base, factor)
            else:
                weight.add_((base * factor).to(weight.dtype))
        momentum = seen.momentum
        if self.method.momentum is not None:
            fresh = self.method.share(before, part)
            momentum = renewed(momentum, move.gradients, fresh, move.finite, in_place=True)
            if seen is not before and move.finite is not None:
                # a step left out leaves out what was absorbed for it
                momentum = {
                    name: torch.where(move.finite, value, before.momentum.get(name, torch.zeros_like(value)))
                    for name, value in momentum.items()
                }
        self.current = move.state._replace(momentum=momentum, due=multiplier * move.state.due)
        self._renew_average()

    def _gathered(self, params: dict[str, Tensor]) -> tuple[dict[str, Tensor | None], State, float]:
        """The gradient that measures, the state whose directions have seen the others, and the share that measures."""
        grads = {name: parameter.grad for name, parameter in params.items()}
        if not self._count:
            return grads, self.current, 1.0
        left = [name for name, gradient in grads.items() if gradient is not None]
        if left:
            raise InvalidArgument(
                f"step() met gradients of {', '.join(left)} after accumulate(), and gave up the micro-batches. Call accumulate() after "
                "every backward(), the last one too."
            )
        many = ((self._count + 1) // 2, self._count // 2)
        measuring, making = (
            {name: (total / count).to(params[name].dtype) for name, total in part.items()}
            for part, count in zip(self._micro, many, strict=True)
        )
        part = many[0] / self._count
        if not making or self.method.momentum is None:
            mean = {name: part * g + (1 - part) * making[name] if making else g for name, g in measuring.items()}
            return {**grads, **mean}, self.current, 1.0
        if self.method.nonfinite == "skip" or self.current.t.device.type != "cpu":
            # what spoils one half leaves the whole step out
            good = torch.stack([x.isfinite().all() for x in making.values()]).all()
            measuring = {name: torch.where(good, g, torch.nan) for name, g in measuring.items()}
        return {**grads, **measuring}, self.method.absorb(making, self.current, params, 1 - part), part

    # -- averaged weights ------------------------------------------------------------------------------------------------

    def _averaged(self) -> dict[str, Tensor]:
        """What is averaged: weights, and running statistics, which belong to them."""
        return {**self._parameters(), **dict(self._model.named_buffers())}

    def _renew_average(self) -> None:
        if self.averaging:
            count = int(self.current.clock)
            if self._average:
                average_(self._average, self._averaged(), count)
            else:
                self._average = averaged(None, self._averaged(), count)

    def averaged_state(self) -> dict[str, Tensor]:
        """The averaged weights and running statistics by name, as ``model.load_state_dict`` takes them: a copy.

        Raises:
            InvalidArgument: the optimizer keeps none.
        """
        if not self.averaging:
            raise InvalidArgument(
                "averaged weights were asked for, but AGD keeps none: averaging is False, or left out without momentum. "
                "Build it with averaging=True."
            )
        live = self._averaged()
        return {name: self._average.get(name, value).to(value.dtype).clone() for name, value in live.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the model holds the averaged weights, to evaluate or to save; the live ones return at its end.

        Raises:
            InvalidArgument: as ``averaged_state``, or inside another such block.
        """
        if self._swapped:
            raise InvalidArgument("averaged() was entered inside averaged(). Leave the first block before.")
        mean, live = self.averaged_state(), self._averaged()
        kept = {name: value.detach().clone() for name, value in live.items()}
        with torch.no_grad():
            for name, value in live.items():
                value.copy_(mean[name])
        self._swapped = True
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in live.items():
                    value.copy_(kept[name])
            self._swapped = False

    def explain(self) -> Explanation:
        """Why the last step was as long as it was, layer by layer; ``print`` it. Waits for the device."""
        return explain(self.method, self.current)

    def _watch(self) -> None:
        """On an accelerator, ask for the descents of this step without waiting for the answer."""
        device = self.current.descents.device
        if device.type != "cpu" and self.method.nonfinite == "raise" and self._watched is None:
            # only a copy into pinned memory leaves the host free
            landing = torch.empty_like(self.current.descents, device="cpu", pin_memory=True)
            arrived = torch.Event(device)
            self._watched = landing.copy_(self.current.descents, non_blocking=True), arrived
            arrived.record()

    def _look(self) -> None:
        if self._watched is not None and self._watched[1].query():
            descents, self._watched = self._watched[0], None
            self.method.check(self.current._replace(descents=descents))

    def __getstate__(self) -> dict[str, Any]:
        # torch's own lists what it copies and pickles, and would leave the method behind
        self._live("copying or pickling")
        mine = {name: getattr(self, name) for name in ("method", "current", "averaging", *_OWN)}
        return {**super().__getstate__(), **mine, "_watched": None}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._parameters().items()}

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with the last step's tensors under "agd", the averaged weights and what all belong to."""
        mine = {"agd": self.current._asdict(), "average": dict(self._average), "parameters": self._shapes()}
        return {**super().state_dict(), **mine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, whole or not at all; micro-batches that were being accumulated are given up.

        Raises:
            InvalidArgument: the state is another optimizer's, or another network's.
        """
        self._live("load_state_dict()")
        ours = isinstance(state_dict, dict) and {"agd", "average", "parameters", "state", "param_groups"} <= set(
            state_dict
        )
        if not ours or not isinstance(state_dict["agd"], dict) or set(state_dict["agd"]) != set(State._fields):
            raise InvalidArgument(
                "load_state_dict was given no state of AGD, or one of an older version. "
                "Load the state that AGD saved for the same network."
            )
        if state_dict["parameters"] != self._shapes():
            raise InvalidArgument(
                f"load_state_dict was given the state of a network with parameters {state_dict['parameters']}, but this one has "
                f"{self._shapes()}. Load the state that AGD saved for the same network."
            )
        wrong = self._complaint(state_dict)
        if wrong is not None:
            raise InvalidArgument(
                f"load_state_dict was given a state of AGD that cannot be: {wrong}. Load it as AGD saved it, or start anew."
            )
        saved, here = dict(state_dict["agd"]), self.current._asdict()
        weight_sized = {what: saved.pop(what) for what in WEIGHT_SIZED}
        if bool(weight_sized["momentum"]) and self.method.momentum is None:
            raise InvalidArgument(
                "load_state_dict was given the state of a method with momentum, but this one has none. Build AGD with the "
                "momentum that it was saved with."
            )
        device = here["eta"].device
        # copies: this optimizer writes over its own
        mine: dict[str, Any] = {
            what: {name: x.to(device, copy=True) for name, x in held.items()} for what, held in weight_sized.items()
        }
        mine |= {key: value.to(here[key]) for key, value in saved.items()}
        average = {name: value.to(device, copy=True) for name, value in state_dict["average"].items()}
        try:
            super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        # what torch raises where groups are not what it saved
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidArgument(f"load_state_dict could not take the parameter groups: {error}") from error
        self.current = State(**mine)  # pyright: ignore[reportArgumentType] (every field was looked at above)
        self._average = average
        self.discard()

    def _complaint(self, state_dict: dict[str, Any]) -> str | None:
        """Why a state cannot be restored, as a clause."""
        saved, shapes = state_dict["agd"], self._shapes()
        wrong = complaint(saved, self.current)
        for what in WEIGHT_SIZED:
            wrong = wrong or odd_tensors(what, saved[what], shapes) or not_finite(what, saved[what])
        live = self._averaged()
        average = state_dict["average"]
        floating = {name: tuple(value.shape) for name, value in live.items() if value.is_floating_point()}
        wrong = wrong or odd_tensors("average", average, floating) or not_finite("average", average)
        if wrong is None and average and average.keys() != live.keys():
            wrong = f"its average lacks {', '.join(map(repr, sorted(live.keys() - average.keys())))}"
        groups = state_dict["param_groups"]
        if wrong is None and not (
            isinstance(groups, list) and groups and isinstance(groups[0], dict) and "lr" in groups[0]
        ):
            wrong = "its parameter groups hold no lr"
        return wrong
