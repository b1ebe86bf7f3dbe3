"""The optional packages of this folder."""

from __future__ import annotations

from typing import Any

from sfumato.core import errors


def need(package: str, extra: str = "diffusers") -> Any:
    """The module ``package``, of the extra that most of this folder is for."""
    return errors.need(package, extra)
