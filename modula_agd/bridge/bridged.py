"""The bridge: a ``torch.nn.Module`` that knows nothing of bounds, as a network that declares them, over the same parameters."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from modula_agd.bound import Bound
from modula_agd.bridge.capture import Captured, arguments, capture, chosen, in_mode
from modula_agd.bridge.declare import rule_of
from modula_agd.bridge.flow import Flow, propagate
from modula_agd.bridge.leaf import Leaf, leaves
from modula_agd.bridge.operators import UNMOVED
from modula_agd.bridge.scores import score_nodes
from modula_agd.bridge.weights import Weight, declared, uses
from modula_agd.curvature import slack
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.network import Network
from modula_agd.run import EVALUATION, Parameters, Run, Step, Weighted
from modula_agd.space import Features, Image, Logits, Sequence, Space, Volume, brief

REVISION = 2.0
"""Of what the norms measure, the first of what a checkpoint keeps; raised when a parameter's norm changes."""


@dataclass(frozen=True, eq=False, repr=False)
class Bridged(Network):
    """A captured model; made by ``from_torch``.

    Args:
        model: the model, whose own forward is what is applied.
        choose: which of its outputs counts.
        graph: what was captured of it.
        ends: the space of its outputs.
        declarations: each parameter's.
        ratios: what a parameter's size is multiplied with in each use.
    """

    model: nn.Module
    choose: Any
    graph: Captured
    ends: Space
    declarations: Mapping[str, Weight]
    ratios: Mapping[tuple[str, str], float]
    captured: ClassVar[bool] = True

    @property
    def domain(self) -> Space | None:
        """None: a captured model takes what its forward takes, of which no norm is declared."""
        return None

    @property
    def codomain(self) -> Space | None:
        return self.ends

    def bind(self, domain: Space) -> Self:
        raise SpaceMismatch(f"{self!r} was bound to {domain}, but takes whatever its forward takes")

    @cached_property
    def _corrections(self) -> dict[Any, float]:
        """Filled by the first bound, which is that of the example and of the declared sizes."""
        found: dict[Any, float] = {}
        self._propagated(Step(), found)
        return found

    def _propagated(self, step: Step, corrections: dict[Any, float]) -> Bound:
        flow = Flow(self.graph, self.declarations, self.ratios, self._leaves, self._scores, step, corrections)
        return propagate(flow, rule_of, UNMOVED)

    @property
    def curvature_slack(self) -> float:
        """By the example: scores of classes are near 0 at first, and have yet to come to what they count as."""
        if not isinstance(self.ends, Logits):
            return 1.0
        seen = self.graph.peaks.get(self.graph.output, 0.0)
        size = seen[0] if isinstance(seen, tuple) else seen
        return slack(size)

    @cached_property
    def _leaves(self) -> dict[str, Leaf]:
        return leaves(self.graph)

    @cached_property
    def _scores(self) -> frozenset[str]:
        return score_nodes(self.graph) if isinstance(self.ends, Logits) else frozenset()

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Tensor:
        args, kwargs = arguments(x)
        kept = {
            name: value.detach().clone() for name, value in {**dict(self.model.named_buffers()), **run.buffers}.items()
        }
        with in_mode(self.model, training=run.training):
            result = functional_call(self.model, {**params, **kept}, args, kwargs)
        if run.training:
            run.renewed.update(kept)
        return chosen(result, self.choose, self.model)

    def buffers(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, path: str = ""
    ) -> dict[str, Tensor]:
        """The model's own buffers as they are, copied."""
        return {name: value.detach().clone() for name, value in self.model.named_buffers()}

    def propagate(self, x: Any, step: Step, path: str = "") -> Bound:
        return self._propagated(step, self._corrections)

    def atoms(self, path: str = "") -> Iterator[tuple[str, Weighted]]:
        yield from self.declarations.items()

    def with_mass(self, mass: float) -> Self:
        return self.massed({name: mass * weight.mass for name, weight in self.declarations.items()})

    def massed(self, masses: Mapping[str, float], path: str = "") -> Self:
        changed = {name: weight.with_mass(masses.get(name, weight.mass)) for name, weight in self.declarations.items()}
        return replace(self, declarations=changed)

    def measured(self) -> Tensor:
        """All that the capture measured, as numbers in a fixed order, [n] in double precision: what a checkpoint must keep."""
        sizes = [number for weight in self.declarations.values() for number in (weight.size, weight.floor)]
        seen = [*self.graph.magnitudes.values(), *self.graph.peaks.values()]
        return torch.tensor([REVISION, *sizes, *self.ratios.values(), *tree_leaves(seen)], dtype=torch.float64)

    def with_measured(self, numbers: Tensor) -> Self:
        """The same network with what another capture of it measured.

        Raises:
            InvalidArgument: the numbers are not those of this network.
        """
        mine = self.measured()
        if numbers.shape != mine.shape or float(numbers[0]) != REVISION:
            raise InvalidArgument(
                f"{numbers.numel()} measurements of a captured model were to go with {self!r}, which has {mine.numel()}. They "
                "are of another model, or of another version of torch or of this library; start the optimizer anew."
            )
        left = iter(numbers.tolist()[1:])
        weights = {name: replace(w, size=next(left), floor=next(left)) for name, w in self.declarations.items()}
        ratios = {use: next(left) for use in self.ratios}
        seen = [
            {name: tree_map(lambda _: next(left), value) for name, value in values.items()}
            for values in (self.graph.magnitudes, self.graph.peaks)
        ]
        graph = replace(self.graph, magnitudes=seen[0], peaks=seen[1])
        return replace(self, graph=graph, declarations=weights, ratios=ratios)

    def parameters(self) -> dict[str, Tensor]:
        """The model's parameters that reach its output, by name."""
        own = dict(self.model.named_parameters())
        return {name: own[name] for name in self.declarations}

    def __repr__(self) -> str:
        return f"from_torch({type(self.model).__name__})"


