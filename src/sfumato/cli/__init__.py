"""The ``sfumato`` command: it calls the verbs of the library and shows what they return.

Every command prints one JSON object on stdout with ``--json``. Exit status: 0 done (and, for ``reproduce``, the claim
held), 1 it ran and the claim did not hold, 2 wrong usage or bad input, 3 a defect of sfumato, 130 interrupted.
"""

from __future__ import annotations

# isort: off
from sfumato.cli._app import app
from sfumato.cli import demo, sample, edit, directions, invert, train, distill  # noqa: F401 (registered in this order)
from sfumato.cli import tune, compare, evaluate, export, papers, zoo, doctor  # noqa: F401
# isort: on

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    app()
