"""The errors of the library: each says what was given, what is allowed and what to try."""

from __future__ import annotations

import importlib
from typing import Any


class SfumatoError(Exception):
    """Base of every error that sfumato itself raises."""


class InputError(SfumatoError, ValueError):
    """An argument, file or combination that cannot be used; the message says what would be."""


class UnknownName(SfumatoError, KeyError):
    """A name that is not registered; the message lists those that are."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtra(SfumatoError, ImportError):
    """An optional package is not installed; the message names the extra that brings it, or the command that does."""

    def __init__(self, package: str, extra: str, command: str = "pip install 'sfumato[{}]'") -> None:
        super().__init__(f"{package} is not installed: {command.format(extra)}")
        self.package, self.extra = package, extra


def need(package: str, extra: str) -> Any:
    """The optional module ``package``. Raises MissingExtra naming the extra that brings it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise MissingExtra(package, extra=extra) from error
