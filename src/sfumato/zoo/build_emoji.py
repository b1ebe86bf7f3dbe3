"""Packs three emoji families, captioned and split, into the bundled set: ``python -m sfumato.zoo.build_emoji --out DIR
[--cache DIR]``.

The pictures come from three npm packages and the captions from a fourth; each is fetched with ``npm pack`` when the
cache lacks it and checked against a pinned SHA-256, so the result is the same on every machine. Pictures are stored as
lossless WebP sheets of 64-pixel cells. Noto and Twemoji keep every visible pixel; Fluent, whose originals are lossy
256-pixel WebP, is shrunk and its colours are rounded so that a picture on any background changes by at most 1.5 levels
of 255."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.core.errors import InputError, SfumatoError
from sfumato.files import cache_folder, write_atomically
from sfumato.zoo.emoji import CELL, COLUMNS, SHEET, VENDORS
from sfumato.zoo.packages import npm_package

ROUNDING = {"fluent": 3}
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
# The Fluent package misnames skin tones: which file shows the tone of each modifier (found by looking).
FLUENT_SWAPPED = {"1F3FC": "1F3FD", "1F3FD": "1F3FC"}
FLUENT_ODD = {
    "1F468-200D-1F4BB": {}, "1F469-200D-1F4BB": {}, "1F9D1-200D-1F4BB": {},
    "1F6B5": {"1F3FB": "1F3FF", "1F3FC": "1F3FE", "1F3FD": "1F3FC", "1F3FE": "1F3FD", "1F3FF": "1F3FB"},
}  # fmt: skip
# Fluent draws no flags of countries: its package fills the gap with another family's, shaped like older Noto ones.
NOT_FLUENT = {"country-flag", "subdivision-flag"}
# Drawings that show something else: Noto's file of Sark is the flag of Saudi Arabia.
MISDRAWN = {("noto", "1F1E8-1F1F6")}
FACING_RIGHT = "-200D-27A1-FE0F"
SPLIT_SALT = "sfumato emoji split 1"
UNSEEN, PARTIAL = 0.1, 0.1

PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "twemoji": (
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "captions": ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
}
LICENCES = {
    "noto": {"licence": "Apache-2.0", "credit": "Noto Emoji, copyright Google LLC"},
    "twemoji": {
        "licence": "CC-BY-4.0",
        "credit": "Twemoji, copyright Twitter, Inc and other contributors; packed into sheets",
    },
    "fluent": {"licence": "MIT", "credit": "Fluent Emoji, copyright Microsoft Corporation; packaged by LobeHub"},
    "captions": {
        "licence": "MIT",
        "credit": "emojibase-data, copyright Miles Johnson; labels and tags from Unicode CLDR",
    },
}


def split_of(group: str, vendors: Iterable[str]) -> tuple[str, str | None]:
    """``("unseen", None)``, ``("partial", the vendor held out)`` or ``("train", None)`` for a group of concepts that
    must stay together: a pure function of its leader's key and of the vendors that draw all of it."""
    digest = hashlib.sha256(f"{SPLIT_SALT}:{group}".encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8))
    if first < UNSEEN:
        return "unseen", None
    if first < UNSEEN + PARTIAL:
        among = [vendor for vendor in VENDORS if vendor in set(vendors)]
        return "partial", among[int(second * len(among))]
    return "train", None


