"""``sfumato directions``: what leads from some pictures to others, learned from examples for ``sfumato edit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli._app import Answer, command, named_values
from sfumato.cli._options import Model

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = "A folder, shards, a data set such as emoji:train, or a part of it: 'emoji:train=light skin tone'."


@command("directions")
def directions(
    model: Model,
    before: Annotated[str | None, typer.Option("--from", metavar="PICTURES", help=EXAMPLES)] = None,
    after: Annotated[str | None, typer.Option("--to", metavar="PICTURES", help="The same.")] = None,
    method: Annotated[
        str, typer.Option(help="The edit that will follow it: boundary-diffusion or h-space.")
    ] = "boundary-diffusion",
    number: Annotated[
        int, typer.Option("-n", "--number", min=2, help="Pictures of each kind, at most; or generated ones.")
    ] = 40,
    time: Annotated[
        float | None, typer.Option(help="Where a boundary lies, in (0, 1]. Default: the critical time, found.")
    ] = None,
    component: Annotated[int, typer.Option(min=0, help="For h-space without --to: which principal component.")] = 0,
    path: Annotated[
        str | None, typer.Option(help="The submodule whose output is h. Default: the network's bottleneck.")
    ] = None,
    cond: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Condition to read them under.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a whole run.")] = 20,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="NAME.safetensors.")] = Path("direction.safetensors"),
) -> Answer:
    """Learn an edit, e.g. `sfumato directions emoji-pixel --from light/ --to dark/ --out dark.safetensors`.

    Follow it with `sfumato edit IMAGE -m emoji-pixel --method boundary-diffusion --direction dark.safetensors`.
    """
    import time as clock

    import sfumato
    from sfumato.cli._places import file
    from sfumato.core.errors import InputError
    from sfumato.editing.directions import Learned, learn

    file(out, ".safetensors", what="a direction is kept in a .safetensors file")
    pipeline = sfumato.load(model)
    given = [None if source is None else _pictures(source, pipeline, number) for source in (before, after)]
    if method == "boundary-diffusion" and None in (before, after):
        raise InputError("a boundary lies between two kinds of pictures: give both, --from and --to")
    began = clock.perf_counter()
    told = named_values(cond or ())
    found = learn(
        pipeline, *given, method=method, time=time, component=component, n=number, steps=steps, path=path, cond=told, seed=seed
    )  # fmt: skip
    seconds = round(clock.perf_counter() - began, 2)
    card = {
        **found.card,
        "model": model,
        "from": before,
        "to": after,
        "sfumato": sfumato.__version__,
        "seconds": seconds,
    }
    Learned(found.direction, card).save(out)
    return Answer({**card, "out": str(out)}, _shown(card, out))


def _pictures(source: str, pipeline: Any, number: int) -> Tensor:
    """uint8 (N, 3, H, W) of a source at the model's size; after '=' a class, or words that a caption has in it."""
    from sfumato.cli.data import pictures
    from sfumato.cli.evaluate import coloured
    from sfumato.core.errors import InputError

    name, equals, words = (source, "", "") if Path(source).exists() else source.partition("=")
    found = pictures(name, pipeline.size[0])
    grey = getattr(pipeline.codec, "channels", 3) == 1
    if not equals:
        return found.some(number)["x"] if grey else coloured(found.some(number)["x"])
    every = found.some(None)
    classes = [found.classes[k] for k in every["label"].tolist()] if found.classes and "label" in every else []
    captions = every.get("caption", [""] * len(found))
    rows = [i for i in range(len(found)) if words.lower() in captions[i].lower() or words in classes[i : i + 1]]
    if not rows:
        known = f"; its classes: {', '.join(found.classes)}" if found.classes else ""
        raise InputError(f"{name} has nothing that shows {words!r}{known}")
    few = rows if len(rows) <= number else [rows[i * len(rows) // number] for i in range(number)]
    return every["x"][few] if grey else coloured(every["x"][few])


def _shown(card: dict[str, Any], out: Path) -> str:
    pictures = " and ".join(map(str, card["pictures"]))
    said = f"{out}: for {card['method']}, from {pictures} pictures, h is {card['path']}"
    if "time" in card:
        known = card["accuracy"]
        said += f"; boundary at t = {card['time']:g}, right in cross validation: {known['x']:.0%} of states, {known['h']:.0%} of h"
        if max(known["x"], known["h"]) < 0.6:
            said += "; hardly better than chance: give more pictures, or kinds that differ more"
    return f"{said} ({card['seconds']:.1f} s)"
