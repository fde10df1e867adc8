"""Weights: what each parameter of a captured model is, from the operators that it goes into.

==========================================  ====================================================  ==========================
where the parameter goes                    it is                                                 norm
==========================================  ====================================================  ==========================
``linear``, ``addmm``, ``matmul``           ``Linear(o, i)``; stored [i, o] where it multiplies   ``Spectral``, ``Transposed``
                                            from the right
the same, into the model's output           ``Linear(Logits(o), i)``                              ``RowNorm``
the same, split in n equal parts after it   n fused weights                                       ``RowBlocks(Spectral(), n)``
``conv1d`` … ``conv_transpose3d``           ``Conv1d`` …                                          ``PerTap``
``embedding``                               ``Embedding(d, n)``                                   ``RowNorm``
``lstm``, ``gru``, ``rnn_tanh``             4, 3 or 1 fused weights                               ``RowBlocks(Spectral(), n)``
a bias's place, ``add``                     ``Bias``                                              ``RMS``; ``Sign`` on logits
a norm's weight, ``mul``                    ``Scale``                                             ``Sign``
anything else: tokens, positions            ``Tokens``, rows of features                          ``RowNorm``
==========================================  ====================================================  ==========================

Sizes are those of the weights as they come, so that a step is relative to them: a pretrained network is moved as gently as it
is large. Biases, scales and tokens, which may start at or near 0, have at least a tenth of what is natural: of the activation that
they are added to, or of 1; and a weight of zeros, which has no size of its own, has the natural one.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from modula_agd import convolution
from modula_agd.bridge.capture import Captured
from modula_agd.bridge.operators import PARTS, VIEWS, operator_name
from modula_agd.norm import RMS, Norm, RowBlocks, RowNorm, Sign, Spectral, Transposed, drawing_dtype

SHARE = 0.1
"""Least size of what may start near 0, as a share of the natural one."""


@dataclass(frozen=True)
class Leaf:
    """A parameter, or a view of it, on its way to an operator.

    Args:
        name: of the parameter.
        transposed: whether a matrix lies on its side; None where it was laid out otherwise.
    """

    name: str
    transposed: bool | None = False


@dataclass(frozen=True)
class Use:
    """A parameter in one place of the graph.

    Args:
        name: of the parameter.
        kind: what it is there, as it is printed.
        norm: the norm that belongs to the place.
        natural: the size that is natural there.
        least: the least size, as a share of the natural one.
    """

    name: str
    kind: str
    norm: Norm
    natural: float
    least: float


@dataclass(frozen=True)
class Weight:
    """A parameter of a captured model, as an atom declares it.

    Args:
        kind: what it is, as it is printed.
        shape: its shape.
        norm: the norm of its first use.
        size: ω.
        floor: the least ω where sizes are tracked.
        mass: its share of a step; 0 where it is frozen.
    """

    kind: str
    shape: tuple[int, ...]
    norm: Norm
    size: float
    floor: float
    mass: float = 1.0

    def draw(self, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A random weight of its size; biases are zero."""
        if self.kind.startswith("Bias"):
            return torch.zeros(self.shape, device=device, dtype=dtype)
        if self.kind.startswith("Scale"):
            return torch.ones(self.shape, device=device, dtype=dtype)
        drawn = self.norm.draw(self.shape, generator, generator.device, drawing_dtype(generator))
        return (drawn * self.size).to(device, dtype)

    def with_mass(self, mass: float) -> "Weight":
        """The same with another mass."""
        return replace(self, mass=mass)

    def __repr__(self) -> str:
        return self.kind


