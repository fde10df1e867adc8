"""Weights: what each parameter of a captured model is, from the operators that it goes into.

==========================================  ====================================================  ==========================
where the parameter goes                    it is                                                 norm
==========================================  ====================================================  ==========================
``linear``, ``addmm``, ``matmul``           ``Linear(o, i)``; stored [i, o] where it multiplies   ``Spectral``, ``Transposed``
                                            from the right
the same, into the model's output           ``Linear(Logits(o), i)``                              ``RowNorm``
the same, split in n equal parts after it   n fused weights                                       ``RowBlocks(Spectral(), n)``
``conv1d`` … ``conv_transpose3d``           ``Conv1d`` …                                          ``Unfolded``
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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modula_agd import convolution
from modula_agd.bridge.capture import Captured
from modula_agd.bridge.graph import Node, Ref
from modula_agd.bridge.leaf import Leaf, is_vector, leaves
from modula_agd.bridge.operators import MATRICES, PRODUCTS
from modula_agd.bridge.scores import score_nodes
from modula_agd.norm import RMS, Frobenius, Norm, RowBlocks, RowNorm, Sign, Spectral, Transposed, drawing_dtype
from modula_agd.polar import working_dtype
from modula_agd.run import Role

SHARE = 0.1
"""Least size of what may start near 0, as a share of the natural one."""


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
CONVOLUTIONS = ("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


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
    role: Role = "logits" if head else "matrix"
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
    if name in CONVOLUTIONS and place == 1 and leaf.transposed is False:
        atom = _convolution(node, name, shape)
        return Use(leaf.name, repr(atom), atom.norm, role=role)
    if name in ("embedding", "embedding_bag") and place == 0 and len(shape) == 2:
        return Use(leaf.name, f"Embedding({shape[1]}, {shape[0]})", RowNorm.of_embedding(shape[1]))
    if name in ("_weight_norm", "_weight_norm_interface") and place == 0:
        return Use(leaf.name, f"Direction({_sides(shape)})", Spectral() if len(shape) == 2 else RMS())
    vector = is_vector(shape) or is_vector(leaf.own)
    if name in CONVOLUTIONS or (place in BIASES.get(name, ()) and vector):
        norm = Sign() if head else RMS()
        natural = captured.peaks[node.name] if head else around
        return Use(leaf.name, f"Bias({_sides(shape)})", norm, natural, SHARE, "vector")
    if place in SCALES.get(name, ()) and vector:
        return Use(leaf.name, f"Scale({_sides(shape)})", Sign(), 1.0, SHARE, "vector")
    if name == "einsum" and len(shape) >= 2:
        return _contracted(node, place[1] if isinstance(place, tuple) else 0, leaf, shape, head)
    if name in PRODUCTS - {"mul", "multiply"} and len(shape) >= 2:
        return Use(leaf.name, f"Linear({_sides(shape)})", Frobenius(), role=role)
    norm = RowNorm.of_embedding(leaf.own[-1]) if leaf.own[-1:] == shape[-1:] and leaf.own else RMS()
    return Use(leaf.name, f"Tokens({_sides(leaf.own)})", norm, around, SHARE, "vector" if leaf.single else "matrix")


def _contracted(node: Node, index: int, leaf: Leaf, shape: tuple[int, ...], head: bool) -> Use:
    """An operand of ``einsum``: linear where its last two indices are one that is summed over and one that stays.

    It makes scores where the one that stays is the last of the result, as a loss takes its classes.
    """
    terms, arrow, result = str(node.args[0]).replace(" ", "").replace("...", ".").partition("->")
    operands = terms.split(",")
    own, others = operands[index], "".join(operands[:index] + operands[index + 1 :])
    if not arrow:
        # as numpy has it: what occurs once, in alphabetical order, behind the ellipsis
        result = "." * ("." in terms) + "".join(
            sorted(x for x in set(own + others) - {"."} if (own + others).count(x) == 1)
        )
    head = head and result[-1:].isalpha() and result[-1:] in own
    first, second = own[-2:] if len(own) == len(shape) and "." not in own else ("", "")

    def stays(x: str, beside: str) -> bool:
        # the output's index is its own, the input's is summed over
        return x != "" and x in result and x not in others and beside in others and beside not in result

    if not (stays(first, second) or stays(second, first)):
        return Use(leaf.name, f"Linear({_sides(shape)})", Frobenius(), role="logits" if head else "matrix")
    return _linear(leaf, shape, stays(second, first), head)


def _sides(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape)) or "1"


def _matrix(node: Node, name: str, place: int, leaf: Leaf, shape: tuple[int, ...], head: bool) -> Use:
    """A matrix that multiplies from the right lies as [i, o], but in ``linear``."""
    right = place == max(MATRICES[name]) and name != "linear"
    alone = not head and len(shape) == 2 and node.shape is not None and node.shape[-1] == shape[-1 if right else -2]
    return _linear(leaf, shape, right, head, node.fused if alone else 1)


def _linear(leaf: Leaf, shape: tuple[int, ...], right: bool, head: bool, parts: int = 1) -> Use:
    """A matrix [..., o, i], or [..., i, o] where it stands on the right: n fused weights, or what makes scores.

    Args:
        leaf: the parameter, as it stands there.
        shape: of what stands there.
        right: whether that is [..., i, o].
        head: whether it makes scores.
        parts: of the outputs.
    """
    out, fan = (shape[-1], shape[-2]) if right else (shape[-2], shape[-1])
    kind = f"Linear({'Logits(' * head}{out}{')' * head}, {fan})" + (f" in {parts} parts" if parts > 1 else "")
    norm: Norm = RowNorm.into_logits(fan) if head else RowBlocks(Spectral(), parts) if parts > 1 else Spectral()
    if leaf.transposed is None:
        # how the matrix lies in the parameter is not known
        norm = Spectral() if len(shape) > 2 and len(leaf.own) > 1 else RMS()
    elif right != leaf.transposed:
        norm = Transposed(norm)
    return Use(leaf.name, kind, norm, role="logits" if head else "matrix")


def _convolution(node: Node, name: str, shape: tuple[int, ...]) -> Any:
    """The atom with this kernel."""
    dims = len(shape) - 2
    transposed = "transpose" in name or bool(node.named("transposed", False))
    groups = node.named("groups", 1)
    fans = (shape[1] * groups, shape[0]) if transposed else (shape[0], shape[1] * groups)
    layer = getattr(convolution, f"Conv{'Transpose' * transposed}{dims}d")
    options = {what: node.named(what, default) for what, default in (("stride", 1), ("dilation", 1), ("padding", 0))}
    settings = {what: _one(value) for what, value in options.items() if not isinstance(value, str)}
    # its size is measured, so that it does not matter that a drawn one would be small
    return layer(*fans, _one(shape[2:]), groups=groups, geometry="patch", **settings)


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
    sizes = []
    for index, largest in enumerate(found):
        # a norm is linear in its matrices: what its own assembly of each stack differs by is the factor
        alone = [x if other == index else torch.zeros_like(x) for other, x in enumerate(stacks)]
        part = norm.assembled(value, alone).dense().flatten()
        place = int(part.abs().argmax())
        sizes.append(largest * float(value.flatten()[place] / part[place]) if largest > 0 else 0.0)
    return max(sizes)


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
