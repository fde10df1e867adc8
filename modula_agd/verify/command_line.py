"""``modula-agd verify``: the laws from a shell."""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from modula_agd.error import InvalidArgument
from modula_agd.verify.check import Report, check
from modula_agd.verify.constructions import LOSSES, MODULES, NORMS, OBJECTIVES, Construction

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def configure(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``verify`` to its parser; ``options.run`` is what to call with the options."""
    command.description = (
        "Try to break the declared bounds of a module, a loss or a norm; of the library's own without a name."
    )
    command.epilog = (
        "Exit status: 0 if every law held, 1 if one broke, 2 for a mistake in the call. "
        "Example: modula-agd verify my_package.layers:Swish --cases 1000"
    )
    command.add_argument("name", nargs="?", help="package.module:name or path/to/file.py:name, an instance or a class")
    command.add_argument("--cases", type=int, default=200, metavar="N", help="cases per law (default: 200)")
    command.add_argument("--first-seed", type=int, default=0, metavar="N", help="seed of the search (default: 0)")
    command.add_argument(
        "--side", type=int, metavar="N", help="pixels along each side of images, for modules of one size"
    )
    command.add_argument("--device", default="cpu", metavar="D", help="where (default: cpu)")
    command.add_argument("--dtype", choices=list(_DTYPES), default="float64", help="in which dtype (default: float64)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check what the options name, print the table, and return the exit status."""
    if options.name is None:
        things = {**MODULES, **NORMS, **LOSSES, **OBJECTIVES}
    else:
        things = {options.name: Construction(load(options.name), side=options.side)}
    reports = [
        check(
            thing.subject,
            cases=options.cases,
            first_seed=options.first_seed,
            device=options.device,
            dtype=_DTYPES[options.dtype],
            side=thing.side,
            progress=not options.quiet,
        )
        for thing in things.values()
    ]
    report = Report(
        tuple(finding for part in reports for finding in part.findings),
        tuple(why for part in reports for why in part.untried),
    )
    print(report)
    broken = sum(not finding.holds for finding in report.findings)
    cases = sum(finding.cases for finding in report.findings)
    print(f"\n{len(report.findings)} claims, {cases:,} cases, {broken} broken")
    return 0 if report.ok else 1


def load(name: str) -> Any:
    """The object that ``package.module:name`` or ``path/to/file.py:name`` names; a class or function is called without arguments.

    Raises:
        InvalidArgument: no such file, module or object, or a class or function that takes arguments.
    """
    place, separator, attribute = name.rpartition(":")
    if not separator or not place or not attribute:
        raise InvalidArgument(f"verify was given {name!r}; write package.module:name or path/to/file.py:name")
    # as `python -m` has it; the script that pip installs would not find a package that lies here
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        thing = getattr(module, attribute)
    # the file is the user's: whatever it raises on import is what keeps it from being found
    except Exception as error:
        raise InvalidArgument(
            f"verify could not load {name!r}: {type(error).__name__}: {error}. Is it importable from the current folder?"
        ) from error
    if not isinstance(thing, type | FunctionType):
        return thing
    try:
        return thing()
    except Exception as error:
        raise InvalidArgument(
            f"verify called {attribute}() to have an instance, but it raised {type(error).__name__}: {error}. "
            f"Name an instance: layer = {attribute}(...), {place}:layer"
        ) from error


def _from_file(path: Path) -> Any:
    # a name of its own, so that a file called torch.py hides nothing
    name = f"modula_agd_verified_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[name] = module
    # as `python path/to/file.py` has it, so that the file finds its neighbours
    sys.path.append(str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
