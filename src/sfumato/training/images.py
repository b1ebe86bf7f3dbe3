"""Pictures from the disk: any Pillow format, bounded, on a background, at one size."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sfumato.core import InputError

if TYPE_CHECKING:
    from PIL import Image as pillow

Picture: TypeAlias = "Tensor | np.ndarray[Any, Any] | pillow.Image | str | Path"
"""What a picture may be given as: see :func:`as_pixels`."""
log = logging.getLogger("sfumato")

# Formats that run other programs or that are documents and not pictures.
REFUSED = {"EPS", "PDF", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS"}
FITS = ("crop", "pad", "stretch")


def read_image(
    path: str | Path,
    size: int | tuple[int, int],
    *,
    background: Sequence[int] = (255, 255, 255),
    fit: str = "crop",
    max_pixels: int = 50_000_000,
    max_bytes: int = 100_000_000,
) -> Tensor:
    """One picture as uint8 (3, height, width).

    EXIF rotation is applied, transparency is flattened on ``background`` before resizing (Lanczos), grey, palette, CMYK
    and 16-bit pictures become 8-bit RGB, an animation is its first frame. ``fit`` is 'crop' (fill, cut the longer side at
    its middle), 'pad' (whole picture on the background) or 'stretch'. Raises InputError, naming the file, where it is no
    picture, is cut short, has more than ``max_pixels`` or ``max_bytes``, or has 32-bit channels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    height, width = (size, size) if isinstance(size, int) else size
    if fit not in FITS:
        raise InputError(f"fit = {fit!r}: use one of {', '.join(FITS)}")
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: give a picture")
    if os.path.getsize(path) > max_bytes:
        raise InputError(
            f"{path} has {os.path.getsize(path)} bytes, allowed are {max_bytes}: raise max_bytes if you trust it"
        )
    try:
        with Image.open(path, formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise InputError(
                    f"{path} has {image.width} x {image.height} pixels, allowed are {max_pixels}: raise max_pixels if you trust it"
                )
            image.load()
            flat = _flatten(ImageOps.exif_transpose(image), tuple(background), path)
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path} is not a picture that can be read: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or cut short: {error}") from error
    return _resized(flat, (width, height), fit, tuple(background))


def as_pixels(
    image: Picture,
    size: int | tuple[int, int],
    *,
    background: Sequence[int] = (255, 255, 255),
    fit: str = "pad",
    what: str = "image",
) -> Tensor:
    """uint8 (B, 3, H, W) from whatever a picture comes as.

    A file and a Pillow image are brought to ``size`` as :func:`read_image` does. A uint8 tensor (3, H, W) or (B, 3, H, W) and a
    uint8 array (H, W, 3) or (B, H, W, 3) keep their size. Raises InputError for anything else.
    """
    from PIL import Image, ImageOps

    if isinstance(image, (str, Path)):
        return read_image(image, size, background=background, fit=fit)[None]
    if isinstance(image, Image.Image):
        height, width = (size, size) if isinstance(size, int) else size
        flat = _flatten(ImageOps.exif_transpose(image), tuple(background), what)
        return _resized(flat, (width, height), fit, tuple(background))[None]
    pixels: Any = image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (3, 4) and image.shape[-1] == 3:
        pixels = torch.from_numpy(image.copy()).movedim(-1, -3)
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4):
        got = f"{pixels.dtype} {tuple(pixels.shape)}" if hasattr(pixels, "shape") else type(pixels).__name__
        raise InputError(
            f"{what}: a file, a Pillow image, a uint8 tensor (3, H, W) or (B, 3, H, W), or a uint8 array (H, W, 3), not {got}"
        )
    return pixels[None] if pixels.ndim == 3 else pixels


def _resized(flat: Any, size: tuple[int, int], fit: str, background: tuple[int, ...]) -> Tensor:
    """An RGB picture at (width, height) as uint8 (3, height, width)."""
    from PIL import Image, ImageOps

    if fit == "crop":
        flat = ImageOps.fit(flat, size, Image.Resampling.LANCZOS)
    elif fit == "pad":
        flat = ImageOps.pad(flat, size, Image.Resampling.LANCZOS, color=background)
    else:
        flat = flat.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(flat, dtype=np.uint8).transpose(2, 0, 1).copy())


