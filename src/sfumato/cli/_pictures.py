"""Sheets of pictures, with the card of the run that made them inside the PNG."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CARD = "sfumato"  # the PNG text chunk
GAP, PAPER, SEEN = 4, (255, 255, 255), 128


def sheet(images: Tensor, columns: int | None = None, scale: int | None = None) -> Image:
    """uint8 (N, 1 or 3, H, W) side by side, ``columns`` a row (default: nearly square).

    ``scale`` repeats each pixel that many times; by default small pictures become at least 128 pixels high.
    """
    from PIL import Image as pil

    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    scale = scale or max(1, -(-SEEN // height))
    rows = -(-n // columns)
    step_x, step_y = width * scale + GAP, height * scale + GAP
    made = pil.new("RGB", (columns * step_x - GAP, rows * step_y - GAP), PAPER)
    for i, image in enumerate(images):
        pixels = image.expand(3, -1, -1) if channels == 1 else image
        tile = pil.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        tile = tile.resize((width * scale, height * scale), pil.Resampling.NEAREST)
        made.paste(tile, (i % columns * step_x, i // columns * step_y))
    return made


def png(path: str | Path) -> Path:
    """The path, if a picture can be written there; asked before the work is done."""
    from sfumato.cli._places import file

    return file(path, ".png", what="pictures are written as .png, which carries the card of the run")


def save(picture: Image, path: Path, card: Mapping[str, Any]) -> Path:
    """Write a PNG with the card as a text chunk, whole or not at all. InputError for another suffix."""
    from PIL.PngImagePlugin import PngInfo

    from sfumato.files import write_atomically

    png(path)
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt(CARD, json.dumps(card, ensure_ascii=False))
    picture.save(buffer, "PNG", pnginfo=info, optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
    return path


def read(path: Path) -> tuple[Image, dict[str, Any]]:
    """A picture and the card that ``save`` put in. InputError where it is no such picture."""
    from PIL import Image as pil

    from sfumato.core.errors import InputError

    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        with pil.open(path, formats=["PNG"]) as picture:
            picture.load()
            card = json.loads(picture.text[CARD])  # type: ignore[attr-defined]
            return picture.convert("RGB"), card
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise InputError(
            f"{path} carries no card of a run ({type(error).__name__}: {error}): give a PNG that `sample` wrote"
        ) from error
