"""Milliseconds and state of one optimizer step, against torch.optim's Adam and Muon, side by side in one run.

python examples/benchmarks/step_cost.py [--model chain|chargpt|resnet18|chargpt-large] [--device cuda] [--threads 2] [--compile]

On CUDA a step is timed by events of the device, whether it is launched kernel by kernel or replayed as one graph. With --compile the
default is compiled by torch.compile as well, which takes a minute or more; compiled, each step makes its own directions.
"""

import argparse
import platform
import statistics
import time

import torch
from peers import PEERS, Request
from tasks import TASKS
from torch.utils._pytree import tree_leaves

from modula_agd import AGD, Linear, SquareLoss, published

SLOW = 500.0
"""Milliseconds of a step from which an optimizer is measured twice and no more."""
REPEATS = 8
"""Steps timed together: on a CPU a direction serves up to eight, so that every eight cost alike."""


def milliseconds(step, device):
    """Mean of a few steps, made after another."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(REPEATS):
            step()
        return (time.perf_counter() - start) * 1e3 / REPEATS
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    ends[0].record()
    for _ in range(REPEATS):
        step()
    ends[1].record()
    torch.cuda.synchronize()
    return ends[0].elapsed_time(ends[1]) / REPEATS


def replayed(step):
    """An optimizer's step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def state_bytes(optimizers):
    """Bytes held between steps."""
    return sum(x.nbytes for o in optimizers for x in tree_leaves(o.state_dict()) if torch.is_tensor(x))


def candidates(model, loss, device, compiled):
    """Optimizers of the same model and gradients, and what a step of each is."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-9)
    muon = PEERS["muon"](model, Request("", loss, 1e-9, "constant", 1, {}))
    found = {
        "Adam": ([adam], adam.step),
        "Muon, AdamW for the rest": (muon.optimizers, lambda: muon.step(0)),
    }
    if device.type == "cuda":
        fused = torch.optim.Adam(model.parameters(), lr=1e-9, fused=True)
        found["Adam (fused)"] = ([fused], fused.step)
    kinds = {
        "AGD, as published": {"method": published(model.network, loss)},
        "AGD, Frobenius, held-out": {"direction": "frobenius", "averaging": False},
        "AGD, spectral, declared curvature": {"curvature": "declared", "averaging": False},
        "AGD, spectral, measured curvature": {"averaging": False},
        "AGD, the default (averaging)": {},
        "AGD, the default, a direction every step": {"refresh": 1},
    }
    for name, options in kinds.items():
        method = options.pop("method", loss)
        optimizer = AGD(model, method, **options)
        optimizer.param_groups[0]["lr"] = 1e-9
        found[name] = ([optimizer], optimizer.step)
        if device.type == "cuda" and "every step" not in name:
            method = published(model.network, loss) if "published" in name else loss
            graphed = AGD(model, method, capturable=True, **options)
            graphed.param_groups[0]["lr"] = 1e-9
            found[f"{name}, one graph"] = ([graphed], replayed(graphed.step))
    if compiled:
        optimizer = AGD(model, loss, capturable=device.type == "cuda")
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-9, device=device)
        step = torch.compile(optimizer.step)
        # compiled for the first step, and for all others
        for _ in range(2):
            step()
        found["AGD, the default, compiled"] = ([optimizer], step)
        if device.type == "cuda":
            found["AGD, the default, compiled, one graph"] = ([optimizer], replayed(step))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["chain", *TASKS], default="chain")
    parser.add_argument("--width", type=int, default=1000, help="of a chain of Linear layers")
    parser.add_argument("--depth", type=int, default=10, help="of a chain of Linear layers")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="the default by torch.compile, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.model == "chain":
        network, loss = Linear(options.width, options.width) ** options.depth, SquareLoss()
    else:
        classes = 65 if "chargpt" in options.model else 10
        network, loss = TASKS[options.model].network(classes, 1, 1), TASKS[options.model].loss
    model = network.to_torch(0, device=options.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    chosen = candidates(model, loss, options.device, options.compile)
    times = {name: [] for name in chosen}
    for index in range(options.rounds + 2):
        # interleaved, so that a noisy minute hits all alike; two rounds to warm up
        for name, (_, step) in chosen.items():
            if len(times[name]) > 1 and times[name][0] > SLOW:
                continue
            measured = milliseconds(step, options.device)
            times[name] += [measured] if index >= 2 else []
    adam = statistics.median(times["Adam"])
    cuda = options.device.type == "cuda"
    where = torch.cuda.get_device_name(options.device) if cuda else f"{options.threads} threads, {platform.machine()}"
    weights = sum(p.numel() for p in model.parameters())
    print(f"{options.model}, {weights:,} weights, {where}, torch {torch.__version__}\n")
    print("| optimizer | median ms | quartiles | × Adam | state, bytes per weight |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        state = state_bytes(chosen[name][0]) / weights
        print(f"| {name} | {median:.2f} | {low:.2f}, {high:.2f} | {median / adam:.2f} | {state:.2f} |")


if __name__ == "__main__":
    main()
