"""What a step costs on several ranks, measured on gloo processes of this machine, or planned for a large run.

python examples/benchmarks/ranks.py [--width 512] [--depth 6] [--ranks 1 2 4]
python examples/benchmarks/ranks.py --plan [--ranks 64]
"""

import argparse
import math
import statistics
import tempfile
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import modula_agd.distributed as exchange
from modula_agd import AGD, Linear, SquareLoss
from modula_agd.shards import owners

KINDS = ("DDP, each rank makes all", "DDP, each is made once", "FSDP2, each is made once")


class Meter:
    """Seconds in directions and in collectives, and bytes that arrive at this rank."""

    def __init__(self):
        self.seconds, self.bytes, self.size = {"directions": 0.0, "communication": 0.0}, 0, dist.get_world_size()

    @contextmanager
    def timed(self, what):
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    def __getattr__(self, name):
        # all else that the exchange asks of torch.distributed
        return getattr(dist, name)

    def all_reduce(self, x, *rest, **options):
        self.bytes += 2 * x.nbytes * (self.size - 1) // self.size
        with self.timed("communication"):
            dist.all_reduce(x, *rest, **options)

    def broadcast(self, x, source, **options):
        self.bytes += x.nbytes * (source != dist.get_rank())
        with self.timed("communication"):
            # waited for at once: whether it overlaps with anything is not measured
            dist.broadcast(x, source, **{**options, "async_op": False})
        return self

    def wait(self):
        pass

    def all_to_all_single(self, received, sent, sizes, counts, **options):
        self.bytes += received.nbytes - sizes[dist.get_rank()] * received.element_size()
        with self.timed("communication"):
            dist.all_to_all_single(received, sent, sizes, counts, **options)


