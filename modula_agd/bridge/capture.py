"""Capture: the graph of operator calls that a ``torch.nn.Module`` makes on an example, and how large each activation is there.

The graph is that of ``torch.export``: every call of an operator with where in the model it stands. It is then run once on the
example, which gives each activation's magnitude a, and checked: what it computes is what the model computes.
"""

import math
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from modula_agd.bridge.graph import Node, records
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.space import brief

HIDDEN = 1e4
"""Entries beyond this are masks that hide a position, not activations."""
NAMES = ("logits", "sample", "last_hidden_state", "out", "output")
"""Where models that return several things keep what a loss is taken of, the first that is there."""


@dataclass(frozen=True)
class Captured:
    """A model on an example.

    Args:
        nodes: what its output depends on, by name, in order.
        parameters: the name of a model's parameter by the node that stands for it.
        magnitudes: RMS of each floating-point tensor that a node gave on the example; of several, of each.
        peaks: mean over positions of the largest entry, likewise.
        output: the node whose tensor the loss is taken of.
        shape: of that tensor on the example.
    """

    nodes: dict[str, Node]
    parameters: dict[str, str]
    magnitudes: dict[str, Any]
    peaks: dict[str, Any]
    output: str
    shape: tuple[int, ...]

    def __deepcopy__(self, memo: object) -> "Captured":
        return self  # nothing in it changes


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of an example: a tensor, a tuple, or a mapping of names."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return (example,), {}


def chosen(outputs: Any, choose: str | int | Callable[[Any], Tensor] | None, model: nn.Module) -> Tensor:
    """The tensor that a loss is taken of, among what a model returns.

    Args:
        outputs: a tensor, a tuple, a mapping or an object with attributes.
        choose: an attribute or key, a position, or a function of the outputs; None takes the tensor itself, the attribute or key
            of ``NAMES`` that is there, or the first floating-point tensor.
        model: for the error's text.

    Raises:
        SpaceMismatch: there is no such tensor.
    """
    found: Any = outputs
    if callable(choose):
        found = choose(outputs)
    elif choose is not None:
        keyed = isinstance(outputs, Mapping | tuple | list) and not hasattr(outputs, str(choose))
        there = not keyed or (choose in outputs if isinstance(outputs, Mapping) else choose in range(len(outputs)))
        found = getattr(outputs, str(choose), None) if not keyed else outputs[choose] if there else None  # pyright: ignore
    elif not isinstance(outputs, Tensor):
        attributes = [getattr(outputs, name, None) for name in NAMES]
        keys = [outputs.get(name) for name in NAMES] if isinstance(outputs, Mapping) else []
        named = [x for x in (*attributes, *keys) if isinstance(x, Tensor)]
        inner = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0]
        found = next(iter([*named, *inner]), None)
    if choose is not None and not isinstance(found, Tensor):
        raise SpaceMismatch(
            f"output={choose!r} is none of what {type(model).__name__} returns, {type(outputs).__name__}. Leave output out, or name "
            "one that is there: an attribute, a key, a position, or a function of all."
        )
    if not (isinstance(found, Tensor) and found.is_floating_point() and found.ndim > 0):
        raise SpaceMismatch(
            f"from_torch looked for the tensor that a loss is taken of in what {type(model).__name__} returns, {type(outputs).__name__}, "
            f"but found {type(found).__name__}. Name it: from_torch(model, example, output='logits'), or a position, or a function."
        )
    return found