def caption_of(label: str) -> str:
    """A CLDR label as one would say it: ``"flag: Chad"`` becomes ``"flag of chad"``, ``"man: red hair"`` ``"man with
    red hair"``."""
    text = label.lower().replace("’", "'").replace("‘", "'").replace("“", "").replace("”", "")
    head, colon, tail = text.partition(": ")
    if not colon:
        return text
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap" or tail == "facing right":
        return f"{head} {tail}"
    if tail == "bald":
        return f"bald {head}"
    if tail.endswith(" hair"):
        return f"{head} with {tail}"
    if tail == "beard":
        return f"{head} with a beard"
    parts = tail.split(", ")
    return f"{head}, " + (" and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else tail)


def tone_of(modifiers: str) -> str:
    """``"1F3FB"`` is ``"light"``; ``"1F3FB-1F3FF"`` (two people) is ``"light and dark"``."""
    names = list(dict.fromkeys(TONES[part] for part in modifiers.split("-")))
    return " and ".join(names)


def members(package: Path, pattern: str) -> dict[str, bytes]:
    """The files of an npm tarball whose path inside matches, by the pattern's first group."""
    found = {}
    with tarfile.open(package, "r:gz") as tar:
        for item in tar:
            match = re.fullmatch(pattern, item.name)
            if match and item.isfile():
                found[match.group(1)] = tar.extractfile(item).read()  # type: ignore[union-attr]
    if not found:
        raise SfumatoError(f"{package} holds no file that matches {pattern}: delete it and run the command again")
    return found


def plain(key: str) -> str:
    """A code-point key without variation selectors, for matching across sources."""
    return "-".join(part for part in key.upper().split("-") if part != "FE0F")


def fluent_key(key: str) -> str:
    """How the Fluent package names a file: lower case, no leading zeros."""
    return "-".join(part.lower().lstrip("0") for part in key.split("-"))


def fluent_sources(row: Mapping[str, Any]) -> dict[str, str]:
    """modifiers -> the code points under which the Fluent package keeps that drawing. In its single-person families
    medium-light and medium are exchanged, except for the technologists, which are right, and the mountain biker, which
    is shuffled; couples are right."""
    variants = {modifiers: variant["unified"] for modifiers, variant in row.get("skin_variations", {}).items()}
    couple = any("-" in modifiers for modifiers in variants)
    moved = {} if couple else FLUENT_ODD.get(row["unified"], FLUENT_SWAPPED)
    return {modifiers: variants[moved.get(modifiers, modifiers)] for modifiers in variants}


def concepts_of(
    rows: list[dict[str, Any]], labels: Mapping[str, Mapping[str, Any]], fluent: Iterable[str]
) -> list[dict[str, Any]]:
    """One record a picture in sheet order: base concepts by category, each followed by its skin tones (so like lies
    beside like)."""
    fluent = set(fluent)
    out = []
    for row in sorted(rows, key=lambda r: (r["category"], r["subcategory"], r["sort_order"], r["unified"])):
        label = labels[plain(row["unified"])]
        base = {
            "key": row["unified"], "name": row["name"].lower(), "caption": caption_of(label["label"]),
            "tags": [tag.lower() for tag in label.get("tags", [])],
            "category": row["category"], "subcategory": row["subcategory"], "file": row["image"],
            "fluent": fluent_key(row["unified"]),
        }  # fmt: skip
        family, sources = [base], fluent_sources(row)
        for modifiers, variant in row.get("skin_variations", {}).items():
            tone = tone_of(modifiers)
            said = f"{base['caption']}, {tone} skin tone" + ("s" if " and " in tone else "")
            family.append(
                {
                    "key": variant["unified"],
                    "base": base["key"],
                    "tone": tone,
                    "caption": said,
                    "file": variant["image"],
                    "fluent": fluent_key(sources[modifiers]),
                }  # fmt: skip
            )
        for record in family:
            drawn = record["fluent"] in fluent and row["subcategory"] not in NOT_FLUENT
            record["vendors"] = [v for v in VENDORS if v != "fluent" or drawn]
        out += family
    return out


def premultiplied_resize(image: Any, size: int) -> np.ndarray:
    """A picture of any size as (size, size, 4) uint8, by Lanczos on premultiplied colours (else transparent pixels
    bleed into edges)."""
    from PIL import Image

    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square, np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    planes = [Image.fromarray(pixels[..., c]).resize((size, size), Image.Resampling.LANCZOS) for c in range(4)]
    small = np.stack([np.asarray(plane) for plane in planes], -1)
    alpha = small[..., 3:].clip(0, 255)
    colour = small[..., :3] * np.where(alpha > 0, 255 / np.maximum(alpha, 1e-3), 0)
    return np.concatenate([colour, alpha], -1).round().clip(0, 255).astype(np.uint8)


def rounded(pixels: np.ndarray, step: int) -> np.ndarray:
    """Transparent pixels black, colours rounded (step 0: kept) to ``step`` times the largest power of two below 255 /
    alpha: the error on any background is at most step / 2 levels."""
    alpha = pixels[..., 3:]
    if not step:
        return np.where(alpha > 0, pixels, 0).astype(np.uint8)
    grain = step * 2.0 ** np.floor(np.log2(255 / np.maximum(alpha, 1)))
    colour = (np.round(pixels[..., :3] / grain) * grain).clip(0, 255).astype(np.uint8)
    return np.where(alpha > 0, np.concatenate([colour, alpha], -1), 0).astype(np.uint8)


def sheet_of(cells: np.ndarray) -> np.ndarray:
    """(N, C, C, 4) cells as one picture, COLUMNS cells wide, row by row."""
    count = -(-len(cells) // COLUMNS)
    sheet = np.zeros((count * COLUMNS, CELL, CELL, 4), np.uint8)
    sheet[: len(cells)] = cells
    return sheet.reshape(count, COLUMNS, CELL, CELL, 4).swapaxes(1, 2).reshape(count * CELL, COLUMNS * CELL, 4)


def webp(sheet: np.ndarray, effort: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "WEBP", lossless=True, quality=100 if effort == 6 else 80, method=effort)
    return buffer.getvalue()


def leaders(records: list[dict[str, Any]], cells: Mapping[str, np.ndarray]) -> dict[str, str]:
    """base key -> the key that decides its split. Concepts that look alike share one: mirrored pairs ("... facing
    right") and those whose pictures are pixel for pixel the same in some vendor (some islands fly the flag of their
    state)."""
    parent = {r["key"]: r["key"] for r in records if "base" not in r}

    def find(key: str) -> str:
        while parent[key] != key:
            key = parent[key]
        return key

    def unite(a: str, b: str) -> None:
        low, high = sorted((find(a), find(b)))
        parent[high] = low

    for key in parent:
        if key.endswith(FACING_RIGHT):
            twin = key.removesuffix(FACING_RIGHT)
            unite(key, next(other for other in parent if plain(other) == plain(twin)))
    for vendor, pictures in cells.items():
        first: dict[bytes, str] = {}
        for record, picture in zip((r for r in records if vendor in r["vendors"]), pictures, strict=True):
            base = record.get("base", record["key"])
            unite(base, first.setdefault(picture.tobytes(), base))
    return {key: find(key) for key in parent}


def assign_splits(records: list[dict[str, Any]], cells: Mapping[str, np.ndarray]) -> None:
    leader = leaders(records, cells)
    available: dict[str, set[str]] = {}
    for record in records:
        if "base" not in record:
            available.setdefault(leader[record["key"]], set(VENDORS)).intersection_update(record["vendors"])
    for record in records:
        if "base" in record:
            continue
        group = leader[record["key"]]
        record["split"], held_out = split_of(group, available[group])
        if held_out:
            record["held_out"] = held_out
        if group != record["key"]:
            record["group"] = group


CHANGES = (
    "Noto and Twemoji: packed into sheets, transparent pixels set to black. Fluent: shrunk from 256 pixels "
    "(Lanczos on premultiplied colours), colours rounded so that a picture on any background changes by at most "
    "1.5 levels of 255, misnamed skin tones put right, flags of countries (another family's) left out. Noto: "
    "the flag of Sark (it showed another) left out. Captions: CLDR labels in lower case, reworded (colons, flags, "
    "hair, skin tones)."
)
SPLIT = (
    f"sha256('{SPLIT_SALT}:' + key of the group's leader): 10 % unseen, 10 % partial (one vendor held out), the "
    "rest train. A group is a base concept with its skin tones, joined with its mirrored twin and with concepts "
    "that some vendor draws identically."
)
LIMITS = (
    "Twemoji's credit has to be shown wherever its pictures are (CC-BY-4.0). Fluent lacks flags of countries, "
    "mirrored people, recent concepts and the mixed skin tones of couples. Concepts that differ only by gender or"
    " by a small detail may lie in different splits."
)


def without_misdrawn(records: list[dict[str, Any]], cells: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The cells without ``MISDRAWN``, which the records stop claiming. Done after the split, so that a picture never
    lies on two sides."""
    kept = {}
    for vendor, pictures in cells.items():
        drawn = [r for r in records if vendor in r["vendors"]]
        kept[vendor] = pictures[[(vendor, r["key"]) not in MISDRAWN for r in drawn]]
    for vendor, key in MISDRAWN:
        next(r for r in records if r["key"] == key)["vendors"].remove(vendor)
    return kept


def card_of(records: list[dict[str, Any]], sizes: Mapping[str, int]) -> dict[str, Any]:
    bases = [r for r in records if "base" not in r]
    parts = {
        part: {"package": f"{name}@{version}", "registry": "npm", "sha256": sha256} | LICENCES[part]
        for part, (name, version, sha256) in PACKAGES.items()
    }
    counts = {
        "concepts": len(records),
        "base": len(bases),
        "skin_tones": len(records) - len(bases),
        "images": {v: sum(v in r["vendors"] for r in records) for v in VENDORS},
        "base_images": {v: sum(v in r["vendors"] for r in bases) for v in VENDORS},
        "base_split": dict(Counter(r["split"] for r in bases)),
    }
    return {
        "name": "emoji",
        "what": "Emoji of three families at 64 pixels with transparency, captions, keywords and a fixed split.",
        "command": "python -m sfumato.zoo.build_emoji --out src/sfumato/zoo/data/emoji",
        "parts": parts,
        "changes": CHANGES,
        "split": SPLIT,
        "counts": counts,
        "bytes": dict(sizes),
        "limits": LIMITS,
    }


def build(out: Path, cache: Path, effort: int = 6) -> dict[str, Any]:
    """Write the sheets (``noto-0.webp`` ...), ``index.json`` and ``card.json`` into ``out`` and return the card."""
    from PIL import Image

    tar = {part: npm_package(name, version, cache, sha256=sha) for part, (name, version, sha) in PACKAGES.items()}
    rows = json.loads(members(tar["noto"], r"package/(emoji\.json)")["emoji.json"])
    labels = json.loads(members(tar["captions"], r"package/(en/data\.json)")["en/data.json"])
    files = {
        "noto": members(tar["noto"], r"package/img/google/64/(.*\.png)"),
        "twemoji": members(tar["twemoji"], r"package/img/twitter/64/(.*\.png)"),
        "fluent": {fluent_key(k): v for k, v in members(tar["fluent"], r"package/assets/(.*)\.webp").items()},
    }
    records = concepts_of(rows, {plain(label["hexcode"]): label for label in labels}, files["fluent"])
    cells, sizes = {}, {}
    for vendor in VENDORS:
        pictures = []
        for record in (r for r in records if vendor in r["vendors"]):
            data = files[vendor][record["fluent" if vendor == "fluent" else "file"]]
            image = Image.open(io.BytesIO(data)).convert("RGBA")
            pictures.append(np.asarray(image) if image.size == (CELL, CELL) else premultiplied_resize(image, CELL))
        cells[vendor] = rounded(np.stack(pictures), ROUNDING.get(vendor, 0))
    assign_splits(records, cells)
    cells = without_misdrawn(records, cells)
    made: dict[str, bytes] = {}
    for vendor in VENDORS:
        sheets = [cells[vendor][start : start + SHEET] for start in range(0, len(cells[vendor]), SHEET)]
        made |= {f"{vendor}-{k}.webp": webp(sheet_of(sheet), effort) for k, sheet in enumerate(sheets)}
        sizes[vendor] = sum(len(data) for name, data in made.items() if name.startswith(vendor))
        print(f"{vendor}: {len(cells[vendor])} pictures, {sizes[vendor] / 1e6:.2f} MB", file=sys.stderr)
    kept = [{key: value for key, value in r.items() if key not in ("file", "fluent")} for r in records]
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in kept]
    made["index.json"] = ("[\n" + ",\n".join(lines) + "\n]\n").encode()
    sizes["index"] = len(made["index.json"])
    card = card_of(records, sizes)
    made["card.json"] = (json.dumps(card, ensure_ascii=False, indent=1) + "\n").encode()
    for name, data in made.items():  # only now: encoding takes minutes, and sheets and index belong together
        write_atomically(out / name, data)
    return card


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sfumato.zoo.build_emoji", description="Build the bundled emoji set."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write the sheets, the index and the card into"
    )
    parser.add_argument("--cache", type=Path, default=None, help="folder of npm tarballs (default: the sfumato cache)")
    parser.add_argument(
        "--effort",
        type=int,
        default=6,
        choices=range(7),
        help="WebP effort; 6 is smallest and takes minutes, the pixels are the same",
    )
    options = parser.parse_args(arguments)
    try:
        card = build(options.out, options.cache or cache_folder() / "npm", options.effort)
    except (InputError, SfumatoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(card["counts"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
