"""Models that nobody here wrote, small enough for a CPU, with random weights: what ``from_torch`` is tried on.

Each is a function that gives the model, the loss, and a function from a random generator to a batch: inputs as its forward takes
them, and targets. ``SOURCES`` says whence each is.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modula_agd import CrossEntropy, Loss, Method, SquareLoss, State

Batch = tuple[Any, Tensor]
_LIBRARIES: list[torch.library.Library] = []
"""Kept, as what they define goes with them."""


def without_compiled_operators() -> None:
    """Let torchvision's models, which are Python, also load beside a torch that its compiled operators were not built for.

    Other packages import torchvision wherever it is installed, and fail with it.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _LIBRARIES[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@dataclass(frozen=True)
class Data:
    """What batches are drawn from.

    Args:
        images: [n, 3, 32, 32], standardised.
        labels: [n], 10 classes.
        text: ids of characters, [m].
        characters: how many distinct.
    """

    images: Tensor
    labels: Tensor
    text: Tensor
    characters: int

    def pictures(self, count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random pictures of that side, with their labels."""
        index = torch.randint(len(self.images), (count,), generator=generator)
        x = self.images[index]
        return (x if side == x.shape[-1] else nn.functional.interpolate(x, size=(side, side))), self.labels[index]

    def lines(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random stretches of the text, and the same one character later."""
        starts = torch.randint(len(self.text) - length - 1, (count,), generator=generator)
        rows = torch.stack([self.text[start : start + length + 1] for start in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]


@dataclass(frozen=True)
class Task:
    """A model with what it is trained on."""

    model: nn.Module
    loss: Loss
    batch: Callable[[torch.Generator], Batch]


def made_up(seed: int = 0) -> Data:
    """Data that can be learnt and needs no file: ten blurred patterns with noise, and a text in which each character tells the next."""
    generator = torch.Generator().manual_seed(seed)
    patterns = nn.functional.interpolate(torch.randn(10, 3, 8, 8, generator=generator), size=(32, 32))
    labels = torch.randint(10, (512,), generator=generator)
    images = patterns[labels] + 0.5 * torch.randn(512, 3, 32, 32, generator=generator)
    ids = [0]
    following = torch.randint(32, (32, 2), generator=generator)
    for choice in torch.randint(2, (5000,), generator=generator).tolist():
        ids.append(int(following[ids[-1], choice]))
    return Data(images / images.std(), labels, torch.tensor(ids), 32)


def pictures(model: nn.Module, data: Data, count: int, side: int) -> Task:
    return Task(model, CrossEntropy(), lambda generator: data.pictures(count, side, generator))


def resnet18(data: Data) -> Task:
    import torchvision

    return pictures(torchvision.models.resnet18(num_classes=10), data, 32, 32)


def resnet50(data: Data) -> Task:
    import torchvision

    return pictures(torchvision.models.resnet50(num_classes=10), data, 32, 32)


def vit(data: Data) -> Task:
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return pictures(timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes), data, 32, 32)


def convnext(data: Data) -> Task:
    import timm

    model = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), num_classes=10)
    return pictures(model, data, 16, 64)


def lines(model: nn.Module, data: Data, name: str = "") -> Task:
    def batch(generator: torch.Generator) -> Batch:
        x, y = data.lines(16, 32, generator)
        return ({name: x} if name else x), y

    return Task(model, CrossEntropy(), batch)


def gpt2(data: Data) -> Task:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return lines(GPT2LMHeadModel(GPT2Config(vocab_size=data.characters, **sizes)), data, "input_ids")


def llama(data: Data) -> Task:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return lines(LlamaForCausalLM(LlamaConfig(vocab_size=data.characters, **sizes, **heads)), data, "input_ids")


def bert(data: Data) -> Task:
    """Tells which fifth of the alphabet a line begins with."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=data.characters, num_labels=5, **sizes))

    def batch(generator: torch.Generator) -> Batch:
        x, _ = data.lines(16, 16, generator)
        return {"input_ids": x, "attention_mask": torch.ones_like(x)}, x[:, 0] % 5

    return Task(model, CrossEntropy(), batch)


def t5(data: Data) -> Task:
    """Copies a line, one character late."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=data.characters, **sizes))

    def batch(generator: torch.Generator) -> Batch:
        x, y = data.lines(16, 16, generator)
        return {"input_ids": x, "decoder_input_ids": x}, y

    return Task(model, CrossEntropy(), batch)


