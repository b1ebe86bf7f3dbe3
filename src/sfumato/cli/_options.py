"""Options that several commands take, each declared once."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL = "A bundled name, or a folder that a training wrote."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
OfModel = Annotated[str, typer.Option("--model", "-m", help=MODEL)]
Guidance = Annotated[
    str | None, typer.Option(help="Classifier-free scale, or e.g. 'apg(scale=4)'. Default: the model's.")
]
Conditions = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="A condition of the model; may be repeated.")
]
