"""``sfumato invert``: the noise that draws a picture, and how exactly the picture comes back from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, command, named_values, progress, scale_or_spec, table
from sfumato.cli._options import Conditions, OfModel

DEFAULT_METHOD = "edict"


@command("invert")
def invert(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The picture.")],
    prompt: Annotated[str | None, typer.Option(help="What it shows.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="A solver, e.g. 'edict', 'bdia(gamma=0.96)', 'implicit(inner=\"heun\")', 'ddim'; or 'edit-friendly'."
        ),
    ] = DEFAULT_METHOD,
    every: Annotated[
        bool, typer.Option("--all", help="A table of all ways to invert; --method is what is written.")
    ] = False,
    model: OfModel = "emoji-latent",
    cond: Conditions = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the solver, each way.")] = 50,
    strength: Annotated[float, typer.Option(help="The time it is taken to: 1 is pure noise.")] = 1.0,
    grid: Annotated[str | None, typer.Option(help="Where the steps lie. Default: the model's.")] = None,
    guidance: Annotated[
        str, typer.Option(help="Classifier-free scale or a spec, e.g. 'apg(scale=4)', both ways; 1 is none.")
    ] = "1",
    seed: Annotated[int, typer.Option(help="Of the noise maps of 'edit-friendly' and 'cycle-diffusion'.")] = 0,
    out: Annotated[Path, typer.Option(help="NAME.png: before and after; NAME.safetensors: the noise.")] = Path(
        "invert.png"
    ),
) -> Answer:
    """Take a picture to noise and back, e.g. `sfumato invert heart.png --prompt "red heart" --guidance 3 --all`."""
    from sfumato.cli._pictures import png
    from sfumato.cli.sample import fingerprint

    path = png(out)
    card = {
        "command": "invert", "image": str(image), "prompt": prompt, "method": method, "model": model,
        "weights": fingerprint(model), "cond": named_values(cond or ()), "steps": steps, "strength": strength, "grid": grid,
        "guidance": scale_or_spec(guidance), "seed": seed,
    }  # fmt: skip
    return _inverted(card, path, every)


def _inverted(card: Mapping[str, Any], out: Path, every: bool) -> Answer:
    import torch
    from rich.console import Group

    import sfumato
    from sfumato.cli._pictures import save, sheet
    from sfumato.editing.inversion import METHODS
    from sfumato.training.images import read_image

    pipeline = sfumato.load(card["model"])
    before = read_image(card["image"], pipeline.size, fit="pad")[None]
    found, row = _measured(pipeline, before, card, card["method"])
    rows = [row]
    if every:
        with progress("inverting") as told:
            for i, other in enumerate(METHODS):
                rows += [] if other == card["method"] else [_attempted(pipeline, before, card, other)]
                told(i + 1, len(METHODS))
    codec = pipeline.codec.images(found.state)
    save(sheet(torch.cat([before.expand_as(codec), codec, pipeline.codec.images(found.back)]), columns=3), out, card)
    latent = found.save(out.with_suffix(".safetensors"), card)
    record = {**card, "out": str(out), "latent": str(latent), **row, "methods": rows}
    columns = ["method", "calls", "error", "pixels", "seconds", "refused"]
    shown = [{**r, **{k: f"{r[k]:.2g}" for k in ("error", "pixels") if k in r}} for r in rows]
    legend = (
        f"{out}: the picture, decoded, and back from the noise in {latent}\nerror: rms of what came back over rms of the state; "
        "pixels: rms difference when both are decoded, of 255"
    )
    return Answer(record, Group(table(shown, columns if any("refused" in r for r in rows) else columns[:-1]), legend))


def _attempted(pipeline: Any, before: Any, card: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A line of the table; a method that cannot invert here says why."""
    from sfumato.core.errors import InputError

    try:
        return _measured(pipeline, before, card, method)[1]
    except InputError as refusal:
        return {"method": method, "refused": str(refusal)}


def _measured(pipeline: Any, before: Any, card: Mapping[str, Any], method: str) -> tuple[Any, dict[str, Any]]:
    """error: rms of what came back over rms of the state; pixels: rms difference of both decoded, of 255."""
    import time

    import torch

    from sfumato.editing.inversion import invert

    began = time.perf_counter()
    options = {k: card[k] for k in ("cond", "steps", "strength", "grid", "guidance", "seed")}
    found = invert(pipeline, before, card["prompt"], method=method, **options)
    with torch.no_grad():
        apart = (pipeline.codec.decode(found.back) - pipeline.codec.decode(found.state)).double()
    return found, {
        "method": method,
        "calls": round(found.calls, 2),
        "error": float(found.error.mean()),
        "pixels": float(127.5 * apart.square().mean().sqrt()),
        "seconds": round(time.perf_counter() - began, 2),
    }
