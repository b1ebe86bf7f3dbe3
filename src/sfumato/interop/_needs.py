"""The optional packages of this folder."""

from __future__ import annotations

import importlib
from typing import Any

from sfumato.core.errors import MissingExtra


def need(package: str, extra: str = "diffusers") -> Any:
    """The module ``package``. Raises MissingExtra naming the extra that brings it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise MissingExtra(package, extra=extra) from error
