"""The ``torch.optim.Optimizer`` face of the engine, for training loops in the usual style."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modula_agd.agd import agd
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.loss import Loss
from modula_agd.majorisation import Evidence
from modula_agd.method import Method
from modula_agd.space import finite
from modula_agd.state import State, complaint, odd_momentum
from modula_agd.torch_module import TorchModule


class AGD(torch.optim.Optimizer):
    """Automatic gradient descent on a model made by ``network.to_torch()``.

    ``lr`` in the parameter group multiplies the derived step. It is 1 and needs no tuning; it is there for schedulers and
    monitors that expect it.

    Args:
        model: a network's ``torch.nn`` face.
        loss: what is minimised, or a ``Method`` built beforehand.
        options: as for ``agd``.
    """

    def __init__(self, model: nn.Module, loss: Loss | Method, **options: Any) -> None:
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
    def step(self, closure: Callable[[], Any] | None = None, evidence: Evidence | None = None) -> Any:  # pyright: ignore
        """Move every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients; its value is returned.
            evidence: R and a₀ of the batch, for a certified search: ``optimizer.method.evidence(...)``.

        Raises:
            NonFiniteGradient: with the weights untouched; on an accelerator at the first step after the device knows.
        """
        rate = self.param_groups[0]["lr"]
        # multiplying weights by a 0-d tensor in place would look at it as well
        told = rate.item() if isinstance(rate, Tensor) and rate.ndim == 0 else rate
        if not (finite(told) and told >= 0):
            raise InvalidArgument(
                f"the multiplier param_groups[0]['lr'] of AGD is {rate!r}, which is not a finite number ≥ 0"
            )
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        self._look()
        params = self._parameters()
        grads = {name: parameter.grad for name, parameter in params.items()}
        updates, self.current = self.method.update(grads, self.current, params, evidence)
        for name, update in updates.items():
            params[name].add_(update, alpha=told)  # pyright: ignore[reportArgumentType] (looked at above)
        self._watch()
        return value

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
        mine = {"method": self.method, "_names": self._names, "current": self.current, "_watched": None}
        return {**super().__getstate__(), **mine}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._parameters().items()}

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with the last step's tensors under "agd" and what they belong to under "parameters"."""
        return {**super().state_dict(), "agd": self.current._asdict(), "parameters": self._shapes()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            InvalidArgument: the state is another optimizer's, or another network's.
        """
        ours = isinstance(state_dict, dict) and {"agd", "parameters", "state", "param_groups"} <= set(state_dict)
        if not ours or set(state_dict["agd"]) != set(State._fields):
            raise InvalidArgument(
                "load_state_dict was given no state of AGD. Load the state that AGD saved for the same network."
            )
        if state_dict["parameters"] != self._shapes():
            raise InvalidArgument(
                f"load_state_dict was given the state of a network with parameters {state_dict['parameters']}, but this one has "
                f"{self._shapes()}. Load the state that AGD saved for the same network."
            )
        saved, here = dict(state_dict["agd"]), self.current._asdict()
        wrong = complaint(saved, self.current) or odd_momentum(saved["momentum"], self._shapes())
        if wrong is not None:
            raise InvalidArgument(
                f"load_state_dict was given a state of AGD that cannot be: {wrong}. Load it as AGD saved it, or start anew."
            )
        momentum = saved.pop("momentum")
        if bool(momentum) and self.method.momentum is None:
            raise InvalidArgument(
                "load_state_dict was given the state of a method with momentum, but this one has none. Build AGD with the "
                "momentum that it was saved with."
            )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        device = here["eta"].device
        self.current = State(
            **{key: value.to(here[key]) for key, value in saved.items()},
            momentum={name: value.to(device) for name, value in momentum.items()},
        )
