"""A run folder is enough to have the trained network again, and text from it."""

import json

import pytest
import torch

from modula_agd import METHODS, CrossEntropy, InvalidArgument
from modula_agd.command_line import main
from modula_agd.train import (
    CheckpointError,
    ImageFacts,
    Recipe,
    RunFolder,
    Schedule,
    TextFacts,
    Vocabulary,
    classification,
    continuation,
    load,
    restore,
    save,
    task,
    train,
)
from modula_agd.train.recipe import KEY, recipe
from shell import failure

VERSE = "To be, or not to be, that is the question:\n" * 20
IMAGES = ImageFacts("pictures", 4, (3, 8, 8), (1.5, 2.25, 0.1), (1.0, 2.0, 3.0))
TEXT = TextFacts("verse", Vocabulary('"\\\n äb🏺'), 7)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """The folder of a small trained run."""
    folder = tmp_path_factory.mktemp("gpt")
    (folder / "verse.txt").write_text(VERSE)
    arguments = ["train", "--data", f"text:{folder / 'verse.txt'}", "--arch", "gpt", "--context", "16", "--quiet"]
    arguments += ["--depth", "1", "--width", "32", "--heads", "2", "--steps", "80", "--batch-size", "16"]
    assert main([*arguments, "--method", "exact", "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("facts", [IMAGES, TEXT])
def test_a_recipe_is_read_as_it_was_written(facts):
    written = Recipe("gpt" if facts is TEXT else "cnn", {"width": 8, "bias": True, "form": "sum"}, True, facts)
    assert recipe(str(written)) == written


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arch": "fcn"}', str(Recipe("fcn", {}, True, IMAGES))[:-30]])
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(CheckpointError, match="recipe of the network cannot be read"):
        recipe(text)


@pytest.mark.parametrize("arch", ["fcn", "cnn"])
def test_a_restored_network_gives_the_logged_accuracy(tmp_path, capsys, arch):
    out = tmp_path / "run"
    assert (
        main(
            ["train", "--data", "digits", "--arch", arch, "--width", "8", "--steps", "25", "--quiet", "--out", str(out)]
        )
        == 0
    )
    again = restore(out)
    digits = classification("digits")
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    pixels = digits.validation.inputs * digits.facts.deviation[0] + digits.facts.mean[0]
    outputs = again.network(again.average, again.recipe.inputs(pixels), again.average)
    accuracy = (outputs.argmax(1) == digits.validation.labels).float().mean().item()
    assert accuracy == pytest.approx(last["val_accuracy"], abs=1e-6)
    assert again.step == 25
    assert again.recipe.facts == digits.facts
    assert bool(again.buffers) == (arch == "cnn")
    assert float(again.state["eta"]) == pytest.approx(last["eta"])


def test_raw_inputs_of_the_wrong_kind_are_refused():
    of_images, of_text = Recipe("fcn", {}, True, IMAGES), Recipe("gpt", {}, True, TEXT)
    assert of_images.inputs(torch.zeros((2, 3, 8, 8), dtype=torch.uint8)).shape == (2, 192)
    for raw in (torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8), ["a"]):
        with pytest.raises(InvalidArgument, match=r"images \[batch, 3, 8, 8\] were expected"):
            of_images.inputs(raw)
    assert of_text.inputs(["ä", "b"]).tolist() == [[4], [5]]
    for raw in (torch.zeros(2, 3), "text", [], [1]):
        with pytest.raises(InvalidArgument, match="a list of texts was expected"):
            of_text.inputs(raw)
    for raw in (["a", "ab"], [""], ["b" * 8]):
        with pytest.raises(InvalidArgument, match="they must all have one length, from 1 to 7"):
            of_text.inputs(raw)


def test_what_cannot_be_rebuilt_is_said(tmp_path, gpt):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        restore(tmp_path)
    source = task("digits", flat=True)
    way = METHODS["agd"](Recipe("fcn", {"width": 8}, False, source.facts).network(), CrossEntropy())
    run = RunFolder(tmp_path / "plain")
    run.create({})
    train(way, source, Schedule(1, 8, 1, 0), run)
    with pytest.raises(CheckpointError, match="does not say which network"):
        restore(run.path)
    wrong = str(Recipe("fcn", {"width": 9}, False, source.facts))
    save(run.checkpoint, way.network.init(0), way.init(way.network.init(0)), {KEY: wrong, "step": "1"})
    with pytest.raises(
        CheckpointError, match=r"holds other weights than the fcn that it tells of: 0\.weight has shape \(8, 64\)"
    ):
        restore(run.path)


def test_text_follows_a_prompt_and_the_seed(gpt, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert main(["sample", str(gpt), "--prompt", "To be", "--length", "40", "--seed", str(seed)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("To be")
    assert len(texts[0]) == len("To be") + 40 + 1
    assert set(texts[0]) <= set(VERSE)


def test_temperature_0_takes_the_likeliest_character_and_warmth_is_variety(gpt):
    trained = restore(gpt)

    def text(temperature: float, seed: int, length: int = 60) -> str:
        generator = torch.Generator().manual_seed(seed)
        return "".join(continuation(trained, "To be, ", length, temperature=temperature, generator=generator))

    assert text(0, 1) == text(0, 2) == text(1e-9, 3)
    ids = trained.recipe.inputs(["To be, "])
    assert text(0, 1)[0] == trained.recipe.facts.vocabulary.decode(
        trained.network(trained.average, ids)[0, -1].argmax()[None]
    )
    # as good as uniform: 400 draws miss one of 18 characters once in four hundred million times
    assert set(text(1000.0, 1, 400)) == set(trained.recipe.facts.vocabulary.characters)


def test_a_prompt_longer_than_the_context_is_seen_to_its_end(gpt):
    trained = restore(gpt)
    long = VERSE[:50]
    drawn = [
        "".join(continuation(trained, prompt, 20, temperature=0, generator=torch.Generator()))
        for prompt in (long, long[-16:])
    ]
    assert drawn[0] == drawn[1]


def test_without_a_prompt_the_text_begins_after_a_line_break(gpt, capsys):
    assert main(["sample", str(gpt), "--length", "5"]) == 0
    assert len(capsys.readouterr().out) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", "Xenia"], "the text to encode holds 'X'"),
        (["--prompt", ""], "empty prompt"),
        (["--length", "0"], "argument --length"),
        (["--temperature", "-1"], "argument --temperature"),
        (["--temperature", "nan"], "argument --temperature"),
        (["--temperature", "inf"], "argument --temperature"),
        (["--seed", "-1"], "argument --seed"),
        (["--device", "abacus"], "the device 'abacus' cannot be used"),
    ],
)
def test_a_mistake_is_one_line(gpt, capsys, options, said):
    assert said in failure(capsys, "sample", str(gpt), *options)


def test_a_run_of_images_writes_no_text(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--data", "digits", "--steps", "1", "--width", "8", "--quiet", "--out", str(out)]) == 0
    capsys.readouterr()
    assert "text was asked of a network of the architecture fcn" in failure(capsys, "sample", str(out))
    assert "there is no checkpoint" in failure(capsys, "sample", str(tmp_path))
    assert load(out / "checkpoint.safetensors").metadata["step"] == "1"
    with pytest.raises(InvalidArgument, match="both must be ≥ 0"):
        continuation(restore(out)._replace(recipe=Recipe("gpt", {}, True, TEXT)), "b", -1, generator=torch.Generator())


def _spoilt(gpt, folder, *, tensors=None, **metadata):
    """A copy of the run whose checkpoint has other tensors or another metadata."""
    saved = load(gpt / "checkpoint.safetensors")
    state = METHODS["exact"](restore(gpt).network, CrossEntropy()).init(saved.params)
    folder.mkdir()
    told = {name: value for name, value in {**saved.metadata, **metadata}.items() if value is not None}
    params = saved.params if tensors is None else {name: tensors(value) for name, value in saved.params.items()}
    save(folder / "checkpoint.safetensors", params, state, told, saved.buffers)
    return folder


@pytest.mark.parametrize(
    "metadata",
    [
        {"step": None},
        {"step": "many"},
        {KEY: str(Recipe("unheard-of", {}, True, TEXT))},
        {KEY: str(Recipe("gpt", {"width": -1}, True, TEXT))},
        {KEY: str(Recipe("gpt", {"wings": 2}, True, TEXT))},
        {KEY: str(Recipe("fcn", {}, True, TEXT))},
        {KEY: str(Recipe("gpt", {}, True, TEXT)).replace('"options": {}', '"options": null')},
        {KEY: str(Recipe("gpt", {}, True, TEXT)).replace('"gpt"', "[1]")},
    ],
)
def test_a_checkpoint_that_tells_what_cannot_be_is_refused_as_one(tmp_path, gpt, capsys, metadata):
    assert "train again" in failure(capsys, "sample", str(_spoilt(gpt, tmp_path / "run", **metadata)))


def test_a_folder_is_asked_for_and_not_the_file_in_it(gpt, capsys):
    said = failure(capsys, "sample", str(gpt / "checkpoint.safetensors"))
    assert "Name the folder of a run" in said


@pytest.mark.parametrize("factor", [float("nan"), 1e30])
def test_weights_that_give_no_chances_are_said_to_be_damaged(tmp_path, gpt, capsys, factor):
    run = _spoilt(gpt, tmp_path / "run", tensors=lambda value: value * factor)
    assert "NaN or infinity" in failure(capsys, "sample", str(run), "--prompt", "To be")


def test_nothing_is_written_where_the_prompt_is_refused(gpt, capsys):
    assert main(["sample", str(gpt), "--prompt", "Ü"]) == 2
    assert capsys.readouterr().out == ""
    with pytest.raises(InvalidArgument, match="vocabulary"):
        continuation(restore(gpt), "Ü", 1, generator=torch.Generator())
