"""``sfumato demo``: the first picture, from the bundled models alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli._app import Answer, command, progress

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sfumato.pipeline import Pipeline

MODELS = ("emoji-latent", "emoji-pixel")
WORDS = 8  # of the demo's prompts: pictures in a row
SHOWN = (5, 10)
TILE, MARGIN, LABEL, TEXT = 96, 8, 190, 15
INK, FAINT, PAPER = (25, 25, 30), (110, 110, 120), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """Pictures side by side, with what they are and a caption for each."""

    label: str
    pictures: Tensor
    captions: Sequence[str] = ()


@command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.png.")] = Path("out"),
    models: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Other models than the bundled ones.")
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Other words; may be repeated.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> Answer:
    """Draw out/demo.png: words to pictures with each bundled model, a run from noise to picture, and fewer steps."""
    import time

    from sfumato.cli._pictures import save
    from sfumato.cli._places import folder
    from sfumato.zoo.captions import DEMO_PROMPTS

    folder(out)
    began = time.perf_counter()
    names, words = tuple(models or MODELS), tuple(prompts or DEMO_PROMPTS[:WORDS])
    rows = drawn(names, words, seed)
    path, seconds = out / "demo.png", round(time.perf_counter() - began, 1)
    card = {"command": "demo", "models": list(names), "prompts": list(words), "seed": seed}
    save(composed(rows, f"sfumato: {seconds:.0f} seconds on this machine"), path, card)
    record = {**card, "out": str(path), "seconds": seconds, "rows": [row.label.splitlines() for row in rows]}
    return Answer(record, f"{path}: {len(rows)} rows of pictures in {seconds:.0f} s")


def drawn(names: Sequence[str], words: Sequence[str], seed: int) -> list[Row]:
    """The rows: each model's pictures of the words, then the first model from noise to picture, and with few steps."""
    import sfumato

    pipelines = {name: sfumato.load(name) for name in names}
    first = next(iter(pipelines.items()))
    jobs: list[Callable[[], Row]] = []
    for name, pipeline in pipelines.items():
        jobs += [partial(said, name, pipeline, words, seed, style) for style in styles(pipeline)]
    jobs += [partial(edited, name, p, seed) for name, p in list(pipelines.items())[:1] if speaks_emoji(p)]
    jobs += [partial(restored, name, p, seed) for name, p in list(pipelines.items())[-1:] if in_pixels(p)]
    jobs += [
        partial(emerging, *first, words, seed),
        *(partial(compared, *first, words, seed, steps) for steps in SHOWN),
        *(partial(distilled, name, words, seed) for name in students(names[0])),
    ]
    rows = []
    with progress("drawing") as told:
        for job in jobs:
            rows.append(job())
            told(len(rows), len(jobs))
    return rows


def styles(pipeline: Pipeline) -> list[dict[str, str]]:
    """The conditions for each style that a model knows; the empty one if it knows none."""
    known = getattr(pipeline.conditioner, "classes", {}).get("vendor", ())
    return [{"vendor": style} for style in known] or [{}]


def said(name: str, pipeline: Pipeline, words: Sequence[str], seed: int, style: Mapping[str, str]) -> Row:
    """What a model draws for the words, in one of the styles that it knows."""
    label = f"{name}\n{style.get('vendor', 'words to pictures')}\n{pipeline.steps} steps"
    return Row(label, pipeline.generate(_spoken(pipeline, words), seed=seed, cond=style), words)


def emerging(name: str, pipeline: Pipeline, words: Sequence[str], seed: int) -> Row:
    """One picture on its way from noise: the state after some of the steps, decoded."""
    import torch

    import sfumato as sf

    prompt = _spoken(pipeline, words[:1])
    cond = pipeline.conditions(1, None if isinstance(prompt, int) else prompt, **styles(pipeline)[0])
    options: dict[str, Any] = {"solver": pipeline.solver, "grid": pipeline.grid, "steps": pipeline.steps, "seed": seed}
    shape = (1, *pipeline.codec.shape(*pipeline.size))
    with torch.no_grad():
        path = [st.x for st in sf.trajectory(pipeline.guided(), shape=shape, cond=cond, **options)]
        kept = (
            sorted({round(i * (len(path) - 1) / (len(words) - 1)) for i in range(len(words))})
            if len(words) > 1
            else [-1]
        )
        pictures = torch.cat([pipeline.codec.images(path[i]) for i in kept])
    return Row(f"{name}\n{words[0]!r}\nfrom noise to picture", pictures, [f"step {i}" for i in kept])


