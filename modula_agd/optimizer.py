"""The ``torch.optim.Optimizer`` face of the engine, for training loops in the usual style."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from modula_agd import memory
from modula_agd.accumulation import MicroBatches
from modula_agd.agd import agd
from modula_agd.bridge.bridged import Bridged, from_torch
from modula_agd.curvature import mean_multiple
from modula_agd.error import InvalidArgument
from modula_agd.exchange import ALONE
from modula_agd.explanation import Explanation, explain, scalars
from modula_agd.grouped import Now, Rates
from modula_agd.holder import holder, outside, parameters, refuse, unwrapped
from modula_agd.inspection import check_gradients
from modula_agd.lending import Lending
from modula_agd.loss import Loss
from modula_agd.majorisation import Evidence
from modula_agd.many import cast, is_finite, unless, unless_
from modula_agd.method import Method
from modula_agd.move import Move
from modula_agd.placement import data_parallel, exchange_of, local, local_gradient, reshard, skips_reduction
from modula_agd.space import finite
from modula_agd.state import WEIGHT_SIZED, State
from modula_agd.torch_module import TorchModule


class AGD(Lending):
    """Automatic gradient descent on a model made by ``network.to_torch()``, or on any ``torch.nn.Module`` with ``example_inputs``.

    ``lr`` of a parameter group multiplies the derived step of its parameters. It is 1 and needs no tuning; it is there for
    schedulers and monitors that expect it.

    Args:
        model: a network's ``torch.nn`` face, or a module that holds one, such as ``DistributedDataParallel``; also after
            ``fully_shard`` (docs/distributed.md); with a ready method any module whose parameters have the
            names of the method's network.
        loss: what is minimised, or a ``Method`` built beforehand.
        example_inputs: a batch as the model's forward takes it (a tensor, a tuple, or a dictionary of named arguments), for a model
            in plain ``torch.nn``: it is captured by ``from_torch``, once, here.
        output: which of that model's outputs the loss is taken of, as for ``from_torch``.
        groups: parameters to train, as torch's optimizers take them: tensors, pairs of name and tensor, names, or dictionaries with
            "params" and an "lr" of their own. All of the network's by default.
        averaging: whether to keep averaged weights (one buffer of the weights' size), for ``averaged()`` and to tell which weights lag
            behind them and are stretched; by default where there is momentum.
        maximize: whether what is differentiated is the negative of the loss, to be maximised: gradients and values told change sign.
        capturable: whether ``step`` may be captured in a graph and replayed: all that changes stays where it is, and nothing is
            decided on the host.
        share_directions: whether each direction is made on one rank and sent to the others, rather than on every rank; by default
            where ``DistributedDataParallel`` is given. Sharded weights always share.
        options: as for ``agd``.

    Raises:
        SpaceMismatch: the model declares no bounds.
        InvalidArgument: an option is none of ``agd``, or does not go with another.
    """

    _own = (*Lending._own, "_outside", "_frozen", "_micro", "_replicas", "_exchange")

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Method,
        groups: Iterable[Any] | None = None,
        *,
        example_inputs: Any = None,
        output: str | int | Callable[[Any], Tensor] | None = None,
        averaging: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        share_directions: bool | None = None,
        **options: Any,
    ) -> None:
        ready = loss if isinstance(loss, Method) else None
        _check_options(ready, options)
        if example_inputs is not None:
            if isinstance(loss, type) or not isinstance(loss, Loss):
                raise InvalidArgument(
                    f"AGD was given example_inputs and {type(loss).__name__}. They are for AGD to capture the model and build the method: "
                    "pass a loss of modula_agd such as CrossEntropy(), or leave them out with a ready method."
                )
            if isinstance(model, nn.Module) and any(isinstance(part, TorchModule) for part in model.modules()):
                raise InvalidArgument(
                    "AGD was given example_inputs and a model made by to_torch(), which declares its bounds itself. Leave them out."
                )
            network = from_torch(unwrapped(model), example_inputs, output=output, scores=loss.max_norm)
            ready = agd(network, loss, **options)  # pyright: ignore
        self._inner = holder(model, ready)
        network = self._inner.network if isinstance(self._inner, TorchModule) else None
        self.method = ready or agd(network, loss, **options)  # pyright: ignore
        if network is not None and self.method.network != network:
            raise InvalidArgument(
                f"AGD was given a method built for a network with parameters {sorted(self.method.atoms)}, {self.method.network!r}, "
                f"but a model of {network!r}. Build the method for the model's network."
            )
        for name, flag in (("averaging", averaging), ("maximize", maximize), ("capturable", capturable)):
            if flag is not None and not isinstance(flag, bool):
                raise InvalidArgument(f"AGD was given {name}={flag!r}, which must be True or False")
        self.averaging = self.method.momentum is not None if averaging is None else averaging
        if options.get("stretch") == "measured" and not self.averaging:
            raise InvalidArgument(
                "AGD was given stretch='measured' with averaging=False, but what lags is told by averaged weights. Leave one of them out."
            )
        self.maximize = maximize
        self.capturable = capturable
        params = parameters(self._inner, self.method.atoms)
        if capturable and self._lasting():
            raise InvalidArgument(
                f"AGD was given capturable=True, but directions of {', '.join(self._lasting())} serve several steps, and which are due "
                "is decided on the host. Pass refresh=1."
            )
        self._replicas = data_parallel(model)
        self._exchange = exchange_of(params, self._replicas, share_directions)
        self._agree(next(iter(params.values())).device)
        self._outside = outside(model, self._inner, self.method.atoms)
        self._frozen = [name for name, atom in self.method.atoms.items() if getattr(atom, "frozen", False)]
        self._now, self._micro = Now(), MicroBatches()
        start = self.method.init(params)._asdict()
        if groups is not None:
            groups = [groups] if isinstance(groups, dict | Tensor | str) else list(groups)
            groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        super().__init__(groups or [{"params": list(params.items())}], {"lr": 1.0})
        buffers = {name: value.clone() for name, value in self._statistics().items()} if self.averaging else {}
        numbers = {name: start[name].clone() for name in memory.NUMBERS}
        seen = {"measured": self.method.network.measured()} if isinstance(self.method.network, Bridged) else {}
        self.param_groups[0]["agd"] = {"format": memory.FORMAT, **numbers, "buffers": buffers, **seen}

    def _agree(self, device: torch.device) -> None:
        """Let ranks that captured a model on examples of their own go by the mean of what they measured."""
        network = self.method.network
        if isinstance(network, Bridged) and self._exchange is not ALONE:
            mine = network.measured().to(device)
            agreed = self._exchange.means({"measured": mine})["measured"]
            self._remeasure(network.with_measured(agreed))

    def _remeasure(self, network: Bridged) -> None:
        self.method = replace(self.method, network=network, _plans={})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, whole or not at all; micro-batches that were being accumulated are given up.

        A captured model goes on with what was measured when the state was saved.

        Raises:
            InvalidArgument: the state is another optimizer's, another network's or a newer version's.
        """
        network, measured = self.method.network, memory.measured(state_dict)
        # what does not fit is refused before anything is loaded
        seen = network.with_measured(measured) if isinstance(network, Bridged) and measured is not None else None
        super().load_state_dict(state_dict)
        if seen is not None:
            self._remeasure(seen)

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
        params = self._trained()
        found = {name: parameter.grad for name, parameter in params.items() if parameter.grad is not None}
        check_gradients(self.method.atoms, found, params)
        sign = -1 if self.maximize else 1
        mine = {name: sign * local_gradient(gradient, params[name]) for name, gradient in found.items()}
        self._micro.take(mine, reduced=not skips_reduction(self._replicas))
        for name in found:
            params[name].grad = None

    def discard(self) -> None:
        """Forget the micro-batches that ``accumulate()`` has taken in since the last step."""
        self._micro.clear()

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
            InvalidArgument: the model holds averaged weights, a multiplier is no number ≥ 0, or a parameter that the network does not
                know has a gradient.
        """
        self._live("step()")
        rates = self._rates()
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        self._look()
        loss = value if value is not None else returned if isinstance(returned, Tensor | float) else None
        try:
            self._move(rates, evidence, loss)
        finally:
            self.discard()
        self._watch()
        return returned

    def _move(self, rates: Rates, evidence: Evidence | None, loss: Tensor | float | None) -> None:
        """Decide on a step, then write it over weights, momentum, lead and average; nothing is written if deciding fails."""
        whole, trained = self._parameters(), self._trained()
        odd = [name for name, parameter in self._outside if parameter.grad is not None]
        if odd:
            raise InvalidArgument(
                f"step() met gradients of {', '.join(odd)}, which the network does not know and AGD would leave as they are. Compose them "
                "into the network, freeze them, or pass AGD the part of the model that it trains and give these to another optimizer."
            )
        trapped = [name for name in self._frozen if name in trained and trained[name].grad is not None]
        if trapped:
            raise InvalidArgument(
                f"step() met gradients of {', '.join(trapped)}, which required none when the model was captured, and are a fixed part of "
                "the network since. Build AGD anew after unfreezing, or capture first and freeze then."
            )
        self._follow()
        before, params = _held(self.current), {name: local(parameter) for name, parameter in whole.items()}
        grads = {name: _gradient(trained.get(name)) for name in params}
        if self.maximize:
            grads = {name: None if gradient is None else -gradient for name, gradient in grads.items()}
            loss = None if loss is None else -loss
        grads, seen, part = self._micro.gathered(self.method, before, params, grads, self._exchange)
        held = {name: local(value) for name, value in self._averages().items() if name in params}
        move = self.method.decide(grads, seen, params, evidence, loss, self._exchange, part, held)
        allowed, multipliers = _allowed(move, rates), self._by_name(rates)
        applied = self._applied(move, multipliers)
        factors, shares = move.factors(applied, allowed)
        same = {
            n: params[n].dtype for n, u in move.directions.items() if n in shares and params[n].dtype == u.base.dtype
        }
        shares |= cast({name: shares[name] for name in same}, same)
        for name in move.gradients:
            entry = self.state[whole[name]]
            begun = entry.get("begun")
            self._allocate(name, whole[name], moves=True)
            if not begun and "average" in entry:
                # weights may have been loaded since it was made
                local(entry["average"]).copy_(params[name])
            entry["begun"] = 1
        for name, direction in move.directions.items():
            weight, base, factor, share = params[name], direction.base, factors[name], shares.get(name)
            if allowed is not None and name in move.unsure:
                # NaN times 0 is NaN: what may not move is taken out of the direction, too
                base, factor = torch.where(allowed, base, 0.0), torch.where(allowed, factor, 0.0)
            if weight.dtype == base.dtype:
                if share is not None:
                    weight.addcmul_(weight, share, value=-1)
                weight.addcmul_(base, factor)
            else:
                # a small share is lost where it is rounded by itself
                update = base * factor if share is None else base * factor - share * weight
                weight.add_(update.to(weight.dtype))
        past = self.method.counted(seen, move.gradients, part, move.finite, in_place=True)
        if seen is not before and move.finite is not None:
            # a step left out leaves out what was absorbed for it
            past = {what: unless(move.finite, getattr(before, what), new) for what, new in past.items()}
            weights = torch.where(move.finite, move.state.mean_weights, before.mean_weights)
            move = move._replace(state=move.state._replace(mean_weights=weights))
        past["directions"] = unless_(move.finite, before.directions, move.state.directions, move.unsure)
        due = move.state.due * self._reached(move, multipliers, applied)
        if allowed is not None:
            due, applied = torch.where(allowed, due, 0.0), torch.where(allowed, applied, 0.0)
        self.current = move.state._replace(**past, due=due, rates=applied)
        self._now.applied = multipliers
        self._renew_average()
        reshard(self._inner)

    def _reached(self, move: Move, multipliers: Mapping[str, float | Tensor], applied: Tensor) -> Tensor | float:
        """What the step's multipliers make of the slope that it was to use up: their mean, weighed by what each weight gives."""
        if len({rate if isinstance(rate, float) else id(rate) for rate in multipliers.values()}) <= 1:
            return next(iter(multipliers.values()), 1.0)
        return mean_multiple(applied, self.method.gains(move.state) * move.state.stretches)

    def _applied(self, move: Move, multipliers: Mapping[str, float | Tensor]) -> Tensor:
        """The multiplier of each parameter, 0 of one that is in no group."""
        like, rates = move.state.portions, [multipliers.get(name, 0.0) for name in self.method.atoms]
        numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
        if len(numbers) == len(rates) and len(set(numbers)) == 1:
            # nothing to upload
            return torch.full_like(like, numbers[0])
        return torch.stack([torch.as_tensor(rate, dtype=like.dtype, device=like.device) for rate in rates])

    def _forget(self) -> None:
        self.discard()
        self._now.applied = {}

    # -- what it tells ---------------------------------------------------------------------------------------------------

    def explain(self) -> Explanation:
        """Why the last step was as long as it was, layer by layer; ``print`` it. Waits for the device."""
        rates = {name: float(rate) for name, rate in self._now.applied.items()}
        return explain(self.method, _held(self.current), rates, self._exchange)

    def scalars(self) -> dict[str, float]:
        """The last step in numbers, for a logger: η, the descent, predicted and realised decrease, the relative step of each weight.

        Waits for the device, once.
        """
        return scalars(self.method, self.current, self._now.applied)

    def _watch(self) -> None:
        """On an accelerator, ask for the descents of this step without waiting for the answer."""
        descents = self.param_groups[0]["agd"]["descents"]
        if descents.device.type == "cpu" or self.method.skips or self.capturable or self._now.watched is not None:
            return
        # only a copy into pinned memory leaves the host free
        landing = torch.empty_like(descents, device="cpu", pin_memory=True)
        arrived = torch.Event(descents.device)
        self._now.watched = landing.copy_(descents, non_blocking=True), arrived
        arrived.record()

    def _look(self) -> None:
        if self._now.watched is not None and self._now.watched[1].query():
            descents, self._now.watched = self._now.watched[0], None
            # all of it on the host already: the sizes of now are on the device, and may be of a later step
            self.method.check(self.current._replace(descents=descents, sizes=torch.ones_like(descents)))


def _held(state: State) -> State:
    """A state with what this process holds of its tensors."""
    return state._replace(
        **{what: {name: local(x) for name, x in getattr(state, what).items()} for what in WEIGHT_SIZED}
    )


def _gradient(parameter: Tensor | None) -> Tensor | None:
    """What this process holds of a parameter's gradient."""
    if parameter is None or parameter.grad is None:
        return None
    return local_gradient(parameter.grad, parameter)


def _check_options(ready: Method | None, options: Mapping[str, Any]) -> None:
    """Raise ``InvalidArgument`` for options that AGD does not take."""
    if "lr" in options:
        raise InvalidArgument(
            "AGD was given a learning rate, but derives its step from the network and the loss. Leave lr out; a multiplier "
            "of the derived step, 1.0 by default, is param_groups[0]['lr']."
        )
    known = signature(agd).parameters.keys() - {"network", "loss"}
    refuse({name: value for name, value in options.items() if name not in known}, "AGD")
    unknown = sorted(options.keys() - known)
    if unknown:
        raise InvalidArgument(
            f"AGD was given {', '.join(unknown)}, which it does not know; its options are {', '.join(sorted(known))}"
        )
    if ready is not None and options:
        raise InvalidArgument(
            f"AGD was given a ready method and the options {sorted(options)}. Pass them to agd() instead."
        )


def _allowed(move: Move, rates: Rates) -> Tensor | None:
    """Whether anything may move, where that is for the device to say; None where it was looked at.

    Raises:
        InvalidArgument: a multiplier takes a step to infinity.
    """
    allowed, t = move.finite, move.state.t
    for rate in rates:
        if isinstance(rate, Tensor):
            good = ((rate >= 0) & is_finite(rate * t)).to(t.device)
            allowed = good if allowed is None else allowed & good
        elif move.finite is None and not finite(rate * float(t)):
            raise InvalidArgument(f"the multiplier 'lr' of AGD is {rate:g}, which takes a step to infinity")
    return allowed
