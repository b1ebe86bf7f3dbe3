"""OpenMoji: the concepts of the bundled emoji as line art and in colour, aligned. Share-alike (CC-BY-SA-4.0), so it is
fetched, never bundled."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sfumato.core.errors import MissingExtra
from sfumato.zoo import emoji
from sfumato.zoo.build_emoji import members, plain


def pack(package: Path) -> bytes:
    """The npm tarball's vector drawings at 64 pixels on white, as ``.npz``: ``keys`` (N,) code points, ``colour`` uint8
    (N, 64, 64, 3) and ``line`` uint8 (N, 64, 64). MissingExtra without resvg-py."""
    if find_spec("resvg_py") is None:
        raise MissingExtra("resvg-py", extra="vector")
    kinds = {
        k: {plain(n): v for n, v in members(package, rf"package/{k}/svg/(.*)\.svg").items()} for k in ("color", "black")
    }
    keys = [c.key for c in emoji.concepts() if all(plain(c.key) in drawings for drawings in kinds.values())]
    colour = np.stack([draw(kinds["color"][plain(key)], "RGB") for key in keys])
    line = np.stack([draw(kinds["black"][plain(key)], "L") for key in keys])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, keys=np.array(keys), colour=colour, line=line)
    return buffer.getvalue()


def draw(svg: bytes, mode: str) -> np.ndarray:
    """A vector drawing on white as (64, 64) or (64, 64, 3) uint8."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(
        svg_string=svg.decode(), width=emoji.CELL, height=emoji.CELL, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert(mode))


def read(path: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[emoji.Concept]]:
    """Colour (N, 64, 64, 3), line art (N, 64, 64) and concepts of "train", "unseen" (as in the bundled set) or
    "all"."""
    place = {concept.key: concept for concept in emoji.concepts()}
    with np.load(path / "openmoji.npz", allow_pickle=False) as file:
        concepts = [place[key] for key in file["keys"].tolist()]
        chosen = [i for i, c in enumerate(concepts) if split == "all" or (c.split == "unseen") == (split == "unseen")]
        return file["colour"][chosen], file["line"][chosen], [concepts[i] for i in chosen]