def measured(kind, network, options):
    model = network.to_torch(0)
    share = None
    if kind.startswith("FSDP"):
        fully_shard(model)
    else:
        model, share = DistributedDataParallel(model), "once" in kind
    optimizer = AGD(model, SquareLoss(), refresh=1, averaging=False, share_directions=share)
    meter, real = Meter(), exchange.directions

    def directions(*arguments, **more):
        with meter.timed("directions"):
            return real(*arguments, **more)

    alone = dist.get_world_size() == 1
    import modula_agd.exchange as single

    target = single if alone and not kind.startswith("FSDP") else exchange
    target.directions = directions
    exchange.dist = meter
    inputs = torch.randn(options.batch // dist.get_world_size(), options.width)
    rows = []
    for _ in range(options.steps + 2):
        meter.seconds, meter.bytes = dict.fromkeys(meter.seconds, 0.0), 0
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        SquareLoss()(model(inputs), inputs).backward()
        middle = time.perf_counter()
        optimizer.step()
        rows.append([middle - start, *meter.seconds.values(), time.perf_counter() - middle, meter.bytes])
    exchange.dist, target.directions = dist, real
    return [statistics.median(column) for column in zip(*rows[2:], strict=True)]


def work(rank, size, folder, options, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    network = Linear(options.width, options.width) ** options.depth
    for kind in KINDS:
        found = torch.tensor(measured(kind, network, options), dtype=torch.float64)
        # the slowest rank is what a step waits for, and the busiest is what a network must carry
        dist.all_reduce(found, dist.ReduceOp.MAX)
        if rank == 0:
            answers.put((kind, found.tolist()))
    dist.destroy_process_group()


def measure(options):
    print(
        f"{options.depth} layers of {options.width}×{options.width}, global batch {options.batch}, a direction of each matrix at "
        f"every step, one thread per rank, medians of {options.steps} steps, the largest over the ranks, torch {torch.__version__}\n"
    )
    print(
        "| ranks | directions | gradient ms | directions ms | communication ms | whole step ms | received per matrix |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in options.ranks:
        context = torch.multiprocessing.get_context("spawn")
        answers = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            processes = [context.Process(target=work, args=(r, size, folder, options, answers)) for r in range(size)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        while not answers.empty():
            kind, (gradient, made, moved, step, received) = answers.get()
            times = " | ".join(f"{1e3 * seconds:.1f}" for seconds in (gradient, made, moved, step))
            print(f"| {size} | {kind} | {times} | {received / options.depth / 1e3:.0f} kB |")


# -- a plan ---------------------------------------------------------------------------------------------------------------------

# of the kind of Llama 2 7B: width 4096, 32 blocks, a gated MLP of 11008, 32000 tokens
WIDTH, BLOCKS, HIDDEN, TOKENS = 4096, 32, 11008, 32000
MATRICES = {"queries": (WIDTH, WIDTH), "keys": (WIDTH, WIDTH), "values": (WIDTH, WIDTH), "output": (WIDTH, WIDTH)}
MATRICES |= {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
# without polar factors: rows
TABLES = {"embedding": (TOKENS, WIDTH), "head": (TOKENS, WIDTH)}

FLOPS, USED = 989e12, 0.4
LINK, FILLED = 50e9, 0.8
BATCH = 4 * 2**20


def flops(shape):
    """Six polynomials, each XXᵀ, its square and one product with X, two operations for each multiplication."""
    short, long = sorted(shape)
    return 2 * 6 * (2 * short**2 * long + short**3)


def plan(ranks):
    names = {f"{block}.{name}": shape for block in range(BLOCKS) for name, shape in MATRICES.items()}
    entries = sum(map(math.prod, names.values()))
    weights = entries + sum(map(math.prod, TABLES.values()))
    owner = owners({name: flops(shape) for name, shape in names.items()}, ranks)
    load, held = [0.0] * ranks, [0] * ranks
    for name, shape in names.items():
        load[owner[name]] += flops(shape)
        held[owner[name]] += math.prod(shape)
    away = (ranks - 1) / ranks
    print(f"{weights / 1e9:.2f}·10⁹ weights, {len(names)} matrices with polar factors, {ranks} ranks\n")
    print("| matrix | shape | flops of its polar factor | collected + handed out, FSDP2 | broadcast, DDP |")
    print("| --- | --- | --- | --- | --- |")
    for name, shape in MATRICES.items():
        there = 4 * math.prod(shape)
        print(
            f"| {name} | {shape[0]}×{shape[1]} | {flops(shape) / 1e12:.2f}·10¹² | {2 * away * there / 1e6:.0f} MB | "
            f"{away * there / 1e6:.0f} MB for each of {ranks} |"
        )
    total = sum(map(flops, names.values()))
    gradient = 6 * weights * BATCH
    # all that a rank collects as an owner, and all that it is handed as a holder of shards
    moved = 4 * away * (max(held) + entries / ranks)
    sent = 4 * away * (entries / ranks + max(held))
    usual = (2 + 4) * weights * away
    rows = [
        ("flops of a gradient, all ranks", f"{gradient:.2e}"),
        ("flops of all directions", f"{total:.2e}, {total / gradient:.1%} of the gradient's"),
        ("busiest rank's directions", f"{max(load):.2e}, {max(load) * ranks / total:.2f} of an equal share"),
        ("bytes that the busiest rank receives for directions", f"{moved / 1e9:.2f} GB (it sends {sent / 1e9:.2f} GB)"),
        ("bytes that FSDP2 moves for weights and gradients anyhow", f"{usual / 1e9:.1f} GB per rank"),
        ("in flight on the busiest owner: lead and direction in float32", f"{2 * 4 * max(held) / 1e9:.2f} GB"),
        (
            "kept per rank: weight, momentum, average in float32, lead and direction in bfloat16",
            f"{16 * weights / ranks / 1e9:.2f} GB",
        ),
        ("seconds of a gradient (assumed speed)", f"{gradient / ranks / FLOPS / USED:.2f}"),
        ("seconds of directions (assumed speed)", f"{max(load) / FLOPS / USED:.3f}"),
        ("seconds of their exchange (assumed link)", f"{moved / LINK / FILLED:.3f}"),
        ("seconds if every rank made all directions", f"{total / FLOPS / USED:.2f}"),
    ]
    print("\n| of one step | |\n| --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(
        f"\nAssumed: {FLOPS / 1e12:.0f}·10¹² flops per second in bfloat16, of which {USED:.0%} are reached; {LINK / 1e9:.0f} GB per second "
        f"and rank, of which {FILLED:.0%} are; {BATCH:,} tokens per step; gradients take 6 flops per weight and token."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    if options.plan:
        plan((options.ranks or [64])[0])
    else:
        options.ranks = options.ranks or [1, 2, 4]
        measure(options)


if __name__ == "__main__":
    main()