class _Chosen(nn.Module):
    """A model that returns that one tensor."""

    def __init__(self, model: nn.Module, choose: Any) -> None:
        super().__init__()
        self.model = model
        self.choose = choose

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return chosen(self.model(*args, **kwargs), self.choose, self.model)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """A model that is in the other mode is put into this one for a while; where it is in this one, what is set part by part stays."""
    modes = {module: module.training for module in model.modules()}
    if model.training != training:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def capture(
    model: nn.Module, example: Any, choose: str | int | Callable[[Any], Tensor] | None = None, *, check: bool = True
) -> Captured:
    """The graph of a model, and its activations' magnitudes on an example. Leaves model and random state as they were.

    Args:
        model: any ``torch.nn.Module`` that ``torch.export`` takes.
        example: what its forward takes, a tensor, a tuple or a mapping: a batch of real data, as magnitudes are measured on it.
        choose: as for ``chosen``.
        check: whether to compare the graph's result with the model's.

    Raises:
        InvalidArgument: the model is none, does not run on the example, cannot be captured, or its graph computes something else.
        SpaceMismatch: there is no tensor to take a loss of.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"from_torch was given {brief(model)}, which is no torch.nn.Module")
    args, kwargs = arguments(example)
    odd = [x for x in (*tree_leaves((args, kwargs)), *model.parameters()) if isinstance(x, Tensor) and x.is_meta]
    if odd:
        raise InvalidArgument(
            "from_torch measures activations, and tensors on the device 'meta' have no values. Give the model some first."
        )
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and x.is_floating_point() and not (x.numel() and bool(x.isfinite().all())):
            raise InvalidArgument(
                f"from_torch was given an example of shape {tuple(x.shape)} that is empty, or holds NaN or infinity. Magnitudes are "
                "measured on it: pass a batch of real data."
            )
    wrapped = _Chosen(model, choose)
    cuda = sorted({x.device for x in model.parameters() if x.device.type == "cuda"}, key=str)
    with in_mode(model, training=True), _as_it_was(model) as restore, torch.random.fork_rng(cuda), torch.no_grad():
        direct = _run(model, lambda: wrapped(*_copied(args), **_copied(kwargs)))
        restore()
        try:
            with warnings.catch_warnings():
                # about export's own workings
                warnings.simplefilter("ignore")
                program = torch.export.export(wrapped, _copied(args), _copied(kwargs), strict=False)
        except Exception as error:
            raise InvalidArgument(
                f"from_torch could not capture {type(model).__name__} with torch.export: {_first_line(error)}. Control flow that depends "
                "on values, and calls that leave torch, cannot be captured; write them with torch.where, or compose the network "
                "from modula_agd modules."
            ) from error
        restore()
        captured, result = _measured(program, model, (_copied(args), _copied(kwargs)))
    if check:
        _compare(result, direct, model)
    return captured


def _copied(inputs: Any) -> Any:
    """A forward pass may write over what it is given."""
    return tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)


def _run(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(0)
    try:
        return call()
    except (InvalidArgument, SpaceMismatch):
        raise
    except Exception as error:
        raise InvalidArgument(
            f"from_torch ran {type(model).__name__} on the example inputs, which failed: {_first_line(error)}. Pass what its "
            "forward takes: a tensor, a tuple of positional arguments, or a dictionary of named ones."
        ) from error


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Parameters and buffers that a forward pass changes are put back, at the end and whenever what it yields is called."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name: value.detach().clone() for name, value in own.items()}

    def restore() -> None:
        with torch.no_grad():
            for name, value in kept.items():
                if not torch.equal(own[name], value):
                    own[name].data.copy_(value)

    try:
        yield restore
    finally:
        restore()


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {brief(text, 400)}"


def _compare(result: Tensor, direct: Tensor, model: nn.Module) -> None:
    scale = float(direct.abs().amax()) if direct.numel() else 0.0
    if not math.isfinite(scale):
        raise InvalidArgument(
            f"{type(model).__name__} gives NaN or infinity on the example inputs. Look for overflow in the model."
        )
    away = float((result - direct).abs().amax()) if result.shape == direct.shape and direct.numel() else math.inf
    rounding = 1e3 * torch.finfo(direct.dtype).eps
    if not away <= rounding * max(scale, 1e-30):
        raise InvalidArgument(
            f"the captured graph of {type(model).__name__} gives outputs that are {away:.3g} away from the model's own (largest "
            f"{scale:.3g}). A model that changes between two calls, or draws random numbers outside of torch, cannot be captured; "
            "pass check=False if that is known and harmless."
        )


class _Measuring(fx.Interpreter):
    """Runs the graph and notes how large every activation is."""

    def __init__(self, module: fx.GraphModule, leave: Container[str]) -> None:
        super().__init__(module)
        self.leave = leave
        self.magnitudes: dict[str, Any] = {}
        self.peaks: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.leave:
            most = math.inf if n.op == "placeholder" else HIDDEN
            self.magnitudes[n.name] = _each(value, lambda x: magnitude(x, most))
            self.peaks[n.name] = _each(value, lambda x: peak(x, most))
        return value


def _each(value: Any, measure: Callable[[Tensor], float]) -> Any:
    if isinstance(value, Tensor):
        return measure(value)
    if isinstance(value, tuple | list):
        return tuple(_each(part, measure) for part in value)
    return abs(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _seen(x: Tensor, most: float) -> Tensor:
    x = x.detach().abs() if x.is_complex() else x.detach()
    x = x.double() if x.device.type != "mps" else x.float()
    return torch.where(x.isfinite() & (x.abs() < most), x, torch.zeros_like(x))


def magnitude(x: Tensor, most: float = HIDDEN) -> float:
    """RMS over the entries below ``most``, which are activations; 0 of what is not floating-point."""
    if not (x.is_floating_point() or x.is_complex()) or x.numel() == 0:
        return 0.0
    count = int((x.detach().abs() < most).sum())
    return float((_seen(x, most).square().sum() / max(1, count)).sqrt())


def peak(x: Tensor, most: float = HIDDEN) -> float:
    """Mean over positions of the largest entry in the last dimension."""
    if not x.is_floating_point() or x.numel() == 0 or x.ndim == 0:
        return magnitude(x, most)
    return float(_seen(x, most).abs().amax(-1).mean())


def _measured(
    program: torch.export.ExportedProgram, model: nn.Module, call: tuple[Any, Any]
) -> tuple[Captured, Tensor]:
    """Run the graph once on the example; gives what it computes, too."""
    signature = program.graph_signature
    # of tied weights, the name that named_parameters() gives
    names = {id(value): name for name, value in model.named_parameters()}
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    flat = iter(tree_flatten(call)[0])
    parameters, given = {}, []
    for spec in signature.input_specs:
        target = (spec.target or "").removeprefix("model.")
        if spec.kind == InputKind.PARAMETER:
            parameters[spec.arg.name] = names[id(own[target])]
            value: Any = own[target].detach()
        elif spec.kind == InputKind.BUFFER:
            value = own[target].detach().clone()
        elif spec.kind == InputKind.USER_INPUT:
            value = next(flat)
        else:
            value = program.constants[spec.target or ""]
        given.append(tree_map_only(Tensor, torch.Tensor.detach, value))
    runner = _Measuring(program.graph_module, parameters)
    torch.manual_seed(0)
    outputs = runner.run(*given, enable_io_processing=False)
    index = [spec.kind for spec in signature.output_specs].index(OutputKind.USER_OUTPUT)
    last = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    output = last.args[0][index].name  # pyright: ignore
    nodes = records(program.graph, output)
    magnitudes, peaks = (
        {name: values[name] for name in nodes if name in values} for values in (runner.magnitudes, runner.peaks)
    )
    used = {name: parameter for name, parameter in parameters.items() if name in nodes}
    return Captured(nodes, used, magnitudes, peaks, output, tuple(outputs[index].shape)), outputs[index]
