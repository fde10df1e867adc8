"""The training loop: minibatches, one pure update each, an evaluation now and then."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from modula_agd import Method, State
from modula_agd.error import InvalidArgument
from modula_agd.train.checkpoint import save
from modula_agd.train.data import Classification, Examples, batches, batches_per_epoch
from modula_agd.train.extras import require
from modula_agd.train.objective import targets
from modula_agd.train.run_folder import Evaluation, RunFolder

_SHOW_EVERY = 20
_EVALUATION_BATCH = 2048

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long to train and when to look; there is nothing else to schedule.

    Args:
        steps: number of updates, ≥ 1.
        batch_size: samples per minibatch, ≥ 1; the whole training set where it has fewer.
        eval_every: updates between evaluations, ≥ 1.
        seed: of the initial weights and of the shuffles.
    """

    steps: int
    batch_size: int
    eval_every: int
    seed: int

    def __post_init__(self) -> None:
        for what in ("steps", "batch_size", "eval_every"):
            if getattr(self, what) < 1:
                raise InvalidArgument(f"a schedule was made with {what}={getattr(self, what)}; it must be at least 1")


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        params: the last weights.
        state: the optimizer's last state.
        steps: updates made.
        history: one evaluation per line of the log.
        interrupted: whether the user stopped it.
    """

    params: Params
    state: State
    steps: int
    history: tuple[Evaluation, ...]
    interrupted: bool


class _Meter:
    """Sums of loss and hits, kept on the device so that a step waits for nothing."""

    def __init__(self) -> None:
        self.samples = 0
        self.sums: Float[Tensor, " 2"] | None = None

    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        count = len(labels)
        hits = (outputs.argmax(1) == labels).sum()
        sums = torch.stack((loss.detach().float() * count, hits.float()))
        self.sums = sums if self.sums is None else self.sums + sums
        self.samples += count

    def means(self) -> tuple[float | None, float | None]:
        """Mean loss and accuracy; waits for the device."""
        if self.sums is None:
            return None, None
        loss, hits = self.sums.tolist()
        return _finite(loss / self.samples), hits / self.samples


def train(
    method: Method, data: Classification, schedule: Schedule, run: RunFolder | None = None, *, progress: bool = False
) -> Outcome:
    """Train a network from fresh weights on the device that holds the data.

    Args:
        method: made for a network that takes the data's features and gives one output per class.
        data: on the device to train on.
        schedule: how long, and how often to evaluate.
        run: an existing folder for the log and, at each evaluation, the checkpoint.
        progress: show a bar with loss, accuracy and η.

    Returns:
        The outcome; also after a ``KeyboardInterrupt``, which ends the run with what there is.

    Raises:
        NonFiniteGradient: a gradient held NaN or infinity; weights, log and checkpoint are as of the last evaluation.
    """
    require("the progress bar", "tqdm")
    from tqdm import tqdm

    device = data.train.inputs.device
    params = method.network.init(schedule.seed, device=device)
    state = method.init(params)
    aims = targets(method.loss, data.train.labels, data.classes)
    held_out = targets(method.loss, data.validation.labels, data.classes)
    gradient = torch.func.grad_and_value(
        lambda params, inputs, aims: _loss_and_outputs(method, params, inputs, aims), has_aux=True
    )
    per_epoch = batches_per_epoch(len(aims), schedule.batch_size)
    history: list[Evaluation] = []
    meter, step, interrupted = _Meter(), 0, False
    start = time.perf_counter()

    def evaluate(relative_update: dict[str, float | None]) -> None:
        nonlocal meter
        train_loss, train_accuracy = meter.means()
        val_loss, val_accuracy = evaluation(method, params, data.validation, held_out)
        eta = float(state.eta) if step else None
        seconds = round(time.perf_counter() - start, 3)
        epoch = round(step / per_epoch, 6)
        history.append(
            Evaluation(step, epoch, train_loss, train_accuracy, val_loss, val_accuracy, eta, seconds, relative_update)
        )
        meter = _Meter()
        if run is not None:
            run.append(history[-1])
            save(run.checkpoint, params, state, {"step": str(step), "seed": str(schedule.seed)})

    with tqdm(total=schedule.steps, unit="step", disable=not progress, dynamic_ncols=True) as bar:
        try:
            evaluate({})
            for chosen in _indices(len(aims), schedule, device):
                inputs, aim = data.train.inputs.index_select(0, chosen), aims.index_select(0, chosen)
                grads, (value, outputs) = gradient(params, inputs, aim)
                evidence = method.evidence(params, inputs, aim) if method.needs_evidence else None
                updates, after = method.update(grads, state, params, evidence=evidence)
                meter.add(value, outputs, data.train.labels.index_select(0, chosen))
                due = (step + 1) % schedule.eval_every == 0 or step + 1 == schedule.steps
                relative_update = _relative(updates, params) if due else {}
                moved = {name: weight + updates[name] if name in updates else weight for name, weight in params.items()}
                params, state, step = moved, after, step + 1
                if due or step % _SHOW_EVERY == 0:
                    _show(bar, meter, state)
                if due:
                    method.check(state)
                    evaluate(relative_update)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and run is not None:
        save(run.checkpoint, params, state, {"step": str(step), "seed": str(schedule.seed)})
    return Outcome(params, state, step, tuple(history), interrupted)


def evaluation(
    method: Method, params: Mapping[str, Tensor], examples: Examples, aims: Num[Tensor, "batch *target"]
) -> tuple[float | None, float | None]:
    """Mean loss and accuracy over all examples, in batches.

    Args:
        method: gives the network and the loss.
        params: its weights.
        examples: what to evaluate on.
        aims: their targets, as the loss takes them.
    """
    meter = _Meter()
    with torch.no_grad():
        parts = zip(*(part.split(_EVALUATION_BATCH) for part in (*examples, aims)), strict=True)
        for inputs, labels, aim in parts:
            loss, outputs = _loss_and_outputs(method, params, inputs, aim)
            meter.add(loss, outputs, labels)
    return meter.means()


def _loss_and_outputs(method: Method, params: Mapping[str, Tensor], inputs: Tensor, aims: Tensor):
    """``method.objective`` with the outputs beside it, from which the accuracy is read at no further pass."""
    outputs = method.network(params, inputs)
    return method.loss(outputs, aims), outputs


def _indices(count: int, schedule: Schedule, device: torch.device) -> Iterator[Int[Tensor, " batch"]]:
    generator = torch.Generator().manual_seed(schedule.seed)
    for _, chosen in zip(range(schedule.steps), batches(count, schedule.batch_size, generator, device), strict=False):
        yield chosen


def _relative(updates: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, float | None]:
    """‖ΔW‖_F/‖W‖_F of each updated parameter, None where W is 0."""
    if not updates:
        return {}
    ratios = torch.stack([update.norm().float() / params[name].norm().float() for name, update in updates.items()])
    return {name: _finite(ratio) for name, ratio in zip(updates, ratios.tolist(), strict=True)}


def _show(bar, meter: _Meter, state: State) -> None:
    loss, accuracy = meter.means()
    if loss is not None and accuracy is not None:
        bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.1%}, η {float(state.eta):.4f}", refresh=False)


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
