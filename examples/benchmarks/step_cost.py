"""Milliseconds and state of one optimizer step, against torch.optim.Adam (foreach), side by side in one run.

python examples/benchmarks/step_cost.py [--width 1000] [--depth 10] [--threads 2]
"""

import argparse
import platform
import statistics
import time

import torch
from torch.utils._pytree import tree_leaves

from modula_agd import AGD, Linear, SquareLoss, published


def milliseconds(step, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def state_numbers(optimizer):
    """Numbers held between steps."""
    if isinstance(optimizer, AGD):
        held = optimizer.state_dict()
        return sum(value.numel() for value in tree_leaves((held["agd"], held["average"])))
    return sum(v.numel() for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    network = Linear(options.width, options.width) ** options.depth
    model = network.to_torch(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers = {
        "Adam (foreach)": torch.optim.Adam(model.parameters(), lr=1e-9, foreach=True),
        "AGD, Frobenius, full batch": AGD(model, SquareLoss(), direction="frobenius", momentum=None),
        "AGD, as published": AGD(model, published(network, SquareLoss())),
        "AGD, Frobenius, held-out": AGD(model, SquareLoss(), direction="frobenius", averaging=False),
        "AGD, Frobenius, held-out, averaging": AGD(model, SquareLoss(), direction="frobenius"),
        "AGD, spectral, a direction every step": AGD(model, SquareLoss(), refresh=1, averaging=False),
        "AGD, spectral, held-out (the default)": AGD(model, SquareLoss()),
    }
    times = {name: [] for name in optimizers}
    for index in range(options.rounds + 2):
        # interleaved, so that a noisy minute hits all alike; two rounds to warm up
        for name, optimizer in optimizers.items():
            if "every step" in name and index % 5 != 2:
                continue
            # a direction that serves eight steps is renewed at each of the first eight
            repeats = 8 if "the default" in name else 1
            measured = milliseconds(optimizer.step, repeats)
            times[name] += [statistics.fmean(measured)] if index >= 2 else []
    adam = statistics.median(times["Adam (foreach)"])
    machine = f"{options.threads} threads, torch {torch.__version__}, {platform.machine()}"
    print(f"{options.depth} layers of {options.width}×{options.width}, {machine}\n")
    print("| optimizer | median ms | quartiles | × Adam | numbers of state |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(
            f"| {name} | {median:.1f} | {low:.1f}, {high:.1f} | {median / adam:.2f} | {state_numbers(optimizers[name]):,} |"
        )


if __name__ == "__main__":
    main()
