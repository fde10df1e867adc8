"""What passes through a network beside the data: a ``Step`` when bounds are asked for, a ``Run`` when values are.

Modules hold no state. Running statistics of a batch norm come in and go out as *buffers*, and the randomness of a dropout
comes from a generator that the caller passes; both travel in the ``Run``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from modula_agd.bound import Constant, Gain, Number
from modula_agd.norm import Norm

Constants = Literal["typical", "proved"]
Role = Literal["matrix", "vector", "logits"]
"""What a parameter is to rules that tell kinds apart, such as a decay: a bias or a gain is a vector, whatever its shape; a last layer
makes logits; all else is a matrix."""
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """The step whose effect a bound follows through a network.

    Args:
        t: relative step of an atom of mass 1, ≥ 0; a number or a tensor of any shape.
        constants: which Lipschitz constants to use, mean-field ("typical") or worst-case ("proved").
        sizes: upper bounds of the current weight norms by parameter name; an absent one has its declared size.
    """

    t: Number = 0.0
    constants: Constants = "typical"
    sizes: Mapping[str, Number] = field(default_factory=dict)

    def constant(self, gain: Gain) -> Constant:
        """The constant to use of the two."""
        return gain.proved if self.constants == "proved" else gain.typical


@dataclass(frozen=True)
class Run:
    """One pass of a batch.

    Args:
        training: whether statistics are the batch's own and dropout is on.
        generator: source of dropout's masks, on the batch's device.
        buffers: running statistics by name, read in evaluation and renewed in training.
        renewed: where a training pass leaves the new running statistics.
    """

    training: bool = False
    generator: torch.Generator | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    renewed: dict[str, Tensor] = field(default_factory=dict)


EVALUATION = Run()


@runtime_checkable
class Weighted(Protocol):
    """What all that knows no layer needs of an atom (``layer.Atom`` documents each)."""

    @property
    def mass(self) -> float: ...
    @property
    def size(self) -> float: ...
    @property
    def floor(self) -> float: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def norm(self) -> Norm: ...
    @property
    def role(self) -> Role: ...
    def draw(self, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor: ...