MATRICES = {
    "linear": (1,),
    "addmm": (1, 2),
    "matmul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0,),
    "baddbmm": (1, 2),
}
BIASES = {
    "linear": (2,),
    "addmm": (0,),
    "baddbmm": (0,),
    "layer_norm": (3,),
    "native_layer_norm": (3,),
    "group_norm": (3,),
    "native_group_norm": (2,),
    "batch_norm": (2,),
    "instance_norm": (2,),
    "add": (0, 1),
    "sub": (0, 1),
}
SCALES = {
    "layer_norm": (2,),
    "native_layer_norm": (2,),
    "group_norm": (2,),
    "native_group_norm": (1,),
    "batch_norm": (1,),
    "instance_norm": (1,),
    "rms_norm": (2,),
    "_fused_rms_norm": (2,),
    "prelu": (1,),
    "_prelu_kernel": (1,),
    "mul": (0, 1),
}
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Recurrent operators and how many weights each fuses."""


def leaves(captured: Captured) -> dict[fx.Node, Leaf]:
    """Every node that is a parameter or a view of one."""
    found: dict[fx.Node, Leaf] = {node: Leaf(name) for node, name in captured.parameters.items()}
    for node in captured.graph.nodes:
        if node.op != "call_function" or not node.args or node.args[0] not in found:
            continue
        leaf, name = found[node.args[0]], operator_name(node)
        if name in VIEWS:
            before, after = (value.meta["val"].ndim for value in (node.args[0], node))
            turned = name in ("t", "transpose", "swapaxes", "numpy_T", "permute") and before == after >= 2
            plain = name in ("alias", "clone", "contiguous", "detach", "to", "_to_copy", "type_as", "float", "half")
            if turned and leaf.transposed is not None and _swaps_last(node, name, before):
                found[node] = replace(leaf, transposed=not leaf.transposed)
            else:
                found[node] = leaf if plain or turned else replace(leaf, transposed=None)
    return found


def _swaps_last(node: fx.Node, name: str, dims: int) -> bool:
    if name in ("t", "numpy_T"):
        return dims == 2
    last = {dims - 2, dims - 1}
    if name == "permute":
        order = [axis % dims for axis in node.args[1]]  # pyright: ignore
        return order == [*range(dims - 2), dims - 1, dims - 2]
    return {axis % dims for axis in node.args[1:3]} == last  # pyright: ignore


def score_nodes(captured: Captured) -> set[fx.Node]:
    """The output and what leads to it without another weight: there, activations are scores of classes."""
    found, front = set(), [captured.output]
    while front:
        node = front.pop()
        found.add(node)
        name = operator_name(node) if node.op == "call_function" else ""
        passes = name in VIEWS | PARTS | {"dropout", "alias", "mul", "div", "masked_fill"}
        sources = [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]
        if passes and sources and sources[0] not in found:
            front.append(sources[0])
        elif name == "add":
            front += [arg for arg in sources if arg not in found]
    return found


def uses(captured: Captured, scores: bool) -> dict[tuple[fx.Node, fx.Node], Use]:
    """Each use of a parameter, by the operator's call and the node that stands for the parameter in it.

    Args:
        captured: the model.
        scores: whether its outputs are scores of classes.
    """
    known = leaves(captured)
    heads = score_nodes(captured) if scores else set()
    found = {}
    for node in captured.graph.nodes:
        if node.op != "call_function" or node in known:
            continue
        for place, argument in _arguments(node):
            if argument in known:
                found[node, argument] = _use(captured, node, place, argument, known[argument], node in heads)
    return found


def _arguments(node: fx.Node) -> Iterator[tuple[Any, fx.Node]]:
    """Arguments that are nodes, each with its position; of a list in it, a pair of positions."""
    positional = enumerate(node.args)
    schema = getattr(node.target, "_schema", None)
    places = {argument.name: index for index, argument in enumerate(schema.arguments)} if schema is not None else {}
    named = ((places.get(name, name), value) for name, value in node.kwargs.items())
    for place, value in (*positional, *named):
        if isinstance(value, fx.Node):
            yield place, value
        elif isinstance(value, list | tuple):
            yield from (((place, index), part) for index, part in enumerate(value) if isinstance(part, fx.Node))


def _use(captured: Captured, node: fx.Node, place: Any, argument: fx.Node, leaf: Leaf, head: bool) -> Use:
    name = operator_name(node)
    shape: tuple[int, ...] = tuple(argument.meta["val"].shape)
    out = captured.magnitudes[node]
    around = (out if isinstance(out, float) else out[0]) or 1.0
    if name in RECURRENT and isinstance(place, tuple):
        count = RECURRENT[name]
        if len(shape) == 2:
            rows, columns = shape
            kind = f"Linear({rows}, {columns})"
            return Use(leaf.name, kind, RowBlocks(Spectral(), count) if count > 1 else Spectral(), 1.0, 0.0)
        return Use(leaf.name, f"Bias({_sides(shape)})", RMS(), 1.0, SHARE)
    if place in MATRICES.get(name, ()) and len(shape) >= 2:
        return _matrix(node, name, place, leaf, shape, head)
    if name in CONVOLUTIONS or name == "convolution":
        if place == 1:
            atom = _convolution(node, name, shape)
            return Use(leaf.name, repr(atom), atom.norm, 1.0, 0.0)
        return Use(leaf.name, f"Bias({_sides(shape)})", RMS(), around, SHARE)
    if name in ("embedding", "embedding_bag") and place == 0:
        count, width = argument.meta["val"].shape
        return Use(leaf.name, f"Embedding({width}, {count})", RowNorm.of_embedding(width), 1.0, 0.0)
    vector = math.prod(shape) == max((1, *shape))
    if place in SCALES.get(name, ()) and vector:
        return Use(leaf.name, f"Scale({_sides(shape)})", Sign(), 1.0, SHARE)
    if place in BIASES.get(name, ()) and vector:
        norm = Sign() if head else RMS()
        return Use(leaf.name, f"Bias({_sides(shape)})", norm, captured.peaks[node] if head else around, SHARE)
    norm = RowNorm.of_embedding(shape[-1]) if leaf.transposed is False and shape else RMS()
    return Use(leaf.name, f"Tokens({_sides(shape)})", norm, around, SHARE)


def _sides(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape)) or "1"


def _matrix(node: fx.Node, name: str, place: int, leaf: Leaf, shape: tuple[int, ...], head: bool) -> Use:
    """A matrix that multiplies from the right lies as [i, o], but in ``linear``."""
    right = place == max(MATRICES[name]) and name != "linear"
    out, fan = (shape[-1], shape[-2]) if right else (shape[-2], shape[-1])
    parts = 1 if head or len(shape) > 2 else fused_parts(node, out)
    kind = f"Linear({'Logits(' * head}{out}{')' * head}, {fan})" + (f" in {parts} parts" if parts > 1 else "")
    if leaf.transposed is None:
        return Use(leaf.name, kind, Spectral() if len(shape) > 2 else RMS(), 1.0, 0.0)
    norm: Norm = RowNorm.into_logits(fan) if head else RowBlocks(Spectral(), parts) if parts > 1 else Spectral()
    return Use(leaf.name, kind, Transposed(norm) if right != leaf.transposed else norm, 1.0, 0.0)


def _convolution(node: fx.Node, name: str, shape: tuple[int, ...]) -> Any:
    """The atom with this kernel."""
    given = dict(_named(node))
    dims = len(shape) - 2
    transposed = "transpose" in name or bool(given.get("transposed", False))
    groups = given.get("groups", 1)
    fans = (shape[1] * groups, shape[0]) if transposed else (shape[0], shape[1] * groups)
    layer = getattr(convolution, f"Conv{'Transpose' * transposed}{dims}d")
    padding = given.get("padding", 0)
    options = {"stride": given.get("stride", 1), "dilation": given.get("dilation", 1), "padding": padding}
    settings = {key: _one(value) for key, value in options.items() if not isinstance(value, str)}
    return layer(*fans, _one(shape[2:]), groups=groups, **settings)


def _one(values: Any) -> Any:
    """One number where all are the same."""
    if isinstance(values, int):
        return values
    return values[0] if len(set(values)) == 1 else tuple(values)


def _named(node: fx.Node) -> Iterator[tuple[str, Any]]:
    schema = node.target._schema  # pyright: ignore
    yield from zip((argument.name for argument in schema.arguments), node.args, strict=False)
    yield from node.kwargs.items()


def fused_parts(node: fx.Node, features: int) -> int:
    """n where the features that a linear map gives are split into n equal runs before anything is done with them; else 1.

    Found by sending the features' numbers, instead of activations, through the views and splits that follow.
    """
    shape = tuple(node.meta["val"].shape)
    if shape[-1] != features or any(not isinstance(side, int) for side in shape):
        return 1
    numbers: dict[fx.Node, Any] = {node: torch.arange(features).expand(shape)}
    ends = []
    for later in node.graph.nodes:
        reached = [argument for argument in later.all_input_nodes if argument in numbers]
        if not reached or later.op != "call_function":
            continue
        if operator_name(later) in VIEWS | PARTS and reached == later.all_input_nodes == [later.args[0]]:
            numbers[later] = later.target(numbers[reached[0]], *later.args[1:], **later.kwargs)  # pyright: ignore
        else:
            ends += [numbers[argument] for argument in reached]
    runs = {tuple(end.unique().tolist()) for end in ends if isinstance(end, Tensor)}
    sizes = {len(run) for run in runs}
    disjoint = sorted(number for run in runs for number in run) == list(range(features))
    connected = all(run[-1] - run[0] + 1 == len(run) for run in runs)
    return len(runs) if len(sizes) == 1 and disjoint and connected else 1


def declared(
    captured: Captured, uses_: Mapping[tuple[fx.Node, fx.Node], Use], values: Mapping[str, Tensor]
) -> tuple[dict[str, Weight], dict[tuple[fx.Node, fx.Node], float]]:
    """Each parameter's declaration by its first use, and what its size is multiplied with in each use.

    Args:
        captured: the model.
        uses_: as ``uses`` found them.
        values: the parameters; what does not require a gradient has mass 0.
    """
    found: dict[str, Weight] = {}
    ratios = {}
    for (node, argument), use in uses_.items():
        value = values[use.name].detach()
        first = found.get(use.name)
        if first is None:
            measured = float(use.norm.bound(value))
            size = max(measured, use.least * use.natural) or use.natural
            floor = use.least * use.natural if use.least else 0.01 * size
            mass = 1.0 if values[use.name].requires_grad else 0.0
            first = found[use.name] = Weight(use.kind, tuple(value.shape), use.norm, size, floor, mass)
        same = first.norm == use.norm
        own = 1.0 if same else float(use.norm.bound(value)) / max(float(first.norm.bound(value)), 1e-30)
        ratios[node, argument] = own if own > 0 else 1.0
    order = [name for name in values if name in found]
    return {name: found[name] for name in order}, ratios
