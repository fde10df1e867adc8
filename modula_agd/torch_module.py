"""The ``torch.nn.Module`` face of a network: the same function, with parameters that it owns."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Network(Protocol):
    """What this face needs of a network: that it is a function of named parameters."""

    def __call__(self, params: Mapping[str, Tensor], x: Any) -> Any: ...


class TorchModule(nn.Module):
    """A network with parameters, for code that expects ``torch.nn``: optimizers, hooks, ``state_dict``, ``to``.

    Args:
        network: the function.
        params: its parameters by dotted name; the ``state_dict`` has exactly these names.
    """

    def __init__(self, network: Network, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        for name, value in params.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(value.detach().clone()))

    def forward(self, x: Any) -> Any:
        """The network's output for a batch."""
        return self.network(dict(self.named_parameters()), x)

    def extra_repr(self) -> str:
        return repr(self.network)
