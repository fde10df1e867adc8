"""What ``test_distributed.py`` runs on several ranks: each check is called on every rank of a gloo group, and asserts there.

The reference is the same training in one process on the union of the ranks' batches, which every rank computes for itself.
"""

import contextlib
import copy
import datetime
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from modula_agd import (
    AGD,
    MLP,
    Certified,
    Conv2d,
    CrossEntropy,
    InvalidArgument,
    Linear,
    Logits,
    Mean,
    Module,
    NonFiniteGradient,
    ReLU,
    SquareLoss,
    Tanh,
    agd,
    from_torch,
)
from modula_agd.distributed import ManyRanks
from modula_agd.torch_module import TorchModule
from modula_agd.transformer import GPT

LOSS = CrossEntropy()
# sides that 2 and 4 ranks divide and that they do not; three rows leave one of four ranks without any
WIDE = MLP(Logits(3), 7, 6, 3, bias=True)
PICTURES = Linear(Logits(3), 6) @ Mean() @ ReLU() @ Conv2d(6, 2, 3)
BATCH = 8


def batches(net: Module, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of the net's kind of input, the same on every rank."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if net is PICTURES:
        shown = [noise(BATCH, 2, 5, 5) for _ in range(steps)]
    elif isinstance(net, type(WIDE)) and net is WIDE:
        shown = [noise(BATCH, 6) for _ in range(steps)]
    else:
        tokens = [torch.randint(11, (BATCH, 6), generator=generator) for _ in range(steps)]
        return [(x, x.roll(-1, 1)) for x in tokens]
    return [(x, torch.arange(BATCH) % 3) for x in shown]


def text() -> Module:
    """A transformer of one block: embeddings, fused projections, positions."""
    return GPT(11, 8, 2, 1, 6)


def model_of(net: Module) -> TorchModule:
    return net.to_torch(0, dtype=torch.float64)


def shares(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def train(
    model: nn.Module, optimizer: AGD, data: list[tuple[Tensor, Tensor]], part: Callable[[Tensor], Tensor]
) -> list[float]:
    """Mean losses over all ranks' shares, before each step."""
    losses = []
    for inputs, targets in data:
        optimizer.zero_grad()
        loss = LOSS(model(part(inputs)), part(targets))
        loss.backward()
        optimizer.step(value=loss)
        losses.append(float(optimizer.current.loss))
    return losses


def alone(net: Module, data: list[tuple[Tensor, Tensor]], **options: Any) -> tuple[list[float], TorchModule, AGD]:
    model = model_of(net)
    optimizer = AGD(model, LOSS, **options)
    return train(model, optimizer, data, lambda x: x), model, optimizer


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(found: Any, expected: Any, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-10)


def same_weights(model: nn.Module, reference: nn.Module) -> None:
    for (name, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        close(whole(found.detach()), expected.detach(), rtol=1e-7), name


def same_on_every_rank(model: nn.Module) -> None:
    """Bit for bit."""
    for name, weight in model.named_parameters():
        found = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
        dist.all_gather(found, weight.detach().contiguous())
        assert all(torch.equal(x, weight) for x in found), name


# -- plain data parallelism --------------------------------------------------------------------------------------------------


def ddp_equals_one_process() -> None:
    for net, options in ((WIDE, {}), (WIDE, {"refresh": 3, "decay": 0.1}), (text(), {}), (WIDE, {"sizes": "tracked"})):
        data = batches(net, 20)
        losses, reference, _ = alone(net, data, **options)
        for share in (None, False):
            model = DistributedDataParallel(model_of(net))
            optimizer = AGD(model, LOSS, share_directions=share, **options)
            close(train(model, optimizer, data, shares), losses)
            same_weights(model.module, reference)
            same_on_every_rank(model.module)


def the_module_inside_ddp_will_do() -> None:
    data = batches(WIDE, 5)
    _, reference, _ = alone(WIDE, data)
    for share in (None, True):
        model = DistributedDataParallel(model_of(WIDE))
        optimizer = AGD(model.module, LOSS, share_directions=share)
        train(model, optimizer, data, shares)
        same_weights(model.module, reference)
        same_on_every_rank(model.module)


def a_captured_model_is_the_same_on_every_rank() -> None:
    for sharing in (None, False):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        example = (1.0 + dist.get_rank()) * torch.randn(8, 6, dtype=torch.float64)
        model = DistributedDataParallel(plain)
        optimizer = AGD(model, LOSS, example_inputs=example, share_directions=sharing)
        train(model, optimizer, batches(WIDE, 3), shares)
        same_on_every_rank(plain)
        measured = optimizer.method.network.measured()  # pyright: ignore
        found = [torch.empty_like(measured) for _ in range(dist.get_world_size())]
        dist.all_gather(found, measured)
        assert all(torch.equal(x, measured) for x in found)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    reference = copy.deepcopy(plain)
    data, example = batches(WIDE, 6), torch.ones(8, 6, dtype=torch.float64)
    alone_ = AGD(reference, agd(from_torch(reference, example), LOSS))
    losses = train(reference, alone_, data, lambda x: x)
    method = agd(from_torch(plain, example), LOSS)
    fully_shard(plain)
    close(train(plain, AGD(plain, method), data, shares), losses)
    same_weights(plain, reference)


def one_rank_makes_each_direction() -> None:
    model = DistributedDataParallel(model_of(WIDE))
    optimizer = AGD(model, LOSS)
    made: list[int] = []
    import modula_agd.distributed as module

    real = module.directions
    module.directions = lambda norms, sources, **kwargs: (
        made.extend(map(hash, sources)) or real(norms, sources, **kwargs)
    )
    try:
        train(model, optimizer, batches(WIDE, 1), shares)
    finally:
        module.directions = real
    matrices = [hash(name) for name, w in model.module.named_parameters() if optimizer.method.norms[name].matrices(w)]
    counts = torch.tensor([made.count(name) for name in matrices])
    dist.all_reduce(counts)
    assert counts.tolist() == [1] * len(matrices)


def accumulation_without_reduction() -> None:
    """Micro-batches within ``no_sync()`` are reduced once, at the step."""
    data = batches(WIDE, 12)
    reference = model_of(WIDE)
    expected = AGD(reference, LOSS)
    model = DistributedDataParallel(model_of(WIDE))
    optimizer = AGD(model, LOSS)
    for step in range(4):
        for index, (inputs, targets) in enumerate(data[3 * step : 3 * step + 3]):
            LOSS(reference(inputs), targets).backward()
            expected.accumulate()
            # the last one reduced by DDP, as a usual loop has it
            with model.no_sync() if index < 2 else contextlib.nullcontext():
                LOSS(model(shares(inputs)), shares(targets)).backward()
            optimizer.accumulate()
        expected.step()
        optimizer.step()
    same_weights(model.module, reference)
    same_on_every_rank(model.module)


def a_certified_step_takes_the_evidence_of_all_ranks() -> None:
    net = Linear(3, 5) @ Tanh() @ Linear(5, 4)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(BATCH, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
    model = DistributedDataParallel(model_of(net))
    optimizer = AGD(model, SquareLoss(), search=Certified())
    before = None
    for _ in range(3):
        optimizer.zero_grad()
        SquareLoss()(model(shares(inputs)), shares(targets)).backward()
        params = dict(model.module.named_parameters())
        optimizer.step(evidence=optimizer.method.evidence(params, shares(inputs), shares(targets)))
        value = SquareLoss()(model.module(inputs), targets).item()
        assert before is None or value < before
        before = value
    same_on_every_rank(model.module)


# -- sharded weights -----------------------------------------------------------------------------------------------------------


def sharded(net: Module, mesh: Any = None) -> TorchModule:
    model = model_of(net)
    fully_shard(model, mesh=mesh)
    return model


def _follows(net: Module, steps: int = 30, mesh: Any = None, **options: Any) -> None:
    data = batches(net, steps)
    losses, reference, expected = alone(net, data, **options)
    model = sharded(net, mesh)
    optimizer = AGD(model, LOSS, **options)
    close(train(model, optimizer, data, shares), losses)
    same_weights(model, reference)
    close(optimizer.current.descents, expected.current.descents, rtol=1e-7)
    close(optimizer.current.stretches, expected.current.stretches, rtol=1e-6)
    close(optimizer.current.foreseen, expected.current.foreseen, rtol=1e-6)
    assert (expected.current.foreseen != 0).any() == optimizer.averaging
    assert optimizer.current.eta == expected.current.eta or abs(optimizer.current.eta / expected.current.eta - 1) < 1e-9


def fsdp_equals_one_process() -> None:
    _follows(WIDE)
    _follows(WIDE, refresh=3, decay=0.1)
    _follows(text())


def fsdp_equals_one_process_whatever_the_method() -> None:
    _follows(PICTURES, 6)
    _follows(WIDE, 6, direction="frobenius")
    _follows(text(), 6, direction="frobenius")
    _follows(WIDE, 6, sizes="tracked")
    _follows(WIDE, 6, momentum=None)
    _follows(WIDE, 6, nonfinite="skip")


def what_is_kept_stays_sharded() -> None:
    model = sharded(WIDE)
    optimizer = AGD(model, LOSS, refresh=2)
    train(model, optimizer, batches(WIDE, 3), shares)
    held = dict(model.named_parameters())
    for key in ("momentum_buffer", "lead", "direction", "average"):
        for name, parameter in held.items():
            if key == "direction" and not optimizer.method.norms[name].matrices(parameter):
                continue
            value = optimizer.state[parameter][key]
            assert isinstance(value, DTensor), name
            assert value.placements == held[name].placements
            assert value.to_local().shape == held[name].to_local().shape
            assert value.shape == held[name].shape


def averaged_weights_of_a_sharded_model() -> None:
    data = batches(WIDE, 6)
    _, reference, expected = alone(WIDE, data)
    model = sharded(WIDE)
    optimizer = AGD(model, LOSS)
    train(model, optimizer, data, shares)
    inputs, targets = data[0]
    live = LOSS(model(inputs), targets).item()
    with optimizer.averaged(), expected.averaged(), torch.no_grad():
        mean = LOSS(model(inputs), targets).item()
        close(mean, LOSS(reference(inputs), targets).item())
    with torch.no_grad():
        # weights gathered for the evaluation are not used after it
        assert LOSS(model(inputs), targets).item() == live != mean
    for name, value in optimizer.averaged_state().items():
        close(whole(value), expected.averaged_state()[name])


def accumulation_of_a_sharded_model() -> None:
    data = batches(WIDE, 6)
    reference = model_of(WIDE)
    expected, model = AGD(reference, LOSS), sharded(WIDE)
    optimizer = AGD(model, LOSS)
    for inputs, targets in data:
        LOSS(reference(inputs), targets).backward()
        expected.accumulate()
        LOSS(model(shares(inputs)), shares(targets)).backward()
        optimizer.accumulate()
        if expected._micro.count == 3:
            expected.step()
            optimizer.step()
    same_weights(model, reference)


def every_rank_tells_why() -> None:
    data = batches(WIDE, 6)
    _, _, expected = alone(WIDE, data)
    model = sharded(WIDE)
    optimizer = AGD(model, LOSS)
    train(model, optimizer, data, shares)
    for found, share in zip(optimizer.explain().shares, expected.explain().shares, strict=True):
        close((found.dual, found.descent, found.gives), (share.dual, share.descent, share.gives), rtol=1e-6)


def a_nonfinite_gradient_is_met_on_every_rank() -> None:
    model = sharded(WIDE)
    optimizer = AGD(model, LOSS)
    train(model, optimizer, batches(WIDE, 2), shares)
    before = [w.to_local().clone() for w in model.parameters()]
    weight = next(model.parameters())
    LOSS(model(batches(WIDE, 1)[0][0]), batches(WIDE, 1)[0][1]).backward()
    if dist.get_rank() == 0:
        weight.grad.to_local()[0, 0] = torch.nan
    with pytest.raises(NonFiniteGradient, match=r"'0\.weight'"):
        optimizer.step()
    assert all(torch.equal(w.to_local(), x) for w, x in zip(model.parameters(), before, strict=True))


# -- other placements ----------------------------------------------------------------------------------------------------------


def hybrid_sharding() -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    _follows(WIDE, 8, mesh)
    _follows(text(), 4, mesh)


def _placed(net: Module, mesh: Any, place: Callable[[Tensor], list[Any]], **options: Any) -> None:
    """Weights placed by hand, with gradients placed alike, as a tensor-parallel forward pass would leave them."""
    data = batches(net, 5)
    reference = model_of(net)
    expected = AGD(reference, LOSS, **options)
    model = model_of(net)
    for name, weight in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.register_parameter(
            name.rpartition(".")[2], nn.Parameter(distribute_tensor(weight.detach(), mesh, place(weight)))
        )
    optimizer = AGD(model, LOSS, **options)
    for inputs, targets in data:
        expected.zero_grad()
        LOSS(reference(inputs), targets).backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            # a sum that is not taken yet, as of an output that is split over ranks
            gradient = theirs.grad / dist.get_world_size()
            parts = [Replicate()] * (mesh.ndim - 1)
            if mesh.ndim == 1:
                mine.grad = DTensor.from_local(gradient, mesh, [*parts, Partial()], run_check=False)
            else:
                mine.grad = distribute_tensor(theirs.grad, mesh, place(mine))
        expected.step()
        optimizer.step()
    same_weights(model, reference)


def tensor_parallel_placements() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for net in (WIDE, text()):
        for options in ({}, {"direction": "frobenius"}):
            _placed(net, mesh, lambda w: [Shard(w.ndim - 1)], **options)
            _placed(net, mesh, lambda w: [Replicate()], **options)


def two_dimensional_placements() -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    _placed(WIDE, mesh, lambda w: [Shard(0), Shard(w.ndim - 1)])
    _placed(text(), mesh, lambda w: [Shard(0), Shard(w.ndim - 1)])
    _placed(text(), mesh, lambda w: [Replicate(), Shard(0)], direction="frobenius")


def shards_of_tensor_parallel_shards() -> None:
    """``fully_shard`` over weights that are sharded by rows: each rank's box is where its numbers lie in the whole."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    net = MLP(Logits(8), 8, 6, 3)
    reference, model = model_of(net), model_of(net)
    for name, weight in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        rows = distribute_tensor(weight.detach(), mesh["tensor"], [Shard(0)])
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(rows))
    fully_shard(model, mesh=mesh["data"])
    exchange = AGD(model, LOSS)._exchange
    assert isinstance(exchange, ManyRanks)
    for name, weight in model.named_parameters():
        assert any(type(placement).__name__ == "_StridedShard" for placement in weight.placements), name
        held = exchange.layouts[name].boxes[exchange.rank]
        assert torch.equal(weight.to_local(), reference.get_parameter(name)[held.slices]), name


def a_partial_parameter_is_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = model_of(Linear(3, 6))
    weight = DTensor.from_local(model.get_parameter("weight").detach(), mesh, [Partial()], run_check=False)
    model.register_parameter("weight", nn.Parameter(weight))
    with pytest.raises(InvalidArgument, match=r"'weight' placed as .* not as Partial"):
        AGD(model, SquareLoss())


# -- checkpoints ---------------------------------------------------------------------------------------------------------------

STEPS = 5


def _saved(folder: Path, model: nn.Module, optimizer: AGD) -> None:
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def _loaded(folder: Path, model: nn.Module, optimizer: AGD) -> None:
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state}
    checkpoint.load(found, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])


def a_checkpoint_is_written(folder: Path) -> None:
    """After ``STEPS`` steps, with directions that serve three."""
    data = batches(WIDE, STEPS)
    model = sharded(WIDE)
    optimizer = AGD(model, LOSS, refresh=3)
    train(model, optimizer, data, shares)
    _saved(folder / "sharded", model, optimizer)
    whole_model = DistributedDataParallel(model_of(WIDE))
    optimizer = AGD(whole_model, LOSS, refresh=3)
    train(whole_model, optimizer, data, shares)
    _saved(folder / "replicated", whole_model, optimizer)


def a_checkpoint_goes_on(folder: Path) -> None:
    """On however many ranks, sharded or not, whatever it was written by: the losses of a run that was never stopped."""
    data = batches(WIDE, 3 * STEPS)
    losses, reference, expected = alone(WIDE, data, refresh=3)
    for kind in ("sharded", "replicated"):
        for again in (sharded(WIDE), DistributedDataParallel(model_of(WIDE))):
            with torch.no_grad():
                for weight in again.parameters():
                    weight.mul_(2)
            optimizer = AGD(again, LOSS, refresh=3)
            _loaded(folder / kind, again, optimizer)
            assert optimizer.current.steps == STEPS
            close(train(again, optimizer, data[STEPS:], shares), losses[STEPS:])
            same_weights(again, reference)
            for (name, found), mean in zip(
                optimizer.averaged_state().items(), expected.averaged_state().values(), strict=True
            ):
                close(whole(found), mean), name


def a_whole_state_goes_on_sharded(folder: Path) -> None:
    """What one process saved with ``torch.save``."""
    data = batches(WIDE, 2 * STEPS)
    losses, reference, _ = alone(WIDE, data)
    _, model, optimizer = alone(WIDE, data[:STEPS])
    again = sharded(WIDE)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        mine.data.copy_(distribute_tensor(theirs.detach(), mine.device_mesh, mine.placements))
    resumed = AGD(again, LOSS)
    resumed.load_state_dict(optimizer.state_dict())
    close(train(again, resumed, data[STEPS:], shares), losses[STEPS:])
    same_weights(again, reference)


CHECKS: dict[str, tuple[Callable[..., None], ...]] = {
    "writing": (a_checkpoint_is_written,),
    "going on": (a_checkpoint_goes_on, a_whole_state_goes_on_sharded),
    "two": (
        ddp_equals_one_process,
        the_module_inside_ddp_will_do,
        a_captured_model_is_the_same_on_every_rank,
        one_rank_makes_each_direction,
        accumulation_without_reduction,
        a_certified_step_takes_the_evidence_of_all_ranks,
        fsdp_equals_one_process,
        what_is_kept_stays_sharded,
        averaged_weights_of_a_sharded_model,
        accumulation_of_a_sharded_model,
        every_rank_tells_why,
        a_nonfinite_gradient_is_met_on_every_rank,
        a_partial_parameter_is_refused,
    ),
    "four": (
        ddp_equals_one_process,
        fsdp_equals_one_process,
        fsdp_equals_one_process_whatever_the_method,
        hybrid_sharding,
        tensor_parallel_placements,
        two_dimensional_placements,
        shards_of_tensor_parallel_shards,
        what_is_kept_stays_sharded,
    ),
}


def run(rank: int, size: int, folder: str, which: str, kept: str | None = None) -> None:
    """One rank's part of the checks; what goes wrong is left in a file, one for each check and rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=120),
    )
    for check in CHECKS[which]:
        try:
            check(*([Path(kept)] if kept else []))
        except BaseException:
            Path(folder, f"{check.__name__}.{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
            # the others cannot go on without this one
            sys.exit(1)
    Path(folder, f"done.{rank}").touch()
    dist.destroy_process_group()
