"""What an update is given, looked at before anything is computed: names, shapes, kinds.

Values are looked at where the caller may wait for them: on a CPU.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modula_agd.error import InvalidArgument, NonFiniteGradient
from modula_agd.majorisation import Evidence
from modula_agd.norm import wide
from modula_agd.run import Weighted
from modula_agd.space import brief
from modula_agd.state import WEIGHT_SIZED, Scalar, State, odd_tensors


def check_parameters(atoms: Mapping[str, Weighted], params: Mapping[str, Tensor]) -> None:
    """Raise ``InvalidArgument`` unless the parameters are those that the atoms declare."""
    _check_named("init", params)
    if set(params) != set(atoms):
        raise InvalidArgument(
            f"the method was built for a network with parameters {sorted(atoms)}, but was given {sorted(params)}. "
            "Pass what network.init() returns."
        )
    _check_shapes({name: atom.shape for name, atom in atoms.items()}, params)


def check_update(
    atoms: Mapping[str, Weighted],
    grads: Mapping[str, Tensor | None],
    state: State,
    params: Mapping[str, Tensor],
    evidence: Evidence | None,
    shapes: Mapping[str, tuple[int, ...]],
    rows: int,
) -> None:
    """Raise ``InvalidArgument`` where something that an update takes is not what it should be, of the shapes that this process holds."""
    if not isinstance(grads, Mapping) or not isinstance(state, State):
        raise InvalidArgument(
            f"update takes gradients by name and a state, but got {type(grads).__name__} and {type(state).__name__}. "
            "Call method.update(grads, state, params) with the state that method.init(params) returned."
        )
    _check_named("update", params)
    missing = atoms.keys() - params.keys()
    if missing:
        raise InvalidArgument(f"update was given parameters without {sorted(missing)}. Pass all of the network's.")
    _check_shapes(shapes, params)
    if evidence is not None and not (isinstance(evidence, Evidence) and all(isinstance(x, Tensor) for x in evidence)):
        raise InvalidArgument(
            f"update was given evidence {evidence!r}. Pass evidence=method.evidence(params, inputs, targets) of the same batch."
        )
    for what in WEIGHT_SIZED:
        odd = odd_tensors(what, getattr(state, what), shapes)
        if odd is not None:
            raise InvalidArgument(
                f"update was given the state of another method: {odd}. Pass the state that init or the last update returned."
            )
    if not state.powers.shape == state.power_weights.shape == state.mean_weights.shape == (rows,):
        raise InvalidArgument(
            f"update was given the state of another method: it tells the signal of {state.powers.numel()} rows, where this one asks for "
            f"that of {rows}, by its network and its option rows. Pass the state that init or the last update returned."
        )
    if state.momentum.keys() != state.lead.keys():
        raise InvalidArgument(
            "update was given a state whose lead is not of the parameters that its momentum is of, as one of an older version. Pass the "
            "state that init or the last update returned."
        )
    check_gradients(atoms, grads, params)


def check_average(average: object, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``InvalidArgument`` unless averaged weights are tensors of the shapes of parameters; others may be among them."""
    if average is None:
        return
    known, odd = average, None
    if isinstance(average, Mapping):
        known = {name: value for name, value in average.items() if name in shapes}
        if average and not known:
            odd = f"its names are {brief(sorted(map(str, average)))}, and none is a parameter's"
    odd = odd or odd_tensors("average", known, shapes)
    if odd is not None:
        raise InvalidArgument(
            f"update was given averaged weights that are not the network's: {odd}. Pass what averaging.averaged returned of its "
            "parameters, or leave average out."
        )


def check_gradients(
    atoms: Mapping[str, Weighted], grads: Mapping[str, Tensor | None], params: Mapping[str, Tensor]
) -> None:
    """Raise ``InvalidArgument`` for a gradient that no step takes: of no parameter, of another shape, sparse, not floating."""
    for name, gradient in grads.items():
        if name not in atoms:
            raise InvalidArgument(
                f"a gradient was given for {name!r}, which is not among the parameters {sorted(atoms)}"
            )
        if gradient is None:
            continue
        if not isinstance(gradient, Tensor):
            raise InvalidArgument(f"the gradient of {name!r} is {type(gradient).__name__}, where a tensor belongs")
        if gradient.layout != torch.strided or not gradient.is_floating_point():
            raise InvalidArgument(
                f"the gradient of {name!r} is {gradient.layout} of {gradient.dtype}; a step takes dense floating-point ones"
            )
        if gradient.shape != params[name].shape:
            raise InvalidArgument(
                f"the gradient of {name!r} has shape {tuple(gradient.shape)}, the parameter {tuple(params[name].shape)}"
            )


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], params: Mapping[str, Tensor]) -> None:
    for name, shape in shapes.items():
        if tuple(params[name].shape) != shape:
            raise InvalidArgument(
                f"parameter {name!r} has shape {tuple(params[name].shape)}, but its module declares {shape}"
            )


def check_finite(values: Mapping[str, float]) -> None:
    """Raise ``NonFiniteGradient`` with the names of parameters whose number is NaN or infinite."""
    names = [name for name, value in values.items() if not abs(value) < float("inf")]
    if names:
        raise NonFiniteGradient(
            f"the gradient of {', '.join(map(repr, names))} holds NaN or infinity, or overflows in its dtype (or its weight "
            "does, where sizes are tracked); no weight was changed. Look for overflow in the loss or corrupt inputs, or pass "
            "nonfinite='skip' to leave such batches out and count them."
        )


def check_step(t: Scalar, evidence: Evidence | None) -> None:
    """Raise ``InvalidArgument`` where the evidence of a batch, or the step that it led to, is no number that can be used."""
    told = torch.stack([wide(x.detach()) for x in evidence]) if evidence is not None else None
    if evidence is not None and told is not None and not bool((told.isfinite() & (told >= 0)).all()):
        raise InvalidArgument(
            f"update was given R = {float(evidence.residual)} and an input magnitude of {float(evidence.magnitude)}, which must "
            "be finite and ≥ 0. Pass evidence=method.evidence(params, inputs, targets) of the same batch."
        )
    if not bool(t.isfinite()):
        raise InvalidArgument(
            f"the step came out as {float(t)}; no weight was changed. Look for a size, a magnitude or a factor in the network "
            "that is so small or so large that its square leaves the range of numbers."
        )


def loss_told(value: object, state: State) -> Scalar | None:
    """The loss that an update was told, as a 0-d tensor on the state's device; None where it was told none.

    Raises:
        InvalidArgument: it is no single real number.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.full_like(state.loss, value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
        return wide(value.detach()).reshape(()).to(state.loss.device)
    what = f"a tensor of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else repr(value)
    raise InvalidArgument(
        f"an update was told the loss {what}. Pass value=loss, the mean loss of the batch as one number."
    )


def _check_named(what: str, params: object) -> None:
    if not isinstance(params, Mapping):
        raise InvalidArgument(
            f"{what} takes parameters by name, but got {type(params).__name__}. Pass the dictionary that network.init() returns, or "
            "dict(model.named_parameters())."
        )