def compared(name: str, pipeline: Pipeline, words: Sequence[str], seed: int, steps: int) -> Row:
    """The same noise in few steps: the first-order solver beside the model's own."""
    import torch

    some = words[: max(1, len(words) // 2)]
    spoken = _spoken(pipeline, some)
    options: dict[str, Any] = {"seed": seed, "steps": steps, "cond": styles(pipeline)[0]}
    both = [pipeline.generate(spoken, solver=solver, **options) for solver in ("ddim", pipeline.solver)]
    return Row(f"{name}, {steps} steps\nleft: ddim\nright: {pipeline.solver}", torch.cat(both), [*some, *some])


def speaks_emoji(pipeline: Pipeline) -> bool:
    """Whether it reads words and the styles of the bundled drawings, so that those can be edited."""
    from sfumato.conditioners import Text

    return isinstance(pipeline.conditioner, Text) and styles(pipeline) != [{}]


def in_pixels(pipeline: Pipeline) -> bool:
    """Whether its process runs on the pixels of emoji, so that a measurement of them is linear in its state."""
    from sfumato.codecs import Identity

    return speaks_emoji(pipeline) and isinstance(pipeline.codec, Identity)


def edited(name: str, pipeline: Pipeline, seed: int) -> Row:
    """Drawings of another colour and skin tone than they had: before, after."""
    import torch

    import sfumato as sf
    from sfumato.zoo import edits

    pictures, captions = [], []
    for kind in ("colour", "tone"):
        some = edits.load(kind, 2, pipeline.size[0], seed=seed)
        after = sf.edit(
            pipeline, some.before, some.target, source=some.source, cond=some.cond, source_cond=some.source_cond,
            method="edit-friendly", steps=pipeline.steps, seed=seed,
        )  # fmt: skip
        pictures.append(torch.stack([some.before, after], 1).flatten(0, 1))
        captions += [text for pair in zip(some.source, some.target, strict=True) for text in pair]
    return Row(f"{name}\nan edit: before, after\nedit-friendly", torch.cat(pictures), captions)


def restored(name: str, pipeline: Pipeline, seed: int) -> Row:
    """Drawings that no model was trained on, of which the middle is hidden: what is seen, and what is drawn there."""
    import torch

    import sfumato as sf
    from sfumato.zoo import emoji

    items = emoji.load(pipeline.size[0], split="unseen", skin_tones=False)
    rows = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:4].tolist()
    shown = items.select(rows)
    operator = sf.operators.get("mask", hidden=0.4, noise=0.02)
    x0 = pipeline.codec.encode(shown.images)
    seen = operator(x0)
    after = pipeline.generate(
        shown.captions, cond={"vendor": [emoji.VENDORS[v] for v in shown.vendor.tolist()]}, seed=seed,
        guidance=lambda d: sf.guidance.measurement(operator, seen)(sf.guidance.cfg(2.0)(d)),
    )  # fmt: skip
    blank = torch.where(operator.keep(*x0.shape[1:]), shown.images, torch.tensor(128, dtype=torch.uint8))
    captions = [text for caption in shown.captions for text in (caption, "restored")]
    return Row(f"{name}\na restoration\nhidden, drawn again", torch.stack([blank, after], 1).flatten(0, 1), captions)


def students(name: str) -> list[str]:
    """The bundled few-step students of a model."""
    from sfumato.pipeline import bundled

    return [other for other in bundled() if other.removeprefix(f"{name}-").isdecimal()]


def distilled(name: str, words: Sequence[str], seed: int) -> Row:
    """What a few-step student draws for the words."""
    import sfumato

    pipeline = sfumato.load(name)
    calls = f"{pipeline.steps} call{'s' if pipeline.steps > 1 else ''}"
    pictures = pipeline.generate(_spoken(pipeline, words), seed=seed, cond=styles(pipeline)[0])
    return Row(f"{name}\ndistilled: {calls}", pictures, words)


def _spoken(pipeline: Pipeline, words: Sequence[str]) -> Any:
    """The words for a model that reads them, their number for one that does not."""
    from sfumato.conditioners import Text

    return list(words) if isinstance(pipeline.conditioner, Text) else len(words)


def composed(rows: Sequence[Row], title: str) -> Image:
    """The labelled picture of all rows, each picture TILE pixels high."""
    from PIL import Image as pil
    from PIL import ImageDraw

    large, small = _font(22), _font(12)
    step = TILE + MARGIN
    width = LABEL + max(len(row.pictures) for row in rows) * step + MARGIN
    heights = [step + (TEXT if row.captions else 0) + MARGIN for row in rows]
    made = pil.new("RGB", (width, 48 + sum(heights)), PAPER)
    draw = ImageDraw.Draw(made)
    draw.text((MARGIN, 12), title, INK, large)
    top = 48
    for row, height in zip(rows, heights, strict=True):
        draw.multiline_text((MARGIN, top + 18), row.label, INK, _font(14), spacing=5)
        for i, tile in enumerate(_tiles(row.pictures)):
            made.paste(tile, (LABEL + i * step, top))
            if i < len(row.captions):
                _caption(draw, row.captions[i], LABEL + i * step, top + TILE + 3, small)
        top += height
    return made


def _caption(draw: Any, text: str, left: int, top: int, font: Any) -> None:
    while draw.textlength(text, font) > TILE:
        text = text[:-2].rstrip() + "…"
    draw.text((left, top), text, FAINT, font)


def _tiles(images: Tensor) -> list[Image]:
    from PIL import Image as pil

    arrays = [image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy() for image in images]
    return [pil.fromarray(array).resize((TILE, TILE), pil.Resampling.LANCZOS) for array in arrays]


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
