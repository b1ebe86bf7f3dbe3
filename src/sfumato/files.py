"""Writing files that a killed process leaves whole, and where bundled models lie."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, sync, rename: a reader, or a killed process, sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where what is fetched or slow to make is kept: ``$SFUMATO_CACHE``, else ``~/.cache/sfumato``."""
    return Path(os.environ.get("SFUMATO_CACHE") or Path.home() / ".cache" / "sfumato").expanduser()


def model_folders() -> list[Path]:
    """Where bundled models lie: in this package, and in ``sfumato-zoo``, which carries the larger part of the zoo beside a wheel."""
    spec = find_spec("sfumato_zoo")
    beside = [Path(place) / "models" for place in (spec.submodule_search_locations or [])] if spec else []
    return [Path(__file__).parent / "zoo" / "models", *beside]


def bundled_models(description: str) -> dict[str, Path]:
    """Name -> folder of every bundled model that has this file (``pipeline.json`` or ``encoder.json``)."""
    found: dict[str, Path] = {}
    for models in reversed(model_folders()):
        found |= {path.parent.relative_to(models).as_posix(): path.parent for path in models.glob(f"**/{description}")}
    return dict(sorted(found.items()))
