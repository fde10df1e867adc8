"""The graph of a captured model as plain records: what each call is given, what it gives, and where in the model it stands.

Records hold names, numbers and texts alone, so that a captured model can be copied, pickled and compared.
"""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from modula_agd.bridge.operators import ALIASES, MATRICES, PARTS, VIEWS


class Ref(str):
    """The name of a node, where it is an argument of another; texts are plain strings."""

    __slots__ = ()


@dataclass(frozen=True)
class Node:
    """One call of an operator, or one input of the graph.

    Args:
        name: unique in the graph.
        operator: its name without the namespace of torch and without overload; empty for an input.
        target: the operator in full, for people.
        args: all arguments in the order of the operator's schema, defaults filled in, nodes as ``Ref``.
        names: the arguments' names in the same order; empty where there is no schema.
        shape: of the tensor that it gives; None for anything else.
        floating: whether it gives floating-point (or complex) numbers, or several results.
        writes: whether it writes over its first argument.
        fused: equal parts that the features of a linear map are split into.
        where: the module and the line of code that call it, for people.
    """

    name: str
    operator: str = ""
    target: str = ""
    args: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None
    floating: bool = False
    writes: bool = False
    fused: int = 1
    where: str = ""

    @property
    def inputs(self) -> tuple[Ref, ...]:
        """The nodes that it is given."""
        return tuple(refs(self.args))

    def named(self, name: str, default: Any = None) -> Any:
        """An argument by name."""
        return self.args[self.names.index(name)] if name in self.names else default


def refs(arguments: Iterable[Any]) -> Iterator[Ref]:
    """Every reference among arguments, those in lists too."""
    for argument in arguments:
        if isinstance(argument, Ref):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from refs(argument)
        elif isinstance(argument, slice):
            yield from refs((argument.start, argument.stop, argument.step))


def operator_name(target: Any) -> str:
    """An operator's name without the namespace of torch, overload, and the underscore of what writes in place."""
    if target is operator.getitem:
        return "getitem"
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", str(target))
    namespace, name = schema.name.split("::")
    kept = name if name.startswith("__") or not name.endswith("_") else name[:-1]
    if namespace != "aten":
        return f"{namespace}::{kept}"
    # max and min of two tensors are sums, as far as changes go; of one they are reductions
    return f"{kept}_other" if kept in ("max", "min") and getattr(target, "_overloadname", "") == "other" else kept


def records(graph: fx.Graph, output: str) -> dict[str, Node]:
    """The records of a graph in order, of what the output depends on alone.

    Args:
        graph: as ``torch.export`` gives it.
        output: the name of the node that counts.
    """
    found = {node.name: _record(node) for node in graph.nodes if node.op in ("placeholder", "call_function")}
    needed = live(found, output)
    return {name: node for name, node in found.items() if name in needed}


def _record(node: fx.Node) -> Node:
    value: Any = node.meta.get("val")
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    several = isinstance(value, tuple | list)
    floating = several or (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()))
    if node.op == "placeholder":
        return Node(node.name, shape=shape, floating=floating)
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    arguments, names = list(node.args), ()
    if schema is not None:
        names = tuple(argument.name for argument in schema.arguments)
        defaults = [argument.default_value for argument in schema.arguments]
        arguments += defaults[len(arguments) :]
        for name, given in node.kwargs.items():
            arguments[names.index(name)] = given
    name = operator_name(target)
    writes = schema is not None and bool(schema.arguments) and _written(schema.arguments[0])
    return Node(
        node.name,
        name,
        str(target),
        tuple(tree_map(_plain, arguments)),
        names,
        shape,
        floating,
        writes,
        fused_parts(node) if name in MATRICES else 1,
        place(node),
    )


def _written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _plain(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return Ref(argument.name)
    if isinstance(argument, int | float | str | bool | type(None)):
        return argument
    return str(argument)


def roots(nodes: dict[str, Node]) -> dict[str, str]:
    """By node, the one whose memory it may share."""
    found: dict[str, str] = {}
    for name, node in nodes.items():
        first = node.args[0] if node.args else None
        shares = isinstance(first, Ref) and (node.writes or node.operator in ALIASES)
        found[name] = found.get(str(first), name) if shares else name
    return found


def live(nodes: dict[str, Node], output: str) -> set[str]:
    """The nodes that the output depends on, and those that write into memory that it depends on."""
    shared = roots(nodes)
    needed, memory = {output}, {shared.get(output, output)}
    for name, node in reversed(nodes.items()):
        if name in needed or (node.writes and shared[name] in memory):
            needed.add(name)
            for argument in node.inputs:
                needed.add(str(argument))
                memory.add(shared.get(argument, argument))
    return needed


def fused_parts(node: fx.Node) -> int:
    """n where the features that a linear map gives are split into n equal runs before anything is done with them; else 1.

    Found by sending the features' numbers, instead of activations, through the views and splits that follow.
    """
    shape = tuple(node.meta["val"].shape)
    if not shape or any(not isinstance(side, int) for side in shape):
        return 1
    numbers: dict[fx.Node, Any] = {node: torch.arange(shape[-1]).expand(shape).contiguous()}
    ends = []
    for later in node.graph.nodes:
        reached = [argument for argument in later.all_input_nodes if argument in numbers]
        if not reached or later.op != "call_function":
            continue
        if operator_name(later.target) in VIEWS | PARTS and reached == later.all_input_nodes == [later.args[0]]:
            try:
                numbers[later] = later.target(numbers[reached[0]], *later.args[1:], **later.kwargs)  # pyright: ignore
            except RuntimeError:
                return 1
        else:
            ends += [numbers[argument] for argument in reached]
    runs = {tuple(end.unique().tolist()) for end in ends if isinstance(end, Tensor)}
    sizes = {len(run) for run in runs}
    disjoint = sorted(number for run in runs for number in run) == list(range(shape[-1]))
    connected = all(run[-1] - run[0] + 1 == len(run) for run in runs if run)
    return len(runs) if len(sizes) == 1 and disjoint and connected else 1


def place(node: fx.Node) -> str:
    """Where in the model a call stands: the innermost module, and the line of code in it."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = modules[-1] if modules else ("", "the model")
    path = str(path).removeprefix("model").removeprefix(".")
    kind = str(kind if isinstance(kind, str) else kind.__name__).split(".")[-1]
    lines = [line.strip() for line in str(node.meta.get("stack_trace", "")).strip().split("\n")]
    frames = [(lines[i], lines[i + 1]) for i in range(len(lines) - 1) if lines[i].startswith("File ")]
    frames = [frame for frame in frames if "modula_agd/bridge/" not in frame[0]]
    # the last line that is not torch's own
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    where = f"in {kind}" + (f" at {path!r}" if path else "")
    return f"{where}, line {own[-1][1]!r} ({own[-1][0]})" if own else where
