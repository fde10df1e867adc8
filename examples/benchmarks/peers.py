"""The optimizers of the study, each behind one small interface.

A peer runs with the settings that its README gives, or over a grid of learning rates, without or with the schedule that
the task's references use (5% of warm-up, then a cosine to a tenth).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import _muon as _muon_module

from modula_agd import AGD, ClosedForm, Fading, Loss, RowNorm, agd, published
from modula_agd.torch_module import TorchModule

Steps = int


class Runner:
    """One optimizer on one model.

    Args:
        optimizers: stepped in turn.
        schedule: the factor of every learning rate at a step.
        averaged: a context in which the model holds the weights to evaluate; the live ones where left out.
        after: called after each step.
        capturable: whether a step asks nothing of the host, so that a CUDA graph may hold it.
    """

    def __init__(
        self,
        optimizers: list[Any],
        schedule: Callable[[int], float] | None = None,
        averaged: Callable[[], Any] = nullcontext,
        after: Callable[[], None] | None = None,
        capturable: bool = False,
    ) -> None:
        self.optimizers, self.schedule, self.averaged, self.after = optimizers, schedule, averaged, after
        self.capturable = capturable
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.seconds: list[float] = []
        """What each step took the host; a graph's replay is not counted here."""

    def step(self, index: int) -> None:
        """Move the weights by their gradients."""
        start = time.perf_counter()
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            if self.schedule is not None:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * self.schedule(index)
            optimizer.step()
        if self.after is not None:
            self.after()
        self.seconds.append(time.perf_counter() - start)

    def numbers(self) -> int:
        """Numbers held between steps."""
        return sum(_numbers(optimizer.state_dict()) for optimizer in self.optimizers)


def _numbers(state: dict[str, Any]) -> int:
    from torch.utils._pytree import tree_leaves

    return sum(leaf.numel() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def cosine(steps: int) -> Callable[[int], float]:
    """5% of linear warm-up, then a cosine to a tenth."""
    warm = max(1, steps // 20)

    def factor(index: int) -> float:
        if index < warm:
            return (index + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (index - warm) / max(1, steps - warm)))

    return factor


Make = Callable[[TorchModule, "Request"], Runner]


@dataclass(frozen=True)
class Request:
    """What a peer is built for.

    Args:
        task: name of the task.
        loss: what is minimised.
        lr: a learning rate; None for the peer's own default.
        schedule: "constant" or "cosine".
        steps: of the whole run.
        options: of this library's own methods, or AdamW's.
    """

    task: str
    loss: Loss
    lr: float | None
    schedule: str
    steps: int
    options: dict[str, Any]

    @property
    def factor(self) -> Callable[[int], float] | None:
        return cosine(self.steps) if self.schedule == "cosine" else None

    def rate(self) -> dict[str, float]:
        return {} if self.lr is None else {"lr": self.lr}


def _torch(kind: Any, **settings: Any) -> Make:
    def make(model: TorchModule, request: Request) -> Runner:
        return Runner([kind(model.parameters(), **settings, **request.rate())], request.factor)

    return make


def _adamw(model: TorchModule, request: Request) -> Runner:
    # nanoGPT's settings where a rate is searched for (the references' too); torch's own by default
    tuned = request.lr is not None and request.task.startswith("chargpt")
    settings: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.1} if tuned else {}
    settings |= request.options | request.rate()
    return Runner([torch.optim.AdamW(model.parameters(), **settings)], request.factor)


