"""The networks that ``--arch`` names."""

from collections.abc import Callable

from modula_agd import MLP, Linear, Module, ResMLP, Space
from modula_agd.error import InvalidArgument


def build(name: str, *, outputs: int | Space, width: int, inputs: int, depth: int) -> Module:
    """A network for flat inputs, without biases.

    Args:
        name: "fcn", ``depth`` Linear layers with rectifiers between; "resmlp", ``depth`` residual blocks of two layers
            between two Linear layers; "linear", ``depth`` Linear layers and nothing else, which a certified step needs.
        outputs: number of outputs, or their space.
        width: features of each hidden layer, ≥ 1.
        inputs: features of the input.
        depth: ≥ 1.

    Raises:
        InvalidArgument: the name is unknown, or a number is below 1.
    """
    if name not in ARCHITECTURES:
        raise InvalidArgument(f"there is no architecture {name!r}; choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name](outputs, width, inputs, depth)


def _deep_linear(outputs: int | Space, width: int, inputs: int, depth: int) -> Module:
    if depth == 1:
        return Linear(outputs, inputs)
    network: Module = Linear(width, inputs)
    for _ in range(depth - 2):
        network = Linear(width, width) @ network
    return Linear(outputs, width) @ network


ARCHITECTURES: dict[str, Callable[[int | Space, int, int, int], Module]] = {
    "fcn": MLP,
    "resmlp": ResMLP,
    "linear": _deep_linear,
}
"""Each takes outputs, width, inputs and depth."""
