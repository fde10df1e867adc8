"""The recipes of the guide: AGD in Trainer, Accelerate and Lightning, and its numbers in their loggers."""

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from modula_agd import AGD, MLP, CrossEntropy, Logits, agd, from_torch
from modula_agd.exchange import ALONE
from modula_agd.row_signal import signal
from support import gaussian, same

# these packages import torchvision where it is installed
pytestmark = pytest.mark.usefixtures("torchvision_models")

NET = MLP(Logits(3), 16, 8, 3)
LOSS = CrossEntropy()
X = gaussian(64, 8, dtype=torch.float32)
Y = X[:, :3].argmax(1)
STEPS = 12


def plain(steps: int = STEPS, rate: float = 0.9, batches: int = 1) -> tuple[nn.Module, AGD]:
    """The same training in a loop of one's own."""
    model = NET.to_torch(0)
    optimizer = AGD(model, LOSS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, rate)
    for step in range(steps):
        part = slice(None) if batches == 1 else torch.arange(64).split(64 // batches)[step % batches]
        optimizer.zero_grad()
        loss = LOSS(model(X[part]), Y[part])
        loss.backward()
        optimizer.step(value=loss)
        scheduler.step()
    return model, optimizer


def agree(first: nn.Module, second: nn.Module) -> None:
    """Row by row shuffled batches sum in another order."""
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def logged(folder: Path) -> dict[str, list[float]]:
    """Every scalar of the event files below a folder."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    found: dict[str, list[float]] = {}
    for place in {path.parent for path in folder.rglob("events.out.*")}:
        events = accumulator.EventAccumulator(str(place))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [event.value for event in events.Scalars(tag)]
    return found


# -- a loop of one's own ---------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_step_agree_with_its_explanation_and_with_the_weights() -> None:
    model, optimizer = plain()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.zero_grad()
    rows = signal(optimizer.current, optimizer.method.row_means(optimizer.current, ALONE))
    loss = LOSS(model(X), Y)
    loss.backward()
    optimizer.step(value=loss)
    numbers, told = optimizer.scalars(), optimizer.explain()
    assert numbers["eta"] == told.eta > 0
    assert numbers["t"] == told.t
    assert numbers["descent"] == told.descent
    assert (numbers["asked"], numbers["recent"]) == (told.asked, told.recent)
    assert numbers["smoothed"] == pytest.approx(told.smoothed)
    assert (numbers["predicted"], numbers["realised"]) == (pytest.approx(told.predicted), pytest.approx(told.realised))
    assert numbers["steps"] == STEPS + 1
    assert numbers["skipped"] == 0
    for share in told.shares:
        assert numbers[f"step/{share.name}"] == pytest.approx(share.moved)
        # singular values of a polar factor end between 0.997 and 1
        moved = NET.weights()[share.name].norm.size(model.get_parameter(share.name).detach() - before[share.name])
        # rows with noise go less far
        place = optimizer.method.row_places.get(share.name)
        longest = float(rows[place].max()) if place is not None else 1.0
        assert share.moved * longest == pytest.approx(float(moved), rel=3e-3)
    fresh = AGD(NET.to_torch(0), LOSS).scalars()
    assert fresh["steps"] == fresh["eta"] == fresh["step/0.weight"] == 0
    assert "predicted" not in fresh
    assert not {"asked", "recent"} & AGD(NET.to_torch(0), LOSS, step_average=None).scalars().keys()


def test_tensorboard_shows_the_steps(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    model = NET.to_torch(0)
    optimizer, etas = AGD(model, LOSS), []
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for step in range(5):
            optimizer.zero_grad()
            loss = LOSS(model(X), Y)
            loss.backward()
            optimizer.step(value=loss)
            for name, value in optimizer.scalars().items():
                writer.add_scalar(f"agd/{name}", value, step)
            etas.append(optimizer.scalars()["eta"])
    found = logged(tmp_path)
    assert found["agd/eta"] == pytest.approx(etas)
    assert len(found["agd/step/0.weight"]) == 5
    assert len(found["agd/realised"]) == 4


# -- Hugging Face Trainer --------------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    """A network as ``Trainer`` wants it: labels in, loss and logits out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(inputs)
        return {"loss": LOSS(logits, labels), "logits": logits}


ROWS = [{"inputs": x, "labels": y} for x, y in zip(X, Y, strict=True)]


@pytest.fixture
def transformers() -> Any:
    with warnings.catch_warnings():
        # of its own dependencies, while they are imported
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        pytest.importorskip("accelerate", reason="accelerate is not installed")
        return pytest.importorskip("transformers", reason="transformers is not installed")


def trainer(transformers: Any, folder: Path, steps: int, **options: Any) -> Any:
    class AGDTrainer(transformers.Trainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log({**logs, **optimizer.scalars()}, start_time)

    model = WithLoss(NET.to_torch(0))
    optimizer = AGD(model, LOSS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=64,
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        **{"report_to": "none", "save_strategy": "no", **options},
    )
    return AGDTrainer(
        model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS, optimizers=(optimizer, scheduler)
    ), optimizer


def test_trainer_trains_as_a_loop_of_ones_own_and_logs_the_steps(transformers, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    run, optimizer = trainer(transformers, tmp_path, STEPS, report_to="tensorboard")
    run.train()
    agree(run.model.net, plain()[0])
    history = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(history) == STEPS
    assert [entry["steps"] for entry in history] == list(range(1, STEPS + 1))
    assert history[-1]["eta"] == optimizer.scalars()["eta"] > 0
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert len(logged(tmp_path)["train/eta"]) >= STEPS
    with optimizer.averaged():
        assert run.evaluate()["eval_loss"] < history[0]["loss"]


def test_a_callback_sees_the_steps_too(transformers, tmp_path: Path) -> None:
    run, optimizer = trainer(transformers, tmp_path, 4)
    seen = []

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **options) -> None:
            seen.append((state.global_step, optimizer.scalars()["step/0.weight"]))

    run.add_callback(Steps())
    run.train()
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(moved > 0 for _, moved in seen)


def test_trainer_resumes_from_its_checkpoint_bit_for_bit(transformers, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole, straight = trainer(transformers, tmp_path / "whole", 8, **saving)
    whole.train()
    half, optimizer = trainer(transformers, tmp_path / "half", 8, **saving)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(whole.model.state_dict(), half.model.state_dict())
    assert same(straight.state_dict(), optimizer.state_dict())


def test_trainer_accumulates_gradients_and_autocasts(transformers, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "bf16": True}
    model = WithLoss(NET.to_torch(0))
    optimizer = AGD(model, LOSS)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=40,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    before = float(LOSS(model.net(X), Y).detach())
    transformers.Trainer(model=model, args=arguments, train_dataset=ROWS, optimizers=(optimizer, None)).train()
    assert int(optimizer.current.steps) == 40
    assert float(LOSS(model.net(X), Y).detach()) < 0.7 * before


def test_trainer_trains_a_model_that_knows_nothing_of_bounds(transformers, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = (torch.arange(64 * 8).reshape(64, 8) * 3) % 11
    network = from_torch(model, {"input_ids": ids[:8]}, output="logits")
    optimizer = AGD(model, agd(network, LOSS))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=16,
        max_grad_norm=0.0,
        logging_steps=5,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    run = transformers.Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.85 * losses[0]


# -- Accelerate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate_trains_saves_and_loads(accumulation: int, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    # one Accelerator of a process decides on the precision of all
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    def prepared(seed: int) -> tuple[Any, ...]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        model = NET.to_torch(seed)
        mine = AGD(model, LOSS)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(mine, 0.9)
        loader = DataLoader(TensorDataset(X, Y), 64 // accumulation)
        return accelerator, mine, *accelerator.prepare(model, mine, loader, scheduler)

    def train(accelerator, mine, model, optimizer, loader, scheduler, epochs: int) -> None:
        for _ in range(epochs):
            for x, y in loader:
                with accelerator.accumulate(model):
                    loss = LOSS(model(x), y)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    accelerator.log(mine.scalars())

    first = prepared(0)
    assert first[3].optimizer is first[1]
    train(*first, STEPS)
    agree(first[2], plain()[0])
    first[0].save_state(str(tmp_path))
    second = prepared(1)
    second[0].load_state(str(tmp_path))
    train(*first, 3)
    train(*second, 3)
    assert same(first[2].state_dict(), second[2].state_dict())
    assert same(first[1].state_dict(), second[1].state_dict())


# -- Lightning -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return pytest.importorskip("lightning", reason="lightning is not installed")


def lightning_module(lightning: Any, automatic: bool) -> Any:
    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = NET.to_torch(0)
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> dict[str, Any]:
            self.agd = AGD(self.net, LOSS)
            return {
                "optimizer": self.agd,
                "lr_scheduler": {
                    "scheduler": torch.optim.lr_scheduler.ExponentialLR(self.agd, 0.9),
                    "interval": "step",
                },
            }

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            x, y = batch
            if automatic:
                return LOSS(self.net(x), y)
            optimizer = self.optimizers()
            # every second micro-batch is held out from the direction
            for rows in torch.arange(len(x)).split(32):
                self.manual_backward(LOSS(self.net(x[rows]), y[rows]))
                optimizer.accumulate()
            optimizer.step()
            # Lightning's wrapper, which copies attributes, tells the same
            assert optimizer.scalars() == self.agd.scalars()
            self.lr_schedulers().step()
            return LOSS(self.net(x), y)

        def on_train_batch_end(self, *_: Any) -> None:
            self.log_dict(self.agd.scalars(), on_step=True, on_epoch=False)

    return Classifier()


def fit(lightning: Any, module: Any, folder: Path, steps: int, **options: Any) -> Any:
    run = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=lightning.pytorch.loggers.CSVLogger(str(folder)),
    )
    run.fit(module, DataLoader(TensorDataset(X, Y), 64), **options)
    return run


QUIET = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*The number of training batches.*",
    "ignore:.*LeafSpec.*",
    "ignore:.*mid-epoch checkpoint.*",
)


@QUIET
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_lightning_trains_and_logs_the_steps(lightning, tmp_path: Path, automatic: bool) -> None:
    module = lightning_module(lightning, automatic)
    run = fit(lightning, module, tmp_path, STEPS)
    with open(Path(run.logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["eta"]]
    assert [float(row["steps"]) for row in rows] == list(range(1, STEPS + 1))
    assert float(rows[-1]["eta"]) == pytest.approx(module.agd.scalars()["eta"])
    assert float(rows[-1]["step/0.weight"]) > 0
    if automatic:
        agree(module.net, plain()[0])
        # the closure told the loss
        assert float(rows[-1]["realised"]) > 0
    else:
        assert float(LOSS(module.net(X), Y).detach()) < 0.8 * float(LOSS(NET.to_torch(0)(X), Y).detach())
    with module.agd.averaged():
        assert float(LOSS(module.net(X), Y).detach()) < float(LOSS(NET.to_torch(0)(X), Y).detach())


@QUIET
def test_lightning_resumes_from_its_checkpoint_bit_for_bit(lightning, tmp_path: Path) -> None:
    straight, first, second = (lightning_module(lightning, True) for _ in range(3))
    fit(lightning, straight, tmp_path / "straight", 8)
    path = tmp_path / "half.ckpt"
    fit(lightning, first, tmp_path / "first", 4).save_checkpoint(path)
    fit(lightning, second, tmp_path / "second", 8, ckpt_path=str(path))
    assert same(straight.net.state_dict(), second.net.state_dict())
    assert same(straight.agd.state_dict(), second.agd.state_dict())
