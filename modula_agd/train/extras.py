"""What the train extra installs, and the error that says so where it is missing."""

from importlib.util import find_spec

from modula_agd.error import ModulaError


class MissingExtra(ModulaError, ImportError):
    """A package of the ``train`` extra is not installed."""


def require(purpose: str, *packages: str) -> None:
    """Raise ``MissingExtra`` unless each package can be imported; call it before importing one inside a function.

    Args:
        purpose: what they are for, as a phrase: "reading Parquet files".
        packages: names as in an import statement.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{purpose} needs {' and '.join(missing)}, which this environment lacks. "
            'Install the train extra: pip install "modula_agd[train]"'
        )
