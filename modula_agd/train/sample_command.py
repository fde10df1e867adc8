"""``modula-agd sample``: text from a network that ``modula-agd train --arch gpt`` has trained."""

import argparse
import math
from pathlib import Path

from modula_agd.train.command_line import chosen
from modula_agd.train.extras import require
from modula_agd.train.facts import TextFacts
from modula_agd.train.options import add_device, add_seed, integer, number
from modula_agd.train.restore import Restored, restore
from modula_agd.train.sampling import continuation
from modula_agd.train.seeds import stream


def configure(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sample`` to its parser; ``options.run`` is what to call with the options."""
    command.description = "Write text with a network that was trained on text, as of its last checkpoint."
    command.epilog = "Example: modula-agd sample runs/gpt --prompt 'ROMEO:' --length 300"
    command.set_defaults(run=run)
    command.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="of a run with --arch gpt")
    command.add_argument("--prompt", metavar="TEXT", help="what the text begins with (default: a line break)")
    command.add_argument("--length", type=integer(1), default=500, metavar="N", help="characters (default: 500)")
    command.add_argument(
        "--temperature",
        type=number(0, math.inf),
        default=1.0,
        metavar="T",
        help="1 draws from what the network believes, 0 takes the likeliest character (default: 1)",
    )
    command.add_argument(
        "--best", action="store_true", help="as of the lowest loss on what --hold-out has set apart, not as of the end"
    )
    add_seed(command, "of the draws")
    add_device(command)


def run(options: argparse.Namespace) -> int:
    """Write the text to standard output as it is drawn.

    Returns:
        Exit status: 0 done.
    """
    require("modula-agd sample", "safetensors")
    trained = restore(options.folder, chosen(options.device), best=options.best)
    prompt = _prompt(trained) if options.prompt is None else options.prompt
    drawn = continuation(
        trained, prompt, options.length, temperature=options.temperature, generator=stream(options.seed, 0)
    )
    if options.prompt is not None:
        print(prompt, end="")
    for character in drawn:
        print(character, end="", flush=True)
    print()
    return 0


def _prompt(trained: Restored) -> str:
    """A line break, or what comes first in the vocabulary of a text without one."""
    facts = trained.recipe.facts
    if not isinstance(facts, TextFacts) or "\n" in facts.vocabulary.characters:
        return "\n"
    return facts.vocabulary.characters[0]
