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
from torch import Tensor

from modula_agd import convolution
from modula_agd.bridge.capture import Captured
from modula_agd.bridge.graph import Node, Ref
from modula_agd.bridge.operators import MATRICES, PARTS, PRODUCTS, VIEWS
from modula_agd.norm import RMS, Frobenius, Norm, RowBlocks, RowNorm, Sign, Spectral, Transposed, drawing_dtype
from modula_agd.polar import working_dtype
from modula_agd.run import Role

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
        role: what it is there to a decay.
    """

    name: str
    kind: str
    norm: Norm
    natural: float = 1.0
    least: float = 0.0
    role: Role = "matrix"


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
        frozen: whether it required no gradient when the model was captured.
        role: that of its first use.
    """

    kind: str
    shape: tuple[int, ...]
    norm: Norm
    size: float
    floor: float
    mass: float = 1.0
    frozen: bool = False
    role: Role = "matrix"

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


RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Recurrent operators and how many weights each fuses."""
CELLS = {f"{name}_cell": count for name, count in RECURRENT.items()}
"""The same for a single step."""
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
    **dict.fromkeys(CELLS, (4, 5)),
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
    "_weight_norm": (1,),
    "_weight_norm_interface": (1,),
}
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def leaves(captured: Captured) -> dict[str, Leaf]:
    """Every node that is a parameter or a view of one."""
    found: dict[str, Leaf] = {node: Leaf(name) for node, name in captured.parameters.items()}
    for name, node in captured.nodes.items():
        if node.operator not in VIEWS or node.writes or node.inputs != node.args[:1] or node.inputs[0] not in found:
            continue
        leaf, before, after = found[node.inputs[0]], captured.nodes[node.inputs[0]].shape, node.shape
        if before == after and node.operator not in TURNS:
            found[name] = leaf
        elif leaf.transposed is not None and node.operator in TURNS and _swaps_last(node, len(before or ())):
            found[name] = replace(leaf, transposed=not leaf.transposed)
        else:
            found[name] = replace(leaf, transposed=None)
    return found


TURNS = frozenset(("t", "mH", "mT", "matrix_H", "adjoint", "transpose", "swapaxes", "numpy_T", "permute"))


def _swaps_last(node: Node, dims: int) -> bool:
    if node.operator in ("t", "numpy_T", "mH", "mT", "matrix_H", "adjoint"):
        return dims == 2 or node.operator not in ("t", "numpy_T")
    if node.operator == "permute":
        return [axis % dims for axis in node.args[1]] == [*range(dims - 2), dims - 1, dims - 2]
    return {axis % dims for axis in node.args[1:3]} == {dims - 2, dims - 1}


SCALED = frozenset(("mul", "multiply", "div", "divide", "true_divide"))
AFTER = (
    VIEWS
    | PARTS
    | SCALED
    | {"dropout", "masked_fill", "mean", "adaptive_avg_pool2d", "log_softmax", "_log_softmax", "index", "index_select"}
    | {"gather", "neg", "tanh", "hardtanh", "clamp", "clamp_min", "clamp_max"}
)
"""What may stand between the head of a model and its output: some of the scores, all of them in another unit, or none beyond a cap."""


def score_nodes(captured: Captured) -> frozenset[str]:
    """The output and what leads to it without another weight: there, activations are scores of classes."""
    found, front = set(), [captured.output]
    while front:
        name = front.pop()
        node = captured.nodes[name]
        found.add(name)
        sources = [argument for argument in node.inputs if captured.nodes[argument].floating]
        if node.operator in SCALED:
            # a temperature may come first, and be no score; of two as large as the product either may be
            factors = sources[:1] if "div" in node.operator else sources
            sources = [x for x in factors if captured.nodes[x].shape == node.shape] or factors[:1]
        elif node.operator in AFTER:
            sources = sources[:1]
        elif node.operator != "add":
            continue
        front += [source for source in sources if source not in found and source not in captured.parameters]
    return frozenset(found)


def uses(captured: Captured, scores: bool) -> dict[tuple[str, str], Use]:
    """Each use of a parameter, by the operator's call and the node that stands for the parameter in it.

    Args:
        captured: the model.
        scores: whether its outputs are scores of classes.
    """
    known = leaves(captured)
    heads = score_nodes(captured) if scores else frozenset()
    found = {}
    for name, node in captured.nodes.items():
        if not node.operator or name in known:
            continue
        for place, argument in _arguments(node):
            if argument in known:
                found[name, str(argument)] = _use(captured, node, place, argument, known[argument], name in heads)
    return found


def _arguments(node: Node) -> Iterator[tuple[Any, Ref]]:
    """Arguments that are nodes, each with its position; of a list in it, a pair of positions."""
    for place, value in enumerate(node.args):
        if isinstance(value, Ref):
            yield place, value
        elif isinstance(value, list | tuple):
            yield from (((place, index), part) for index, part in enumerate(value) if isinstance(part, Ref))


def _use(captured: Captured, node: Node, place: Any, argument: Ref, leaf: Leaf, head: bool) -> Use:
    name, shape = node.operator, captured.nodes[argument].shape or ()
    out = captured.magnitudes[node.name]
    around = (out if isinstance(out, float) else out[0]) or 1.0
    fused = RECURRENT.get(name, 0) if isinstance(place, tuple) else CELLS.get(name, 0) if place in (2, 3) else 0
    if fused and len(shape) == 2:
        whole = fused == 1 or shape[0] % fused > 0 or place == (2, 4)
        norm = Spectral() if whole else RowBlocks(Spectral(), fused)
        return Use(leaf.name, f"Linear({shape[0]}, {shape[1]})", norm)
    if fused:
        return Use(leaf.name, f"Bias({_sides(shape)})", RMS(), 1.0, SHARE, "vector")
    if place in MATRICES.get(name, ()) and len(shape) >= 2:
        return _matrix(node, name, place, leaf, shape, head)
    if (name in CONVOLUTIONS or name == "convolution") and place == 1 and leaf.transposed is False:
        atom = _convolution(node, name, shape)
        return Use(leaf.name, repr(atom), atom.norm, role="logits" if head else "matrix")
    if name in CONVOLUTIONS or name == "convolution":
        return Use(leaf.name, f"Bias({_sides(shape)})", RMS(), around, SHARE, "vector")
    if name in ("embedding", "embedding_bag") and place == 0 and len(shape) == 2:
        return Use(leaf.name, f"Embedding({shape[1]}, {shape[0]})", RowNorm.of_embedding(shape[1]))
    if name in ("_weight_norm", "_weight_norm_interface") and place == 0:
        return Use(leaf.name, f"Direction({_sides(shape)})", Spectral() if len(shape) == 2 else RMS())
    vector = math.prod(shape) == max((1, *shape))
    if place in SCALES.get(name, ()) and vector:
        return Use(leaf.name, f"Scale({_sides(shape)})", Sign(), 1.0, SHARE, "vector")
    if place in BIASES.get(name, ()) and vector:
        norm = Sign() if head else RMS()
        natural = captured.peaks[node.name] if head else around
        return Use(leaf.name, f"Bias({_sides(shape)})", norm, natural, SHARE, "vector")
    if name in PRODUCTS - {"mul", "multiply"} and len(shape) >= 2:
        right = _contracted(node, place, shape) if name == "einsum" and leaf.transposed is False else None
        if right is None:
            return Use(leaf.name, f"Linear({_sides(shape)})", Frobenius(), role="logits" if head else "matrix")
        return _linear(leaf, shape, right, right, head and len(shape) == 2)
    own = captured.nodes[next(node for node, name in captured.parameters.items() if name == leaf.name)].shape or ()
    norm = RowNorm.of_embedding(own[-1]) if own[-1:] == shape[-1:] and own else RMS()
    # one token or one temperature is no matrix, whatever its shape
    return Use(leaf.name, f"Tokens({_sides(own)})", norm, around, SHARE, "vector" if vector else "matrix")


def _contracted(node: Node, place: Any, shape: tuple[int, ...]) -> bool | None:
    """Of an operand of ``einsum`` whose last two indices are one that is summed over and one that stays: whether it lies as [i, o]."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    operands = terms.split(",")
    index = place[1] if isinstance(place, tuple) else 0
    if not result or "." in terms or index >= len(operands) or len(operands[index]) != len(shape):
        return None
    first, second = operands[index][-2:]
    others = "".join(operands[:index] + operands[index + 1 :])
    # the input's index is summed over, the output's is its own
    if first in result and first not in others and second in others and second not in result:
        return False
    if second in result and second not in others and first in others and first not in result:
        return True
    return None


