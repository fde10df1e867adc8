"""The ``torch.nn.Module`` face of a network: the same function, with parameters that it owns."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from modula_agd.device import own_generator
from modula_agd.error import InvalidArgument


@runtime_checkable
class Network(Protocol):
    """What this face needs of a network: that it is a function of named parameters."""

    def __call__(self, params: Mapping[str, Tensor], x: Any, buffers: Mapping[str, Tensor] | None = None) -> Any: ...
    def run(
        self,
        params: Mapping[str, Tensor],
        x: Any,
        buffers: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, dict[str, Tensor]]: ...


class TorchModule(nn.Module):
    """A network with parameters, for code that expects ``torch.nn``: optimizers, hooks, ``state_dict``, ``to``.

    Args:
        network: the function.
        params: its parameters by dotted name; the ``state_dict`` has exactly these names, and the buffers'.
        buffers: its running statistics by dotted name, renewed in place by each training pass.

    Attributes:
        generator: source of dropout's masks, on the batch's device; None for torch's own.
    """

    def __init__(
        self, network: Network, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.generator: torch.Generator | None = None
        for name, value in params.items():
            owner, leaf = self._owner(name)
            owner.register_parameter(leaf, nn.Parameter(value.detach().clone()))
        for name, value in (buffers or {}).items():
            owner, leaf = self._owner(name)
            owner.register_buffer(leaf, value.detach().clone())

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                if hasattr(owner, part):
                    raise InvalidArgument(
                        f"the parameter {name!r} cannot be one of a torch.nn.Module, which has an attribute {part!r} already. Give "
                        "Shared another name."
                    )
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, leaf

    def forward(self, x: Any) -> Any:
        """The network's output for a batch; in training mode with the batch's statistics and dropout."""
        params, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        if not self.training:
            return self.network(params, x, buffers)
        device = next((value.device for value in params.values()), torch.device("cpu"))
        generator = self.generator or own_generator(device)
        outputs, renewed = self.network.run(params, x, buffers, generator)
        with torch.no_grad():
            for name, value in renewed.items():
                buffers[name].copy_(value)
        return outputs

    def extra_repr(self) -> str:
        return repr(self.network)
