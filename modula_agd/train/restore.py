"""A trained network from its run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modula_agd import Module
from modula_agd.error import ModulaError
from modula_agd.train.checkpoint import CheckpointError, load
from modula_agd.train.recipe import KEY, Recipe, recipe
from modula_agd.train.run_folder import RunFolder


class Restored(NamedTuple):
    """A trained network: ``network(average, recipe.inputs(images), average)`` gives its outputs.

    Args:
        network: built anew from the recipe.
        params: its last weights by name, to go on with.
        buffers: its running statistics by name; ``{}`` for most networks.
        average: averaged weights and running statistics, by the names of both, to evaluate.
        recipe: what it was built from, and what the data are.
        state: the optimizer's state by name of its fields.
        step: updates made.
    """

    network: Module
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    average: dict[str, Tensor]
    recipe: Recipe
    state: dict[str, Tensor]
    step: int


def restore(run: Path | str, device: torch.device | str = "cpu", *, best: bool = False) -> Restored:
    """Rebuild the network of a run as of its last checkpoint.

    Args:
        run: a folder that ``modula-agd train`` has written.
        device: where tensors shall live.
        best: as of the checkpoint with the lowest loss on what was set apart instead; only runs with ``--hold-out`` have one.

    Raises:
        CheckpointError: there is no checkpoint, it tells of no architecture, or its weights are not that architecture's.
    """
    folder = RunFolder(Path(run))
    path = folder.best if best else folder.checkpoint
    if not path.is_file():
        which = "a run of modula-agd train with --hold-out" if best else "a run of modula-agd train"
        raise CheckpointError(f"there is no checkpoint {path}. Name the folder of {which}, not a file in it.")
    saved = load(path)
    if KEY not in saved.metadata:
        raise CheckpointError(
            f"{path} does not say which network it belongs to. Pass recipe=... to train, or use load and a network of your own."
        )
    written = recipe(saved.metadata[KEY])
    try:
        network, step = written.network(), int(saved.metadata["step"])
    except (ModulaError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} tells of a network or a step that cannot be: {error}. It is damaged, or was written by another version; train "
            "again with this one."
        ) from error
    # a checkpoint that tells of no average is judged by its last weights
    average = saved.average or {**saved.params, **saved.buffers}
    weights = {name: tuple(atom.shape) for name, atom in network.atoms()}
    statistics = {name: tuple(value.shape) for name, value in network.buffers().items()}
    for what, declared, found in (
        ("weights", weights, saved.params),
        ("running statistics", statistics, saved.buffers),
        ("averaged weights", {**weights, **statistics}, average),
    ):
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        odd = sorted(name for name in declared.keys() | shapes.keys() if declared.get(name) != shapes.get(name))
        if odd:
            raise CheckpointError(
                f"{path} holds other {what} than the {written.arch} that it tells of: {odd[0]} has shape {shapes.get(odd[0])} "
                f"there, {declared.get(odd[0])} here. It was written by another version; train again with this one."
            )
    return Restored(
        network,
        _to(saved.params, device),
        _to(saved.buffers, device),
        _to(average, device),
        written,
        _to(saved.state, device),
        step,
    )


def _to(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}
