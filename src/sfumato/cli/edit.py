"""``sfumato edit``: a picture changed with a frozen model, by any of the registered methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, command, named_values, scale_or_spec, table
from sfumato.cli._options import OfModel

DEFAULT_METHOD = "edit-friendly"


@command("edit")
def edit(
    image: Annotated[Path | None, typer.Argument(exists=True, dir_okay=False, help="The picture to change.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the result shows.")] = None,
    method: Annotated[
        str, typer.Option(help="A name, or with numbers: 'edict(strength=0.7)'; --list says what each needs.")
    ] = DEFAULT_METHOD,
    source: Annotated[str | None, typer.Option(help="What the picture shows.")] = None,
    mask: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A picture, white where the first may change.")
    ] = None,
    points: Annotated[
        list[str] | None, typer.Option(metavar="X,Y,U,V", help="What is at (X, Y) moves to (U, V); may be repeated.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A second picture, for methods that mix or paste.")
    ] = None,
    direction: Annotated[
        Path | None,
        typer.Option(help="What `sfumato directions` learned, for methods that follow it."),
    ] = None,
    model: OfModel = "emoji-latent",
    cond: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another condition of the result.")
    ] = None,
    source_cond: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another condition of the picture. Default: --cond.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a whole run. Default: 50.")] = None,
    solver: Annotated[str | None, typer.Option(help="Default: ddim, or what the method brings.")] = None,
    grid: Annotated[str | None, typer.Option(help="Where the steps lie. Default: the model's.")] = None,
    guidance: Annotated[
        str | None, typer.Option(help="A scale, or a spec such as 'apg(scale=4)'. Default: the model's.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="NAME.png: before and after, side by side.")] = Path("edit.png"),
    only: Annotated[bool, typer.Option("--only", help="Write the result alone, at its own size.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Show the methods, what they need and take, and leave.")
    ] = False,
) -> Answer:
    """Change a picture, e.g. `sfumato edit heart.png --prompt "blue heart" --source "red heart"`."""
    from sfumato.core.errors import InputError

    if listed:
        return _methods()
    if image is None and not (method.startswith("magicmix") and source and prompt):
        raise InputError(
            "which picture? `sfumato edit IMAGE --prompt TEXT`; `sfumato edit --list` shows the methods; only magicmix "
            "takes the layout of what --source draws without a picture"
        )
    from sfumato.cli._pictures import png

    card: dict[str, Any] = {
        "command": "edit", "image": None if image is None else str(image), "prompt": prompt, "method": method, "source": source,
        "mask": None if mask is None else str(mask), "points": [_point(text) for text in points or ()],
        "reference": None if reference is None else str(reference),
        "direction": None if direction is None else str(direction), "model": model, "cond": named_values(cond or ()),
        "source_cond": None if source_cond is None else named_values(source_cond), "steps": steps, "solver": solver,
        "grid": grid, "guidance": scale_or_spec(guidance), "seed": seed,
    }  # fmt: skip
    return _edited(card, png(out), only) if image is not None else _of_words(card, png(out))


def _edited(card: Mapping[str, Any], out: Path, only: bool) -> Answer:
    import time

    import torch

    import sfumato
    from sfumato.cli._pictures import save, sheet
    from sfumato.training.images import read_image

    pipeline = sfumato.load(card["model"])
    before = read_image(card["image"], pipeline.size, fit="pad")
    began = time.perf_counter()
    options = {k: v for k, v in card.items() if k not in ("command", "image", "prompt", "model")}
    found = sfumato.editing.perform(pipeline, before, card["prompt"], **options)
    seconds = time.perf_counter() - began
    after = found.images
    if after.shape[-2:] != before.shape[-2:]:
        before = read_image(card["image"], tuple(after.shape[-2:]), fit="pad")  # type: ignore[arg-type]
    save(sheet(after, scale=1) if only else sheet(torch.cat([before[None], after]), columns=1 + len(after)), out, card)
    changed = (after.float() - before.float()).abs().mean().item()
    record = {**card, "out": str(out), "calls": found.nfe, "seconds": round(seconds, 2), "changed": round(changed, 2)}
    shown = f"{out}: {card['method']}, {found.nfe:g} network calls, {seconds:.1f} s, mean change {changed:.1f} of 255"
    return Answer(record, shown)


def _of_words(card: Mapping[str, Any], out: Path) -> Answer:
    """A picture with the layout of what the source draws: there is no picture before."""
    import sfumato
    from sfumato.cli._pictures import save, sheet
    from sfumato.core.errors import InputError

    useless = [name for name in ("mask", "points", "reference", "direction", "source_cond") if card[name]]
    if useless:
        raise InputError(f"without a picture magicmix reads words only: leave out --{useless[0].replace('_', '-')}")
    numbers = {
        name: card[name] for name in ("solver", "steps", "grid", "guidance", "cond", "seed") if card[name] is not None
    }
    method = sfumato.editing.registry.make(card["method"])
    made = sfumato.editing.mix(sfumato.load(card["model"]), card["source"], card["prompt"], method=method, **numbers)
    save(sheet(made), out, card)
    return Answer({**card, "out": str(out)}, f"{out}: {card['method']}, the layout of {card['source']!r}")


def _methods() -> Answer:
    from sfumato import editing

    rows = []
    for name in editing.names():
        method = editing.get(name)
        rows.append(
            {
                "method": name,
                "needs": ", ".join(sorted(method.needs)),
                "also takes": ", ".join(sorted(method.accepts - method.needs)),
                "what it does": (type(method).__doc__ or "").partition("\n")[0],
            }
        )
    return Answer({"methods": rows}, table(rows, ["method", "needs", "also takes", "what it does"]))


def _point(text: str) -> list[float]:
    from sfumato.core.errors import InputError

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise InputError(f"a point is written X,Y,U,V in pixels, e.g. 10,12,20,12; not {text!r}")
    return numbers
