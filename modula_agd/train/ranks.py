"""The processes that torchrun starts for one run: each learns from its part of every batch, and rank 0 alone writes.

A batch is that of a run in one process, cut into equal parts; gradients, losses and running statistics are means over the ranks. So
weights are equal on all ranks, and the losses are those of one process, up to rounding. (Batch norm and dropout are as the parts have
them: each part is normalised by its own statistics, and has masks of its own.)
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from modula_agd import Method
from modula_agd.device import precise, usable
from modula_agd.error import InvalidArgument
from modula_agd.exchange import ALONE, Exchange
from modula_agd.placement import everywhere
from modula_agd.train.meter import Meter
from modula_agd.train.seeds import stream
from modula_agd.train.stopping import Stop
from modula_agd.train.task import Batch, Task, fingerprint


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Args:
        rank: which one this is, counted from 0.
        size: how many there are.
        local: which one this is on its machine.
        control: the group in which they tell each other to stop, without waiting for an accelerator.
        restarted: whether torchrun has started them anew.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    control: Any = field(default=None, repr=False)
    restarted: bool = False

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of that name; of "cuda", the one that is this rank's.

        Raises:
            InvalidArgument: there is none, or all ranks would take the same.
        """
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        if self.size > 1 and name.startswith("cuda"):
            if name != "cuda":
                raise InvalidArgument(
                    f"--device {name} was given to {self.size} ranks, which cannot all train on it. Give --device cuda: each rank takes "
                    "the one of its number on its machine."
                )
            name = f"cuda:{self.local}"
        return usable(name)

    def task(self, task: Task, batch_size: int) -> Task:
        """The same task, of whose batches this rank is shown its part.

        Raises:
            InvalidArgument: a batch cannot be cut into equal parts.
        """
        if self.size == 1:
            return task
        shown = task.shown(batch_size)
        if shown % self.size:
            less, more = shown // self.size * self.size, -(-shown // self.size) * self.size
            near = f"{more}" if not less else f"{less} or {more}"
            raise InvalidArgument(
                f"a batch of {shown} samples cannot be cut into equal parts for {self.size} ranks. Give --batch-size {near}, or start "
                "another number of processes."
            )
        return _Part(task, self.rank, self.size)

    def exchange(self, method: Method) -> Exchange:
        """How the ranks share the work of a step."""
        if self.size == 1:
            return ALONE
        import torch.distributed as dist

        from modula_agd.distributed import ManyRanks

        group: Any = dist.group.WORLD
        return ManyRanks(group, {name: everywhere(atom.shape, self.size) for name, atom in method.atoms.items()})

    def masks(self, generator: torch.Generator) -> torch.Generator:
        """Where dropout's masks of this rank's part of a batch come from; it advances a generator that is alike on all ranks."""
        if self.size == 1:
            return generator
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        return stream(int(seed), self.rank, generator.device)

    def joined(self, exchange: Exchange, *parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        """The means over all ranks of what each found for its part of a batch; what is no floating-point number stays."""
        if self.size == 1:
            return tuple(map(dict, parts))
        flat = {
            (index, name): x for index, part in enumerate(parts) for name, x in part.items() if x.is_floating_point()
        }
        means = exchange.means(flat)  # pyright: ignore[reportArgumentType] (any keys do)
        return tuple(
            {name: means.get((index, name), x) for name, x in part.items()}  # pyright: ignore
            for index, part in enumerate(parts)
        )

    def total(self, meter: Meter, like: Tensor) -> Meter:
        """The meters of all ranks as one."""
        if self.size == 1:
            return meter
        import torch.distributed as dist

        none = torch.zeros(2, device=like.device)
        sums = none if meter.sums is None else meter.sums
        told = torch.cat((sums, none.new_tensor([float(meter.count)]))).to(precise(like.device))
        dist.all_reduce(told)
        return Meter(int(told[2]), told[:2].float())

    def asked(self, stop: Stop) -> bool:
        """Whether any rank was asked to stop; all must ask at the same time."""
        if self.size > 1:
            import torch.distributed as dist

            signal = torch.tensor(stop.signal or 0)
            dist.all_reduce(signal, dist.ReduceOp.MAX, group=self.control)
            stop.signal = int(signal) or None
        return bool(stop)


ONE = Ranks()
"""Of a run in one process."""


@dataclass(frozen=True)
class _Part:
    """The part of a task that one rank is shown."""

    whole: Task
    rank: int
    size: int

    @property
    def facts(self) -> Any:
        return self.whole.facts

    @property
    def device(self) -> torch.device:
        return self.whole.device

    @property
    def held_out(self) -> str:
        return self.whole.held_out

    @property
    def fingerprint(self) -> str | None:
        return fingerprint(self.whole)

    def per_epoch(self, batch_size: int) -> int:
        return self.whole.per_epoch(batch_size)

    def shown(self, batch_size: int) -> int:
        return self.whole.shown(batch_size)

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        if self._reads_its_own:
            yield from self._own.batches(batch_size, seed, start)
            return
        for batch in self.whole.batches(batch_size, seed, start):
            yield Batch(*(part.tensor_split(self.size)[self.rank] for part in batch))

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        if self._reads_its_own:
            return self._own.evaluation(batch_size)
        return islice(self.whole.evaluation(batch_size), self.rank, None, self.size)

    @property
    def _reads_its_own(self) -> bool:
        """Whether the task can leave out what other ranks read, as one that reads files should."""
        return hasattr(self.whole, "part")

    @property
    def _own(self) -> Task:
        return replace(self.whole, part=(self.rank, self.size))  # pyright: ignore

    def __str__(self) -> str:
        return f"{self.whole}, in {self.size} parts"


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def restarts() -> tuple[int, int]:
    """How often torchrun has started the processes of this run anew, as far as this machine knows, and how often it may."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 0
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["TORCHELASTIC_MAX_RESTARTS"])


def _meeting() -> dict[str, Any]:
    """Where the processes of torchrun find each other, for ``init_process_group``.

    Those of a restart would read the addresses of the processes before them out of the store that the agent keeps
    (https://github.com/pytorch/pytorch/issues/135712), unless names are told apart. On several machines restarts are not counted alike.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not agent or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        return {}
    import torch.distributed as dist

    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    return {
        "store": dist.PrefixStore(f"modula_agd/{restarts()[0]}", store),  # pyright: ignore[reportPrivateImportUsage]
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


@contextmanager
def gathered(device: str) -> Iterator[Ranks]:
    """A block in which the processes that torchrun has started belong together; of others than the first nothing is printed.

    Args:
        device: the name that ``--device`` gave.
    """
    if not launched():
        yield replace(ONE, restarted=restarts()[0] > 0)
        return
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_cuda else "gloo", **_meeting())
    try:
        control = dist.new_group(backend="gloo") if on_cuda else dist.group.WORLD
        again = torch.tensor(restarts()[0])
        dist.all_reduce(again, dist.ReduceOp.MAX, group=control)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), local, control, bool(again))
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(sys.stdout if ranks.first else nowhere),
        ):
            yield ranks
    finally:
        dist.destroy_process_group()