def _sides(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape)) or "1"


def _matrix(node: Node, name: str, place: int, leaf: Leaf, shape: tuple[int, ...], head: bool) -> Use:
    """A matrix that multiplies from the right lies as [i, o], but in ``linear``."""
    right = place == max(MATRICES[name]) and name != "linear"
    parts = (
        1
        if head or len(shape) > 2 or node.shape is None or node.shape[-1] != shape[-1 if right else -2]
        else node.fused
    )
    if leaf.transposed is None:
        plain = _linear(leaf, shape, right, False, head, parts)
        return replace(plain, norm=Spectral() if len(shape) > 2 else RMS())
    return _linear(leaf, shape, right, right != leaf.transposed, head, parts)


def _linear(leaf: Leaf, shape: tuple[int, ...], right: bool, lies: bool, head: bool, parts: int = 1) -> Use:
    """Of a matrix [..., o, i], or [..., i, o] where it stands on the right: n fused weights, or what makes scores.

    Args:
        leaf: the parameter, as it stands there.
        shape: of what stands there.
        right: whether that is [..., i, o].
        lies: whether the parameter itself is.
        head: whether it makes scores.
        parts: of the outputs.
    """
    out, fan = (shape[-1], shape[-2]) if right else (shape[-2], shape[-1])
    role: Role = "logits" if head else "matrix"
    kind = f"Linear({'Logits(' * head}{out}{')' * head}, {fan})" + (f" in {parts} parts" if parts > 1 else "")
    norm: Norm = RowNorm.into_logits(fan) if head else RowBlocks(Spectral(), parts) if parts > 1 else Spectral()
    return Use(leaf.name, kind, Transposed(norm) if lies else norm, role=role)


