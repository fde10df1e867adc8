"""Residual networks against their number of blocks: depth, first step, and how fast they train under either search.

python examples/benchmarks/residual_depth.py [--out runs/residual_depth.png]
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from modula_agd import ClosedForm, CrossEntropy, ExactGrowth, Logits, ResMLP, agd
from modula_agd.train import classification

STEPS, EVERY, WIDTH = 200, 10, 64
BLOCKS = (1, 2, 4, 8, 16, 32, 64)
TRAINED = (4, 16, 64)


def first_steps(inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """A table of bounds, and of the first step of each search."""
    print(
        "| blocks | depth D | ceiling depth D̄ | t, exact growth | t, closed form | guaranteed decrease, exact : closed |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for blocks in BLOCKS:
        network = ResMLP(Logits(10), WIDTH, inputs.shape[1], blocks)
        params = network.init(0)
        states = []
        for search in (ExactGrowth(), ClosedForm()):
            method = agd(network, CrossEntropy(), search=search, momentum=None)
            gradients = torch.func.grad(method.objective)(params, inputs, labels)
            states.append(method.update(gradients, method.init(params), params)[1])
        exact, closed = states
        bound = network.bound()
        print(
            f"| {blocks} | {bound.depth:.2f} | {bound.ceiling:.0f} | {exact.t:.4f} | {closed.t:.6f} | "
            f"{exact.change / closed.change:.1f} |"
        )


def curve(blocks: int, search: ExactGrowth | ClosedForm, inputs: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """The full-batch loss at every tenth step."""
    network = ResMLP(Logits(10), WIDTH, inputs.shape[1], blocks)
    method = agd(network, CrossEntropy(), search=search, momentum=None)
    params = network.init(0)
    state = method.init(params)
    gradient = torch.func.grad_and_value(method.objective)
    values = []
    for step in range(STEPS + 1):
        grads, value = gradient(params, inputs, labels)
        if step % EVERY == 0:
            values.append(float(value))
        updates, state = method.update(grads, state, params)
        params = {name: weight + updates[name] for name, weight in params.items()}
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/residual_depth.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = classification("digits")
    inputs, labels = data.train.inputs.flatten(1), data.train.labels
    inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt()
    first_steps(inputs, labels)

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    print("\n| search | blocks | loss at step 0 | 50 | 100 | 200 |\n| --- | --- | --- | --- | --- | --- |")
    for search, style in ((ExactGrowth(), "-"), (ClosedForm(), "--")):
        for blocks in TRAINED:
            values = curve(blocks, search, inputs, labels)
            name = "exact growth" if style == "-" else "closed form"
            axes.plot(range(0, STEPS + 1, EVERY), values, style, label=f"{name}, {blocks} blocks")
            shown = " | ".join(f"{values[step // EVERY]:.4f}" for step in (0, 50, 100, 200))
            print(f"| {name} | {blocks} | {shown} |")
    axes.set(xlabel="step", ylabel="training loss (cross-entropy, full batch)", yscale="log", title="digits, ResMLP")
    axes.grid(alpha=0.3)
    axes.legend()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
