"""A few real photographs that anybody may use: CC0 or public domain, bundled at up to 512 pixels.

``python -m sfumato.zoo.photographs --out DIR`` makes them again from the files inside scikit-image.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.core.errors import InputError, MissingExtra, SfumatoError

LONGEST, QUALITY = 512, 92
HUBBLE = "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/"
RETINA = "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg"
# name: file in scikit-image, caption, licence, credit, page of origin
COPYRIGHT_FREE = {
    "astronaut": (
        "astronaut.png", "portrait of a smiling astronaut in an orange space suit", "public domain",
        "NASA, Great Images in NASA: Eileen Collins", "https://flic.kr/p/r9qvLn",
    ),
    "coffee": (
        "coffee.png", "cup of coffee on a wooden table", "CC0-1.0",
        "Rachel Michetti, courtesy of Pikolo Espresso Bar", "",
    ),
    "chelsea": ("chelsea.png", "face of a ginger tabby cat", "CC0-1.0", "Stefan van der Walt", ""),
    "rocket": (
        "rocket.jpg", "rocket on a launch pad at dusk", "public domain",
        "SpaceX, DSCOVR on Falcon 9, released by SpaceX", "https://www.flickr.com/photos/spacexphotos/16511594820",
    ),
    "hubble": (
        "hubble_deep_field.jpg", "hundreds of galaxies in deep space", "public domain",
        "NASA, Hubble eXtreme Deep Field, 2012", HUBBLE,
    ),
    "retina": ("retina.jpg", "retina of a human eye", "CC0-1.0", "Mikael Häggström, 2014", RETINA),
}  # fmt: skip


def card() -> dict[str, Any]:
    """Origin, licence, caption and size of each photograph, and the building command."""
    return json.loads(_read("card.json"))


def names() -> tuple[str, ...]:
    return tuple(COPYRIGHT_FREE)


def _read(name: str) -> bytes:
    return (files("sfumato.zoo") / "data" / "photographs" / name).read_bytes()


@cache
def _decoded(name: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(_read(f"{name}.webp"))).convert("RGB")


def load(size: int | None = None) -> dict[str, Tensor]:
    """name -> uint8 (3, H, W). With ``size`` the largest central square, resized to size x size by Lanczos; without,
    the whole picture (its longer side is at most 512). Raises InputError for a size outside 1..512: nothing is enlarged
    beyond what was kept."""
    import numpy as np
    from PIL import Image, ImageOps

    if size is not None and (not isinstance(size, int) or not 1 <= size <= LONGEST):
        raise InputError(f"size is {size!r}: give a whole number from 1 to {LONGEST}, or None for the whole pictures")
    out = {}
    for name in COPYRIGHT_FREE:
        image = _decoded(name)
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        out[name] = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return out


def build(out: Path) -> dict[str, Any]:
    """Write each photograph as WebP and ``card.json`` into ``out``; MissingExtra without scikit-image."""
    from PIL import Image

    from sfumato.files import write_atomically

    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("scikit-image", extra="science")
    folder, entries = Path(spec.submodule_search_locations[0]) / "data", []
    for name, (file, caption, licence, credit, url) in COPYRIGHT_FREE.items():
        image = Image.open(folder / file).convert("RGB")
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY, method=6)
        write_atomically(out / f"{name}.webp", buffer.getvalue())
        entry = {
            "name": name,
            "caption": caption,
            "licence": licence,
            "credit": credit,
            "url": url,
            "from": f"skimage/data/{file}",
        }
        entries.append(entry | {"size": list(image.size), "bytes": len(buffer.getvalue())})
    found = {
        "name": "photographs",
        "command": "python -m sfumato.zoo.photographs --out src/sfumato/zoo/data/photographs",
        "package": "scikit-image 0.26.0 (PyPI)",
        "changes": f"shrunk to at most {LONGEST} pixels (Lanczos), WebP quality {QUALITY}",
        "photographs": entries,
    }
    write_atomically(out / "card.json", (json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode())
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sfumato.zoo.photographs", description="Build the bundled photographs."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the photographs and the card into")
    try:
        found = build(parser.parse_args(arguments).out)
    except SfumatoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({entry["name"]: entry["bytes"] for entry in found["photographs"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