def _convolution(node: Node, name: str, shape: tuple[int, ...]) -> Any:
    """The atom with this kernel."""
    dims = len(shape) - 2
    transposed = "transpose" in name or bool(node.named("transposed", False))
    groups = node.named("groups", 1)
    fans = (shape[1] * groups, shape[0]) if transposed else (shape[0], shape[1] * groups)
    layer = getattr(convolution, f"Conv{'Transpose' * transposed}{dims}d")
    options = {what: node.named(what, default) for what, default in (("stride", 1), ("dilation", 1), ("padding", 0))}
    settings = {what: _one(value) for what, value in options.items() if not isinstance(value, str)}
    return layer(*fans, _one(shape[2:]), groups=groups, **settings)


def _one(values: Any) -> Any:
    """One number where all are the same."""
    if isinstance(values, int):
        return values
    return values[0] if len(set(values)) == 1 else tuple(values)


def size_of(norm: Norm, value: Tensor) -> float:
    """‖W‖ within some per cent, at the cost of a few products with a vector: by randomised subspace iteration where it is spectral.

    Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), as ``torch.svd_lowrank`` has it.
    """
    value = value.to(working_dtype(value.dtype))
    stacks = norm.matrices(value)
    if not stacks or not bool(value.any()):
        return float(norm.bound(value))
    with torch.random.fork_rng([value.device] if value.device.type == "cuda" else []):
        torch.manual_seed(0)
        found = [float(torch.svd_lowrank(x, q=min(4, *x.shape[-2:]), niter=6)[1].amax()) for x in stacks]
    # a norm is linear in its matrices: what its own assembly of them differs by is the factor
    assembled = norm.assembled(value, stacks).dense()
    place = int(value.abs().argmax())
    return max(found) * float(value.flatten()[place] / assembled.flatten()[place])


def declared(
    uses_: Mapping[tuple[str, str], Use], values: Mapping[str, Tensor]
) -> tuple[dict[str, Weight], dict[tuple[str, str], float]]:
    """Each parameter's declaration by its first use, and what its size is multiplied with in each use.

    Args:
        uses_: as ``uses`` found them.
        values: the parameters; what does not require a gradient has mass 0.
    """
    found: dict[str, Weight] = {}
    ratios = {}
    for (node, argument), use in uses_.items():
        value = values[use.name].detach()
        first = found.get(use.name)
        if first is None:
            measured = size_of(use.norm, value)
            size = max(measured, use.least * use.natural) or use.natural
            floor = use.least * use.natural if use.least else 0.01 * size
            frozen = not values[use.name].requires_grad
            first = Weight(use.kind, tuple(value.shape), use.norm, size, floor, float(not frozen), frozen, use.role)
            found[use.name] = first
        same = first.norm == use.norm
        own = 1.0 if same else size_of(use.norm, value) / max(size_of(first.norm, value), 1e-30)
        ratios[node, argument] = own if own > 0 else 1.0
    order = [name for name in values if name in found]
    return {name: found[name] for name in order}, ratios
