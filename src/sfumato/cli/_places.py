"""Where a command writes: a place that cannot be written to is refused before the work is done."""

from __future__ import annotations

from pathlib import Path


def file(path: str | Path, *suffixes: str, what: str) -> Path:
    """The path, if a file whose name ends in one of the suffixes can be written there."""
    from sfumato.core.errors import InputError

    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: {what}; give a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file")
    return _reachable(path)


def folder(path: Path) -> Path:
    """The path, if it is a folder that can be written to, or can be made."""
    from sfumato.core.errors import InputError

    if path.is_file():
        raise InputError(f"{path} is a file: give a folder to write to")
    return _reachable(path)


def _reachable(path: Path) -> Path:
    """The path, if the nearest folder that exists can be written to, itself or above it: tried with a file without a name."""
    import tempfile

    from sfumato.core.errors import InputError

    above = path if path.is_dir() else next(there for there in path.parents if there.exists())
    if not above.is_dir():
        raise InputError(f"{path} cannot be written: {above} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=above):
            return path
    except OSError as error:
        raise InputError(f"{path} cannot be written: {above} says {error.strerror!r}") from error