def _quintic(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's iteration (Jordan et al. 2024) in float32: torch's own is in bfloat16, which a CPU emulates, many times slower."""
    a, b, c = coefficients
    x = grad if grad.shape[0] <= grad.shape[1] else grad.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if grad.shape[0] <= grad.shape[1] else x.T


class _Flat(torch.optim.Muon):
    """torch's Muon on kernels too, each as the matrix [out, in·k]: it takes two dimensions alone."""

    def __init__(self, parameters: list[nn.Parameter], **settings: Any) -> None:
        self.pairs = [(p, nn.Parameter(p.detach().flatten(1))) for p in parameters]
        super().__init__([flat for _, flat in self.pairs], **settings)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter, flat in self.pairs:
            flat.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        original = _muon_module._zeropower_via_newtonschulz
        try:
            if self.pairs[0][1].device.type == "cpu":
                _muon_module._zeropower_via_newtonschulz = _quintic
            super().step(closure)
        finally:
            _muon_module._zeropower_via_newtonschulz = original


def _muon(model: TorchModule, request: Request) -> Runner:
    """Muon for hidden matrices, AdamW for embeddings, heads, biases; where a rate is searched for, one for both."""
    atoms = model.network.weights()
    named = dict(model.named_parameters())
    hidden = [p for n, p in named.items() if p.ndim >= 2 and not isinstance(atoms[n].norm, RowNorm)]
    others = [p for n, p in named.items() if not any(p is q for q in hidden)]
    settings: dict[str, Any] = {} if request.lr is None else {"adjust_lr_fn": "match_rms_adamw", "lr": request.lr}
    optimizers: list[Any] = [_Flat(hidden, **settings)]
    if others:
        optimizers.append(torch.optim.AdamW(others, **request.rate()))
    return Runner(optimizers, request.factor)


def _schedule_free(model: TorchModule, request: Request) -> Runner:
    import schedulefree

    # its README: warm-up is advised; it names no number, and 5% of the steps is what the schedules here have
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), warmup_steps=request.steps // 20, **request.rate())
    optimizer.train()

    @contextmanager
    def averaged() -> Iterator[None]:
        optimizer.eval()
        yield
        optimizer.train()

    return Runner([optimizer], None, averaged)


def _prodigy(model: TorchModule, request: Request) -> Runner:
    from prodigyopt import Prodigy

    # its README: lr 1, and cosine annealing recommended
    return Runner([Prodigy(model.parameters(), lr=1.0)], request.factor)


def _dadapt(model: TorchModule, request: Request) -> Runner:
    from dadaptation import DAdaptAdam

    # its README: lr 1, with the schedule one would use otherwise
    return Runner([DAdaptAdam(model.parameters(), lr=1.0)], request.factor)


def _dog(layerwise: bool) -> Make:
    def make(model: TorchModule, request: Request) -> Runner:
        from dog import DoG, LDoG, PolynomialDecayAverager

        # its README: averaging is essential; 1e-4 instead of 1e-6 with batch norm
        relative = {"reps_rel": 1e-4} if any(True for _ in model.buffers()) else {}
        optimizer = (LDoG if layerwise else DoG)(model.parameters(), **relative)
        averager = PolynomialDecayAverager(model)

        @contextmanager
        def averaged() -> Iterator[None]:
            live = {name: value.detach().clone() for name, value in model.state_dict().items()}
            model.load_state_dict(averager.averaged_model.state_dict())
            yield
            model.load_state_dict(live)

        return Runner([optimizer], None, averaged, averager.step)

    return make


def _ours(**settings: Any) -> Make:
    def make(model: TorchModule, request: Request) -> Runner:
        options = settings | request.options
        if options.get("search") == "closed form":
            options["search"] = ClosedForm()
        graphed = _on_cuda(model) and request.factor is None
        optimizer = AGD(model, agd(model.network, request.loss, **options), averaging=True, capturable=graphed)
        optimizer.param_groups[0]["lr"] = 1.0 if request.lr is None else request.lr
        return Runner([optimizer], request.factor, optimizer.averaged, capturable=graphed)

    return make


def _published(model: TorchModule, request: Request) -> Runner:
    graphed = _on_cuda(model)
    return Runner([AGD(model, published(model.network, request.loss), capturable=graphed)], capturable=graphed)


def _on_cuda(model: TorchModule) -> bool:
    return next(model.parameters()).is_cuda


OURS, FADING = "held-out", "fading"
OWN = (OURS, FADING)
"""This library's default, and the same with ``decay=Fading()``."""
PEERS: dict[str, Make] = {
    OURS: _ours(),
    FADING: _ours(decay=Fading()),
    "agd": _published,
    "sgd": _torch(torch.optim.SGD, momentum=0.9),
    "adam": _torch(torch.optim.Adam),
    "adamw": _adamw,
    "muon": _muon,
    "schedulefree": _schedule_free,
    "prodigy": _prodigy,
    "dadapt": _dadapt,
    "dog": _dog(False),
    "ldog": _dog(True),
}
GRIDS = ("sgd", "adam", "muon")
"""Optimizers whose learning rate is searched for; on chargpt AdamW takes Adam's place, as in the references."""
SCHEDULED = ("prodigy", "dadapt")
"""Peers whose READMEs ask for a schedule."""
