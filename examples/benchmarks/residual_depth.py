"""Depth, ceiling depth and first step of residual networks against their number of blocks.

python examples/benchmarks/residual_depth.py
"""

import torch

from modula_agd import ClosedForm, ExactGrowth, ResMLP, SquareLoss, agd, one_hot


def main():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 20, generator=generator)
    inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt()
    targets = one_hot(torch.randint(10, (64,), generator=generator), 10)
    print(
        "| blocks | depth D | ceiling depth D̄ | t, exact growth | t, closed form | guaranteed decrease, exact : closed |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for blocks in (1, 2, 4, 8, 16, 32, 64):
        network = ResMLP(10, 64, 20, blocks)
        params = network.init(0)
        states = []
        for search in (ExactGrowth(), ClosedForm()):
            method = agd(network, SquareLoss(), search=search)
            gradients = torch.func.grad(method.objective)(params, inputs, targets)
            states.append(method.update(gradients, method.init(params), params)[1])
        exact, closed = states
        bound = network.bound()
        print(
            f"| {blocks} | {bound.depth:.2f} | {bound.ceiling:.0f} | {exact.t:.4f} | {closed.t:.6f} | "
            f"{exact.change / closed.change:.1f} |"
        )


if __name__ == "__main__":
    main()
