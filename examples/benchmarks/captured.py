"""Models in plain PyTorch, captured by AGD with nothing set, against AdamW and SGD over grids of rates with a cosine schedule.

python examples/benchmarks/captured.py --data-dir DIR [--models mlp resnet vgg nanogpt]

The study's mnist, cnn and chargpt (1,000 steps) as someone who knows nothing of this library would write them, and a plain convolutional
network for two epochs of CIFAR-10. Trained on nine tenths of the training data and judged on the last tenth of it; no test split is
read. Prints a row for each run.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import Judge, renew
from passes import TrainingStep
from peers import Runner, cosine
from tasks import TASKS
from torch import Tensor, nn
from torch.nn import functional

from modula_agd import AGD, CrossEntropy, Fading
from modula_agd.train.data import Classification, Examples
from modula_agd.train.text import Characters


class Attending(nn.Module):
    """A block as nanoGPT has it: plain sums of attention and an MLP, each behind a layer norm with a gain."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads, tiny = heads, 0.02 / math.sqrt(2 * layers)
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.mix = _linear(3 * width, width), _linear(width, width, tiny)
        self.up, self.down = _linear(4 * width, width), _linear(width, 4 * width, tiny)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        mixed = functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


def _linear(fan_out: int, fan_in: int, deviation: float = 0.02) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, 0, deviation)
    return layer


class NanoGPT(nn.Module):
    """nanoGPT's network at chargpt's size, its embedding tied to its head."""

    def __init__(self, characters: int, width: int = 128, heads: int = 4, layers: int = 4, context: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, width), nn.Embedding(context, width)
        nn.init.normal_(self.positions.weight, 0, 0.02)
        self.blocks = nn.Sequential(*(Attending(width, heads, layers) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width, bias=False), _linear(characters, width)
        self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))


class Block(nn.Module):
    """Two convolutions with batch norm beside a shortcut, rectified after the sum."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*_normed(fan_in, fan_out, 3, stride), nn.ReLU(), *_normed(fan_out, fan_out, 3, 1))
        changed = stride > 1 or fan_in != fan_out
        self.shortcut = nn.Sequential(*_normed(fan_in, fan_out, 1, stride)) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.branch(x))


def _normed(fan_in: int, fan_out: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(fan_out)


def _resnet(classes: int) -> nn.Module:
    blocks = Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
    return nn.Sequential(*_normed(3, 16, 3, 1), nn.ReLU(), *blocks, *ends)


def _vgg(classes: int) -> nn.Module:
    """Six convolutions without any normalisation, with PyTorch's own initial weights."""
    layers: list[nn.Module] = []
    for fan_in, width, count in ((3, 32, 2), (32, 64, 2), (64, 128, 2)):
        for index in range(count):
            layers += nn.Conv2d(width if index else fan_in, width, 3, padding=1), nn.ReLU()
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, classes))


def _mlp(classes: int) -> nn.Module:
    hidden = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(512, classes))


MODELS: dict[str, tuple[str, float, Callable[[int], nn.Module]]] = {
    "mlp": ("mnist", 1.0, _mlp),
    "resnet": ("cnn", 1.0, _resnet),
    "vgg": ("cnn", 0.4, _vgg),
    "nanogpt": ("chargpt", 0.5, NanoGPT),
}
"""By name: the study's task, the share of its budget, and the model for a number of classes."""
OURS = {"default": {}, "fading": {"decay": Fading()}}
RATES = {
    "mlp": {"adamw": (3.16e-4, 1e-3, 3.16e-3, 1e-2)},
    "resnet": {"adamw": (3.16e-3, 1e-2, 3.16e-2, 0.1), "sgd": (3.16e-2, 0.1, 0.316, 1.0)},
    "vgg": {"adamw": (3.16e-4, 1e-3, 3.16e-3, 1e-2), "sgd": (1e-2, 3.16e-2, 0.1, 0.316)},
    "nanogpt": {"adamw": (1e-3, 3.16e-3, 1e-2)},
}


def runner(model: nn.Module, name: str, peer: str, rate: float | None, example: Tensor, steps: int) -> Runner:
    """An optimizer of that model: this library's, or one with a rate, 5% of warm-up and a cosine to a tenth."""
    if peer in OURS:
        own = AGD(model, CrossEntropy(), example_inputs=example, **OURS[peer])
        return Runner([own], averaged=own.averaged)
    if peer == "sgd":
        return Runner([torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)], cosine(steps))
    gpt = name == "nanogpt"
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1 if gpt else 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return Runner([torch.optim.AdamW(groups, rate, betas=(0.9, 0.99 if gpt else 0.999))], cosine(steps))


def apart(source: Any) -> Any:
    """The same data without its held-out split: nine tenths of the training data to learn from, the rest to judge by.

    The last tenth in order, as in all trials of docs/trials.md; ``source.apart`` draws it instead.
    """
    (field,) = (f for f in source.__dataclass_fields__ if isinstance(getattr(source, f), Classification | Characters))
    data = getattr(source, field)
    if isinstance(data, Characters):
        count = len(data.train) * 9 // 10
        parts = data.train[:count], data.train[count:]
    else:
        count = len(data.train.labels) * 9 // 10
        sides = slice(None, count), slice(count, None)
        parts = [Examples(data.train.inputs[side], data.train.labels[side]) for side in sides]
    return replace(source, **{field: replace(data, train=parts[0], validation=parts[1])})


def run(name: str, peer: str, rate: float | None, source: Any, scale: float, seed: int) -> str:
    """Train once; a row of the table."""
    task, share, make = MODELS[name]
    benchmark, loss = TASKS[task], CrossEntropy()
    steps = max(10, round(scale * share * benchmark.budget(source, benchmark.batch)))
    torch.manual_seed(seed)
    model = make(source.facts.classes).train()
    example = next(iter(source.batches(benchmark.batch, seed)))[0]
    taken = runner(model, name, peer, rate, example, steps)
    training = TrainingStep(model, loss, taken)
    values = [
        training(*batch)[0] for _, batch in zip(range(steps), source.batches(benchmark.batch, seed), strict=False)
    ]
    late = float(torch.stack(values)[-max(1, steps // 10) :].mean())
    judge = Judge(model, loss, 1.0, lambda labels: labels, training, source, benchmark.batch)
    with taken.averaged():
        renew(model, training, source, benchmark.batch)
        end, held = judge.training()[0], judge.held_out()
    shown = "nothing set" if rate is None else f"{rate:.3g}"
    told = " | ".join("not finite" if x is None else f"{x:.4f}" for x in (late, end, *held))
    return f"| {name} | {peer} | {shown} | {told} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--peers", nargs="+", choices=[*OURS, "adamw", "sgd"], default=[*OURS, "adamw", "sgd"])
    parser.add_argument("--scale", type=float, default=1.0, help="budget as a multiple of each model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| model | optimizer | rate | training loss, last tenth | at the end | held out | accuracy |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        source = apart(TASKS[MODELS[name][0]].source(options.data_dir, "cpu"))
        for peer in options.peers:
            for rate in RATES[name].get(peer, ()) if peer not in OURS else (None,):
                print(run(name, peer, rate, source, options.scale, options.seed), flush=True)


if __name__ == "__main__":
    main()