def from_torch(
    model: nn.Module,
    example_inputs: Any,
    *,
    output: str | int | Callable[[Any], Tensor] | None = None,
    scores: bool = True,
    check: bool = True,
) -> Bridged:
    """A bound-aware network over the parameters of any ``torch.nn.Module``. Print it to see what each parameter is.

    The model's graph is captured by ``torch.export``; a table from operators to atoms and bonds says what each parameter is and how a
    step of all of them passes through. Its bound is graded ``assumed``: activations are taken to be as large as on the example.

    Args:
        model: the model, with fresh or pretrained weights; what does not require a gradient is frozen, a fixed part of the network.
        example_inputs: a batch of real data, as its forward takes it: a tensor, a tuple of positional arguments, or a dictionary of
            named ones. Some tens of samples are enough.
        output: which of its outputs the loss is taken of: an attribute, key or position, or a function of all. By default the tensor
            itself, or "logits", "sample", "last_hidden_state", "out", "output", or the first floating-point tensor.
        scores: whether outputs [batch, n] or [batch, time, n] are scores of classes, measured by their maximum, as cross-entropy
            wants it; False measures by RMS.
        check: whether to compare what the captured graph computes with what the model computes.

    Returns:
        A network for ``agd(network, loss)``: ``method.init(network.parameters())``, and ``AGD(model, loss)`` makes its own.

    Raises:
        InvalidArgument: the model does not run on the example, cannot be captured, or nothing of it can be trained.
        UnknownBound: an operator has no known bound; says which, where in the model it is called, and how to ``declare`` one.
        SpaceMismatch: there is no tensor to take a loss of.
    """
    captured = capture(model, example_inputs, output, check=check)
    shape = captured.shape
    last, dims = shape[-1], len(shape)
    classes = scores and dims in (2, 3)
    spaces: dict[int, Callable[[], Space]] = {
        2: lambda: Logits(last) if classes else Features(last),
        3: lambda: Logits(last) if classes else Sequence(last),
        4: lambda: Image(shape[-3]),
        5: lambda: Volume(shape[-4]),
    }
    if dims not in spaces:
        raise SpaceMismatch(
            f"{type(model).__name__} gives outputs of shape {shape}, not a batch with up to three dimensions of positions. Pass a batch."
        )
    values = dict(model.named_parameters())
    places = uses(captured, classes)
    weights, ratios = declared(places, values)
    if all(weight.mass == 0 for weight in weights.values()):
        raise InvalidArgument(
            f"from_torch found no parameter of {brief(type(model).__name__)} that requires a gradient and reaches the output"
        )
    network = Bridged(model, output, captured, spaces[dims](), weights, ratios)
    network.bound()
    return network