class ImageFolder:
    """The pictures in a folder and its sub-folders, in the order of their paths.

    Item i is {"x": uint8 (3, height, width)}, with "caption" (a string) where captions are found and "label" (an int into
    ``classes``) where every picture lies in a sub-folder. A caption is the text of NAME.txt beside NAME.png, or comes from
    ``metadata.jsonl`` in the folder ({"file_name": ..., "text": ...} a line).

    skip_bad   decode every picture once and leave out those that cannot be read (their names are logged and in ``bad``)
    size, background, fit, max_pixels, max_bytes   as in :func:`read_image`

    Raises InputError for a folder without pictures, a picture that cannot be read (when it is read, unless ``skip_bad``),
    or captions for some pictures only.
    """

    def __init__(
        self, path: str | Path, size: int | tuple[int, int], *, skip_bad: bool = False, **reading: Any
    ) -> None:
        self.path, self.size, self.reading = Path(path), size, reading
        if not self.path.is_dir():
            raise InputError(f"{path} is not a folder: give the folder that holds the pictures")
        endings = _endings()
        files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in endings and p.is_file())
        if not files:
            raise InputError(f"{path} holds no pictures ({', '.join(sorted(endings)[:8])}, ...): give another folder")
        self.bad: dict[str, str] = {}
        if skip_bad:
            files = [p for p in files if self._good(p)]
            if not files:
                raise InputError(
                    f"none of the {len(self.bad)} pictures in {path} can be read; the first: {next(iter(self.bad.values()))}"
                )
        self.files = files
        self.captions = _captions(self.path, files)
        folders = [p.relative_to(self.path).parts[0] if p.parent != self.path else "" for p in files]
        self.classes = [] if "" in folders else sorted(set(folders))
        self.labels = [self.classes.index(f) for f in folders] if self.classes else []

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Those items together: "x" uint8 (B, 3, height, width), "caption" a list, "label" int64 (B,)."""
        indices = list(indices)
        out: dict[str, Any] = {
            "x": torch.stack([read_image(self.files[i], self.size, **self.reading) for i in indices])
        }
        if self.captions:
            out["caption"] = [self.captions[i] for i in indices]
        if self.labels:
            out["label"] = torch.tensor([self.labels[i] for i in indices])
        return out

    def _good(self, path: Path) -> bool:
        try:
            read_image(path, self.size, **self.reading)
        except InputError as error:
            self.bad[str(path)] = str(error)
            log.warning("left out: %s", error)
            return False
        return True


def _flatten(image: Any, background: tuple[int, ...], path: str | Path) -> Any:
    """8-bit RGB of any mode, transparent parts on the background."""
    from PIL import Image

    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise InputError(f"{path} has 32-bit channels, whose white is unknown: save it with 8 or 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    return image.convert("RGB")


def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in Image.OPEN if name not in REFUSED]


def _endings() -> set[str]:
    from PIL import Image

    Image.init()
    return {end for end, name in Image.registered_extensions().items() if name in Image.OPEN and name not in REFUSED}


def _captions(folder: Path, files: Sequence[Path]) -> list[str]:
    """The caption of each file, or [] where there is none at all."""
    table: dict[str, str] = {}
    listing = folder / "metadata.jsonl"
    if listing.is_file():
        for number, line in enumerate(listing.read_text("utf-8").splitlines(), 1):
            if line.strip():
                name, text = _entry(line, f"{listing}, line {number}")
                table[name] = text
    found = []
    for file in files:
        beside = file.with_suffix(".txt")
        listed = table.get(file.relative_to(folder).as_posix())
        found.append(listed if listed is not None else beside.read_text("utf-8").strip() if beside.is_file() else None)
    missing = [str(f) for f, text in zip(files, found, strict=True) if text is None]
    if len(missing) == len(files):
        return []
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} pictures have no caption, e.g. {missing[0]}: write NAME.txt for each, or none"
        )
    return [text for text in found if text is not None]


def _entry(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        return str(entry["file_name"]), str(entry["text"] if "text" in entry else entry["caption"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{where}: expected {{"file_name": ..., "text": ...}} ({type(error).__name__}: {error})'
        ) from error
