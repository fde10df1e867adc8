"""Train every model of ``models.py`` for some steps with nothing set, AdamW at its default rate beside it, and write the page.

    python examples/bridge/report.py --data-dir DIR --out docs/models.md

DIR holds ``cifar10/train.parquet`` and ``shakespeare/input.txt``; without it the data are made up.
"""

import argparse
import io
import platform
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import models
import torch

from modula_agd import agd, from_torch

HEAD = """# Models that were written in plain PyTorch

`from_torch(model, example_inputs)` gives any `torch.nn.Module` bounds; `AGD(model, loss, example_inputs=batch)` trains it. What
follows was made by

```
{command}
```

on {day}, {machine}, torch {torch}. Every model has random weights and is trained for {steps} steps on small batches of {data}; the
losses are means over the first three and the last five steps. AGD has nothing set. AdamW has its default rate, 0.001, which nobody
tuned either; it is there to see that a loss falls at an ordinary pace, not as a contest. D is the depth of the captured network.
*Realised/bound* is the largest change of an output over the whole run's first step, divided by what the bound allows: it is an
assumed bound (activations as large as on the example; a perturbation passes as its activation does), so above 1 is possible, and
far below 1 means caution.

"""


@dataclass(frozen=True)
class Row:
    name: str
    parameters: int
    depth: float
    ratio: float
    first: float
    last: float
    adam: float
    table: str


def cifar_and_shakespeare(folder: Path) -> models.Data:
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(folder / "cifar10" / "train.parquet").slice(0, 4096).to_pydict()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows["image"]])
    images = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    text = (folder / "shakespeare" / "input.txt").read_text()[:500_000]
    characters = sorted(set(text))
    place = {character: index for index, character in enumerate(characters)}
    ids = torch.tensor([place[character] for character in text])
    return models.Data(images, torch.tensor(rows["label"]), ids, len(characters))


def losses(task: models.Task, network: object, steps: int) -> tuple[list[float], float]:
    """Loss by step with nothing set, and what the first step's change of outputs was of the bound."""
    method, params = agd(network, task.loss), network.parameters()
    state, generator, values, ratio = method.init(params), torch.Generator().manual_seed(2), [], 0.0
    for number in range(steps):
        batch = task.batch(generator)
        value, updates, state = models.step(task, method, params, state, batch)
        values.append(value)
        before = _outputs(task, batch[0]) if number == 0 else None
        models.move(params, updates)
        if before is not None:
            bound = network.bound(float(state.t))
            moved = network.codomain.norm(_outputs(task, batch[0]) - before).mean()
            ratio = float(moved / (bound.magnitude * (bound.growth - 1)))
    return values, ratio


def losses_of_adamw(task: models.Task, steps: int) -> list[float]:
    """Loss by step on the same batches."""
    adam, generator, values = torch.optim.AdamW(task.model.parameters()), torch.Generator().manual_seed(2), []
    for _ in range(steps):
        inputs, targets = task.batch(generator)
        loss = task.loss(models.applied(task.model, inputs), targets)
        adam.zero_grad()
        loss.backward()
        adam.step()
        values.append(float(loss))
    return values


def _outputs(task: models.Task, inputs: object) -> torch.Tensor:
    """What the model gives in training mode with one and the same dropout."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return models.applied(task.model, inputs)


def row(name: str, data: models.Data, steps: int) -> Row:
    task = models.task(name, data)
    network = from_torch(task.model, task.batch(torch.Generator().manual_seed(1))[0], scores=name != "unet")
    table = str(network)
    values, ratio = losses(task, network, steps)
    adam = losses_of_adamw(models.task(name, data), steps)
    return Row(
        name,
        sum(p.numel() for p in task.model.parameters()),
        float(network.bound().depth),
        ratio,
        sum(values[:3]) / 3,
        sum(values[-5:]) / 5,
        sum(adam[-5:]) / 5,
        table,
    )


def page(rows: list[Row], steps: int, data: str, command: str) -> str:
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread of a CPU"
    lines = [
        HEAD.format(command=command, day=date.today(), machine=machine, torch=torch.__version__, steps=steps, data=data)
    ]
    lines += ["| model | from | parameters | D | realised/bound | first loss | last loss | AdamW's last |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for r in rows:
        _, source, what = models.SOURCES[r.name]
        numbers = f"{r.depth:.3g} | {r.ratio:.2f} | {r.first:.3f} | {r.last:.3f} | {r.adam:.3f}"
        lines.append(f"| {what} | {source} | {r.parameters:,} | {numbers} |")
    lines += ["", "## What each parameter is", ""]
    for r in rows:
        lines += [
            f"<details><summary>{models.SOURCES[r.name][2]}</summary>",
            "",
            "```",
            r.table,
            "```",
            "",
            "</details>",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(models.SOURCES), default=list(models.SOURCES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    models.without_compiled_operators()
    data = cifar_and_shakespeare(arguments.data_dir) if arguments.data_dir else models.made_up()
    rows = []
    for name in arguments.models:
        rows.append(row(name, data, arguments.steps))
        r = rows[-1]
        print(
            f"{name:9} D {r.depth:6.2f}  realised/bound {r.ratio:5.2f}  loss {r.first:.3f} → {r.last:.3f}  AdamW {r.adam:.3f}",
            flush=True,
        )
    if arguments.out:
        what = "CIFAR-10 and tiny Shakespeare" if arguments.data_dir else "made-up data"
        command = "python examples/bridge/report.py --data-dir DIR --out docs/models.md"
        arguments.out.write_text(page(rows, arguments.steps, what, command), encoding="utf-8")


if __name__ == "__main__":
    main()
