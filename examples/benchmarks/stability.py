"""Does every size of network train with nothing tuned? The cnn and chargpt tasks at depth ×1, ×4 and width ×1, ×4.

python examples/benchmarks/stability.py --data-dir DIR [--task cnn] [--depth 4] [--width 4] [--steps N] [--threads N]

One cell per call, appended as a line to --out. A run ends at its budget, or earlier once its mean training loss over 50 steps
is below the task's goal: half the loss at the start for cnn, 2.3 for chargpt.
"""

import argparse
import json
import statistics
import time
from collections import deque
from pathlib import Path

import torch

from modula_agd import GPT, METHODS, CrossEntropy, Logits, ResNet8
from modula_agd.train import characters, classification
from modula_agd.train.image_task import ImageTask
from modula_agd.train.text_task import TextTask

WINDOW = 50
CONTEXT = 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--task", choices=["cnn", "chargpt"], default="cnn")
    parser.add_argument("--depth", type=int, default=1, help="multiple of the task's number of blocks")
    parser.add_argument("--width", type=int, default=1, help="multiple of the task's width")
    parser.add_argument("--method", choices=list(METHODS), default="held-out")
    parser.add_argument("--plain", action="store_true", help="no normalisation layers (cnn)")
    parser.add_argument("--affine", action="store_true", help="biases and affine parameters")
    parser.add_argument("--steps", type=int, help="instead of the task's budget")
    parser.add_argument("--to-the-end", action="store_true", help="do not stop at the goal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/stability.jsonl"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    extras = {"bias": options.affine, "affine": options.affine}
    if options.task == "cnn":
        task = ImageTask(classification("cifar10", options.data_dir), flat=False).to(options.device)
        norm = "none" if options.plain else "batch"
        network = ResNet8(Logits(10), width=16 * options.width, depth=options.depth, norm=norm, **extras)
        batch, goal = 128, None
        budget = 5 * task.per_epoch(batch)
    else:
        task = TextTask(characters("shakespeare", options.data_dir), CONTEXT).to(options.device)
        tokens = len(task.facts.vocabulary)
        network = GPT(tokens, 128 * options.width, 4, 4 * options.depth, CONTEXT, **extras)
        batch, goal, budget = 12, 2.3, 2000

    method = METHODS[options.method](network, CrossEntropy())
    params = network.init(options.seed, device=options.device)
    state = method.init(params)
    gradient = torch.func.grad_and_value(method.objective)
    recent: deque[float] = deque(maxlen=WINDOW)
    start = time.perf_counter()
    first = reached = None
    highest = 0.0
    step = 0
    for step, (inputs, labels) in enumerate(task.batches(batch, options.seed), start=1):
        grads, value = gradient(params, inputs, labels)
        updates, state = method.update(grads, state, params)
        params = {name: weight + updates[name] for name, weight in params.items()}
        recent.append(float(value))
        first = first if first is not None else recent[0]
        highest = max(highest, recent[-1])
        target = goal if goal is not None else first / 2
        mean = statistics.fmean(recent)
        if step % 100 == 0:
            print(f"step {step}: loss {mean:.4f}, η {float(state.eta):.4f}", flush=True)
        if reached is None and len(recent) == WINDOW and mean < target:
            reached = step
        if step == (options.steps or budget) or (reached and not options.to_the_end):
            break
    bound = network.bound()
    row = {
        "task": options.task,
        "method": options.method,
        "depth": options.depth,
        "width": options.width,
        "plain": options.plain,
        "affine": options.affine,
        "seed": options.seed,
        "parameters": sum(weight.numel() for weight in params.values()),
        "D": round(float(bound.depth), 3),
        "first": round(first or 0.0, 4),
        "highest": round(highest, 4),
        "last": round(statistics.fmean(recent), 4),
        "reached": reached,
        "steps": step,
        "budget": budget,
        "seconds": round(time.perf_counter() - start, 1),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