def unet(data: Data) -> Task:
    """Tells the noise from the picture, at random levels (Ho et al. 2020, with a cosine schedule)."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )

    def batch(generator: torch.Generator) -> Batch:
        x, _ = data.pictures(8, 16, generator)
        noise = torch.randn(x.shape, generator=generator)
        times = torch.randint(1000, (len(x),), generator=generator)
        kept = torch.cos(times / 1000 * math.pi / 2)[:, None, None, None]
        return (kept * x + (1 - kept**2).sqrt() * noise, times), noise

    return Task(model, SquareLoss(), batch)


class Recurrent(nn.Module):
    """A language model as PyTorch's word-language-model example has it: embedding, LSTM, linear map."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.lstm = nn.LSTM(32, 48, 2, batch_first=True)
        self.head = nn.Linear(48, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def lstm(data: Data) -> Task:
    return lines(Recurrent(data.characters), data)


class Encoder(nn.Module):
    """``torch.nn``'s own transformer, with ``MultiheadAttention``, over characters."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embedding = nn.Embedding(characters, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


def encoder(data: Data) -> Task:
    """Tells which fifth of the alphabet a line begins with."""

    def batch(generator: torch.Generator) -> Batch:
        x, _ = data.lines(16, 16, generator)
        return x, x[:, 0] % 5

    return Task(Encoder(data.characters), CrossEntropy(), batch)


SOURCES = {
    "resnet18": (resnet18, "torchvision", "ResNet-18"),
    "resnet50": (resnet50, "torchvision", "ResNet-50"),
    "vit": (vit, "timm", "ViT, 3 blocks, patches of 8"),
    "convnext": (convnext, "timm", "ConvNeXt, 5 blocks, with layer scale"),
    "gpt2": (gpt2, "transformers", "GPT-2, 2 blocks, tied head"),
    "llama": (llama, "transformers", "Llama, 2 blocks, grouped keys, rotary"),
    "bert": (bert, "transformers", "BERT, 2 blocks, for classification"),
    "t5": (t5, "transformers", "T5, 2 + 2 blocks, relative positions"),
    "unet": (unet, "diffusers", "U-Net with attention, predicts noise"),
    "lstm": (lstm, "torch", "LSTM language model, 2 layers"),
    "encoder": (encoder, "torch", "nn.TransformerEncoder, 2 layers"),
}


def task(name: str, data: Data, seed: int = 0) -> Task:
    """A model with weights drawn from a seed."""
    torch.manual_seed(seed)
    made = SOURCES[name][0](data)
    made.model.train()
    return made


def step(
    task: Task, method: Method, params: dict[str, Tensor], state: State, batch: Batch
) -> tuple[float, dict[str, Tensor], State]:
    """The loss on a batch in a loop of one's own, the updates that follow from it, not made yet, and the new state."""
    inputs, targets = batch
    loss = task.loss(applied(task.model, inputs), targets)
    task.model.zero_grad()
    loss.backward()
    updates, state = method.update({name: p.grad for name, p in params.items()}, state, params)
    return float(loss), updates, state


@torch.no_grad()
def move(params: dict[str, Tensor], updates: dict[str, Tensor]) -> None:
    """Make the updates."""
    for name, update in updates.items():
        params[name].add_(update)


def scores(outputs: Any) -> Tensor:
    """The tensor that the loss is taken of."""
    for name in ("logits", "sample"):
        if hasattr(outputs, name):
            return getattr(outputs, name)
    return outputs


def applied(model: nn.Module, inputs: Any) -> Tensor:
    """The model's outputs for a batch of inputs."""
    if isinstance(inputs, dict):
        return scores(model(**inputs))
    return scores(model(*inputs) if isinstance(inputs, tuple) else model(inputs))
