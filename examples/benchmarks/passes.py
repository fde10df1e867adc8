"""A training step of the study: forward, loss, backward and the optimizer's step; on CUDA replayed as one graph.

Networks as small as the study's leave an accelerator waiting for the host between kernels; a CUDA graph launches all kernels of a
step at once. This library's step is captured too, which asks no question of the host; other optimizers are stepped as they come.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peers import Runner
from torch import Tensor

WARM_UP = 5
"""Steps that are made one kernel at a time before the capture: libraries choose their kernels, and states come to be."""


class TrainingStep:
    """Trains a model on one batch after another.

    Args:
        model: in training mode, on its device.
        objective: the loss of outputs and labels, 0-d.
        runner: the optimizer.
        half: whether to compute in bfloat16 what autocast takes to it, and keep images channels-last.
    """

    def __init__(
        self, model: torch.nn.Module, objective: Callable[[Tensor, Tensor], Tensor], runner: Runner, half: bool = False
    ) -> None:
        self.model, self.objective, self.runner, self.half = model, objective, runner, half
        self.device = next(model.parameters()).device
        self.graph: Any = None
        self.done = 0

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Make a step; the loss of the batch before it and the share of labels met, both 0-d and on the device."""
        if self.half and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if self.device.type != "cuda":
            return self._step(inputs, labels)
        if self.done < WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found = self._step(inputs, labels)
            torch.cuda.current_stream().wait_stream(side)
            return found
        if self.graph is None:
            self._capture(inputs, labels)
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self.graph.replay()
        if not self.captures:
            self.runner.step(self.done)
        self.done += 1
        return self.found

    @property
    def captures(self) -> bool:
        """Whether the optimizer's step is part of the graph."""
        return self.device.type == "cuda" and self.runner.capturable

    def precision(self) -> Any:
        """The context that a forward pass is made in."""
        if not self.half:
            return nullcontext()
        # a graph would keep the casts that another pass made
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def _pass(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for parameter in self.model.parameters():
            parameter.grad = None
        with self.precision():
            outputs = self.model(inputs)
        value = self.objective(outputs.float() if self.half else outputs, labels)
        value.backward()
        return value.detach(), (outputs.detach().argmax(-1) == labels).float().mean()

    def _step(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = self._pass(inputs, labels)
        self.runner.step(self.done)
        self.done += 1
        return found

    def _capture(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs.clone(), labels.clone()
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # another thread may look after pinned memory meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.found = self._pass(self.inputs, self.labels)
            if self.captures:
                self.runner.step(self.done)
