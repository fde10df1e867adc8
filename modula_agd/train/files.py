"""Files that are whole at any moment: a reader, a crash or a full disk finds the old content or the new one."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file through a temporary one beside it, so that ``path`` is never half written.

    When this returns, the new content outlives a loss of power.

    Args:
        path: in an existing folder; replaced if there.
        content: the whole file.

    Raises:
        OSError: naming the file; the old content is still there, unless it was the last, the folder's own write that failed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        settle(path.parent)
    except OSError as error:
        # a full disk is reported without the file's name
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Have a folder's own list of names on disk: what was renamed or made in it stays so after a loss of power."""
    # Windows opens no folder, and writes renames down by itself
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tidy(path: Path) -> None:
    """Remove what a killed process has left of its writing of ``path``."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
