"""From a model that PyTorch has spread over processes to what the engine needs: tensors of this process, and who holds the rest.

``DistributedDataParallel`` keeps every weight whole on every rank. ``fully_shard`` and ``distribute_tensor`` make each weight a
``DTensor``, which says how it is split over the dimensions of a mesh of ranks.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modula_agd.error import InvalidArgument
from modula_agd.exchange import ALONE, Exchange
from modula_agd.shards import Box, Layout, Split, box


def is_spread(x: object) -> bool:
    """Whether x is a ``DTensor``; asked without importing what has them, which takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return x._local_tensor if is_spread(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def local_gradient(gradient: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a parameter's gradient, split as the parameter is.

    Autograd may leave a gradient split otherwise than its parameter, or as a sum that is still to be taken.
    """
    if not is_spread(gradient):
        return gradient
    if is_spread(parameter) and gradient.placements != parameter.placements:  # pyright: ignore
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)  # pyright: ignore
    return local(gradient)


def spread(x: Tensor, like: Tensor) -> Tensor:
    """The tensor of which x is what this process holds, split as ``like`` is; x itself where that is whole."""
    if not is_spread(like) or is_spread(x):
        return x
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        x,
        like.device_mesh,  # pyright: ignore[reportAttributeAccessIssue]
        like.placements,  # pyright: ignore[reportAttributeAccessIssue]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def placed(x: Tensor, like: Tensor) -> Tensor:
    """The tensor split as ``like`` is, of whose shape it is; all ranks must ask."""
    if is_spread(x) and not is_spread(like):
        return x.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    if not is_spread(like):
        return x
    if is_spread(x):
        return x.redistribute(like.device_mesh, like.placements)  # pyright: ignore[reportAttributeAccessIssue]
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements)  # pyright: ignore[reportAttributeAccessIssue]


def data_parallel(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The model itself, or the part of it, that is ``DistributedDataParallel``."""
    return next((part for part in model.modules() if isinstance(part, nn.parallel.DistributedDataParallel)), None)


def skips_reduction(replicas: nn.parallel.DistributedDataParallel | None) -> bool:
    """Whether the gradients that ``backward`` left may be each rank's own, as within ``no_sync()``."""
    # the second tells of the last forward pass, after the block too
    return replicas is not None and not (replicas.require_backward_grad_sync and replicas.require_forward_param_sync)


def reshard(model: nn.Module) -> None:
    """Let ``fully_shard`` forget the whole weights that it may hold from a forward pass, as their shards were written over."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        for part in model.modules():
            if isinstance(part, module.FSDPModule):
                part.reshard()  # pyright: ignore[reportCallIssue]


def exchange_of(
    params: Mapping[str, Tensor], replicas: nn.parallel.DistributedDataParallel | None, share: bool | None
) -> Exchange:
    """How the ranks that hold a model exchange what a step needs.

    Args:
        params: of the network by name, in its order.
        replicas: the model's ``DistributedDataParallel``.
        share: whether each direction is made on one rank where all ranks hold all weights; None where
            ``DistributedDataParallel`` tells which ranks these are.

    Raises:
        InvalidArgument: a parameter is placed in a way that no step can be taken with.
    """
    meshes: list[Any] = []
    for parameter in params.values():
        if is_spread(parameter) and parameter.device_mesh not in meshes:  # pyright: ignore
            meshes.append(parameter.device_mesh)  # pyright: ignore
    if len(meshes) > 1:
        raise InvalidArgument(
            f"AGD was given parameters on {len(meshes)} device meshes: {', '.join(map(str, meshes))}. Its step is one number for the "
            "whole network; distribute all parameters over one mesh, replicated where they are not sharded."
        )
    if not meshes:
        return _replicated(replicas, params, share)
    from modula_agd.distributed import ManyRanks

    group, coordinates = _ranks(meshes[0])
    layouts = {name: _layout(name, parameter, meshes[0], coordinates) for name, parameter in params.items()}
    exchange = ManyRanks(group, layouts)
    for name, parameter in params.items():
        held, told = tuple(local(parameter).shape), exchange.shape(name, tuple(parameter.shape))
        if held != told:
            raise InvalidArgument(
                f"rank {exchange.rank} holds {held} of the parameter {name!r}, where {_placements(parameter)} of "
                f"{tuple(parameter.shape)} would be {told}. Shard parameters with fully_shard or distribute_tensor."
            )
    return exchange


def _replicated(
    replicas: nn.parallel.DistributedDataParallel | None, params: Mapping[str, Tensor], share: bool | None
) -> Exchange:
    """Of ranks that all hold all weights."""
    import torch.distributed as dist

    if replicas is None and not share:
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidArgument(
            "AGD was asked to share directions among ranks, but there is no process group. Call "
            "torch.distributed.init_process_group first, as under torchrun, or leave share_directions out."
        )
    group: Any = dist.group.WORLD if replicas is None else replicas.process_group
    size = dist.get_world_size(group)
    if size == 1:
        return ALONE
    from modula_agd.distributed import ManyRanks

    layouts = {name: everywhere(tuple(parameter.shape), size) for name, parameter in params.items()}
    return ManyRanks(group, layouts, share=share is not False)


def everywhere(shape: tuple[int, ...], size: int) -> Layout:
    """Of a weight that all of so many ranks hold whole."""
    return Layout(shape, (Box((0,) * len(shape), shape),) * size)


def _ranks(mesh: Any) -> tuple[Any, list[tuple[int, ...]]]:
    """The process group of a mesh, and the place in the mesh of each rank of the group."""
    import torch.distributed as dist

    if mesh.ndim == 1:
        group = mesh.get_group()
    elif mesh.size() == dist.get_world_size():
        group = dist.group.WORLD
    else:
        group = mesh._flatten().get_group()
    places = {int(rank): tuple(place) for place, rank in _enumerated(mesh.mesh)}
    return group, [places[rank] for rank in dist.get_process_group_ranks(group)]


def _enumerated(ranks: Tensor) -> list[tuple[list[int], int]]:
    return [(place, int(ranks[tuple(place)])) for place in torch.ones_like(ranks).nonzero().tolist()]


def _layout(name: str, parameter: Tensor, mesh: Any, coordinates: list[tuple[int, ...]]) -> Layout:
    from torch.distributed.tensor import Replicate, Shard

    if not is_spread(parameter):
        return everywhere(tuple(parameter.shape), len(coordinates))
    shape = tuple(parameter.shape)
    order: list[tuple[bool, int]] = []
    for axis, placement in enumerate(parameter.placements):  # pyright: ignore[reportAttributeAccessIssue]
        strided = type(placement).__name__ == "_StridedShard"
        if not (strided or isinstance(placement, Shard | Replicate)):
            raise InvalidArgument(
                f"AGD was given the parameter {name!r} placed as {_placements(parameter)}; a step takes parameters placed as "
                f"Shard or Replicate, not as {type(placement).__name__}. Redistribute it before building the optimizer."
            )
        order.append((strided, axis))
    boxes = []
    for place in coordinates:
        splits = []
        # what is strided is split last: fully_shard over what a tensor-parallel plan has sharded
        for _, axis in sorted(order):
            placement = parameter.placements[axis]  # pyright: ignore[reportAttributeAccessIssue]
            dim = None if isinstance(placement, Replicate) else placement.dim % len(shape)
            splits.append(Split(dim, mesh.size(axis), place[axis]))
        boxes.append(box(shape, splits))
    return Layout(shape, tuple(boxes))


def _placements(parameter: Tensor) -> str:
    return str(parameter.placements) if is_spread(parameter) else "Replicate"  # pyright: ignore
