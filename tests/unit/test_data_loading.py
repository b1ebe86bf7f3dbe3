"""Pictures, shards and batches: what is read, what is refused, and in which order."""

from __future__ import annotations

import json
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.core import InputError
from sfumato.training.data import Arrays, Batches, ImageFolder, Shards, read_image, write_shards
from sfumato.training.images import as_pixels

RED = (204, 51, 102)  # in the web palette


def picture(path, mode="RGB", size=(24, 16), colour=RED, **save):
    image = Image.new("RGB", size, colour).convert(mode)
    image.save(path, **save)
    return path


def flat(x):
    """The colour of a picture of one colour."""
    assert (x == x[:, :1, :1]).all()
    return tuple(x[:, 0, 0].tolist())


# ------------------------------------------------------------------ pictures


PLAIN = [(mode, ending) for mode in ("RGB", "RGBA", "P") for ending in ("png", "tiff", "webp", "bmp", "gif")]


@pytest.mark.parametrize(("mode", "ending"), [*PLAIN, ("CMYK", "tiff"), ("CMYK", "jpg")])
def test_every_mode_and_format_gives_the_same_colour(tmp_path, mode, ending):
    lossless = {"lossless": True} if ending == "webp" else {}
    x = read_image(picture(tmp_path / f"a.{ending}", mode, **lossless), 8)
    assert x.dtype == torch.uint8 and x.shape == (3, 8, 8)
    assert max(abs(a - b) for a, b in zip(flat(x), RED, strict=True)) <= (2 if ending == "jpg" else 0)


def test_grey_16_bit_and_bilevel(tmp_path):
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert flat(read_image(tmp_path / "deep.png", 4)) == (156, 156, 156)  # 40000 / 257
    assert flat(read_image(picture(tmp_path / "l.png", "L", colour=(77, 77, 77)), 4)) == (77, 77, 77)
    assert flat(read_image(picture(tmp_path / "one.png", "1", colour=(255, 255, 255)), 4)) == (255, 255, 255)
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match=r"f\.tiff.*32-bit"):
        read_image(tmp_path / "f.tiff", 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_background(tmp_path, mode):
    image = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (10, 10), 0)
        image.info["transparency"] = 0
    image.convert(mode).save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    assert flat(read_image(tmp_path / "a.png", 4, background=(10, 20, 30))) == (10, 20, 30)


def test_half_transparent_is_the_mixture(tmp_path):
    Image.new("RGBA", (10, 10), (200, 0, 100, 128)).save(tmp_path / "a.png")
    expected = [round((c * 128 + 255 * 127) / 255) for c in (200, 0, 100)]
    assert max(abs(a - b) for a, b in zip(flat(read_image(tmp_path / "a.png", 4)), expected, strict=True)) <= 1


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    x = read_image(tmp_path / "a.png", (32, 16), fit="stretch")
    assert (x[:, :14] == 255).all() and (x[:, 18:] == 0).all()


def test_fit_crops_pads_or_stretches(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 20, fit="crop") == 255).all()
    padded = read_image(tmp_path / "a.png", 60, fit="pad", background=(9, 9, 9))
    assert (padded[:, :18] == 9).all() and (padded[:, 42:] == 9).all() and (padded[:, 30, 30] == 255).all()
    assert read_image(tmp_path / "a.png", 20, fit="stretch")[0, 10].float().mean() == pytest.approx(255 / 3, abs=3)
    with pytest.raises(InputError, match="crop, pad, stretch"):
        read_image(tmp_path / "a.png", 20, fit="cover")


def test_bounds_on_pixels_and_bytes(tmp_path):
    picture(tmp_path / "big.png", size=(300, 300))
    with pytest.raises(InputError, match=r"big\.png has 300 x 300 pixels.*max_pixels"):
        read_image(tmp_path / "big.png", 8, max_pixels=80_000)
    with pytest.raises(InputError, match=r"big\.png has \d+ bytes.*max_bytes"):
        read_image(tmp_path / "big.png", 8, max_bytes=100)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1_000_000), 9))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    with pytest.raises(InputError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png", 8)


def test_a_program_in_postscript_is_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"a\.png is not a picture"):
        read_image(tmp_path / "a.png", 8)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_an_input_error_or_a_picture(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    whole = picture(folder / "whole.png", size=(12, 12)).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:at]
    else:
        damaged = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    (folder / "damaged.png").write_bytes(damaged)
    try:
        assert read_image(folder / "damaged.png", 6).shape == (3, 6, 6)
    except InputError as error:
        assert "damaged.png" in str(error)


# ------------------------------------------------------------------ folders


def test_folder_labels_captions_and_order(tmp_path):
    for kind in ("dog", "cat"):
        (tmp_path / kind).mkdir()
        for i in range(2):
            picture(tmp_path / kind / f"{i}.png", colour=(i, i, i))
            (tmp_path / kind / f"{i}.txt").write_text(f"a {kind} {i}\n")
    folder = ImageFolder(tmp_path, 8)
    assert folder.classes == ["cat", "dog"] and len(folder) == 4
    batch = folder.batch([3, 0])
    assert batch["label"].tolist() == [1, 0] and batch["caption"] == ["a dog 1", "a cat 0"]
    assert batch["x"][:, 0, 0, 0].tolist() == [1, 0]


def test_captions_from_metadata_and_missing_ones(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "first"}) + "\n")
    with pytest.raises(InputError, match=r"1 of 2 pictures have no caption.*b\.png"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "b.txt").write_text("second")
    assert ImageFolder(tmp_path, 8).batch([0, 1])["caption"] == ["first", "second"]
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"metadata\.jsonl, line 1"):
        ImageFolder(tmp_path, 8)


def test_empty_and_absent_folders(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(InputError, match="holds no pictures"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(InputError, match="is not a folder"):
        ImageFolder(tmp_path / "nowhere", 8)


def test_bad_files_are_reported_or_left_out(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"bad\.png"):
        ImageFolder(tmp_path, 8).batch([0, 1])
    folder = ImageFolder(tmp_path, 8, skip_bad=True)
    assert [f.name for f in folder.files] == ["good.png"] and list(folder.bad) == [str(tmp_path / "bad.png")]
    (tmp_path / "good.png").unlink()
    with pytest.raises(InputError, match="none of the 1 pictures"):
        ImageFolder(tmp_path, 8, skip_bad=True)


# ------------------------------------------------------------------ shards


def fields(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=g)
    return {
        "x": x,
        "z": torch.randn(n, 5, generator=g).half(),
        "id": torch.arange(n),
        "caption": [f"item {i} é" for i in range(n)],
    }


def same(a, b):
    return set(a) == set(b) and all(a[k] == b[k] if isinstance(a[k], list) else torch.equal(a[k], b[k]) for k in a)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 23), per_shard=st.integers(1, 9), batch=st.integers(1, 7), data=st.data())
def test_shards_round_trip(tmp_path_factory, n, per_shard, batch, data):
    memory = Arrays(fields(n))
    disk = write_shards(memory, tmp_path_factory.mktemp("s"), per_shard=per_shard, batch=batch, card={"name": "t"})
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    assert len(disk) == n and same(disk.batch(rows), memory.batch(rows))
    assert same(pickle.loads(pickle.dumps(disk)).batch(rows), memory.batch(rows))


def test_npy_memory_map_is_a_field(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "a.npy", values)
    dataset = Arrays({"x": np.load(tmp_path / "a.npy", mmap_mode="r")})
    assert np.array_equal(dataset.batch([4, 1])["x"].numpy(), values[[4, 1]])


def test_writing_continues_after_the_last_whole_shard(tmp_path):
    memory, seen = Arrays(fields(20)), []

    def encode(part, stop=None):
        seen.append(part["id"].tolist())
        if stop is not None and stop in part["id"]:
            raise KeyboardInterrupt
        return {"x": part["x"].float().mean((2, 3)).half(), "id": part["id"]}

    with pytest.raises(KeyboardInterrupt):
        write_shards(memory, tmp_path, transform=lambda p: encode(p, 13), per_shard=6, batch=3)
    with pytest.raises(InputError, match="not a finished data set"):
        Shards(tmp_path)
    seen.clear()
    disk = write_shards(memory, tmp_path, transform=encode, per_shard=6, batch=3)
    assert seen[0] == [12, 13, 14]  # shards 0 and 1 are not made again
    assert torch.equal(disk.batch(range(20))["id"], torch.arange(20))
    assert len(write_shards(memory, tmp_path, transform=encode, per_shard=6)) == 20  # finished: opened, not written
    with pytest.raises(InputError, match="another data set"):
        write_shards(memory, tmp_path, transform=encode, per_shard=6, card={"codec": "other"})


def test_a_shard_that_is_cut_short_is_refused(tmp_path):
    write_shards(Arrays(fields(8)), tmp_path, per_shard=4)
    shard = tmp_path / "00001.safetensors"
    whole = shard.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"00001\.safetensors is not a whole shard"):
            Shards(tmp_path).batch([6])
    with pytest.raises(InputError, match="items 8 .. 8 of a data set of 8"):
        Shards(tmp_path).batch([8])


# ------------------------------------------------------------------ batches


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
def test_each_item_exactly_once_an_epoch(n, size, seed, epochs):
    batches = Batches(Arrays({"x": torch.zeros(n, 1)}), size, seed)
    order = [i for it in range(-(-epochs * n // size)) for i in batches.indices(it)]
    for e in range(epochs):
        assert sorted(order[e * n : (e + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ():
    n = 200
    one, other = (Batches(Arrays({"x": torch.zeros(n, 1)}), n, seed) for seed in (0, 1))
    orders = [one.indices(0), one.indices(1), other.indices(0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 9), it=st.integers(0, 50), cut=st.integers(0, 9), prefetch=st.booleans())
def test_a_batch_is_a_pure_function_of_the_iteration_and_parts_make_the_whole(size, it, cut, prefetch):
    dataset, cut = Arrays(fields(7)), min(cut, size)
    batches = Batches(dataset, size, 3, flip=True, cond={"id": "label"}, prefetch=prefetch)
    batches(it + 5), batches(max(it - 1, 0))  # what was asked before does not matter
    whole = batches(it)
    parts = [
        Batches(dataset, size, 3, flip=True, cond={"id": "label"}, prefetch=False).part(it, *p)
        for p in ((0, cut), (cut, size))
    ]
    parts = [p for p, (a, b) in zip(parts, ((0, cut), (cut, size)), strict=True) if b > a]
    assert torch.equal(whole["x"], torch.cat([p["x"] for p in parts]))
    assert torch.equal(whole["cond"]["label"], torch.cat([p["cond"]["label"] for p in parts]))
    assert whole["caption"] == [c for p in parts for c in p["caption"]]


def test_values_flips_and_conditions():
    dataset = Arrays(fields(500))
    batches = Batches(dataset, 500, 0, flip=True, cond=["id", "z"])
    batch = batches(0)
    original = dataset.batch(batch["cond"]["id"].tolist())["x"].float() / 127.5 - 1
    plain = (batch["x"] - original).abs().flatten(1).amax(1) < 1e-6
    mirrored = (batch["x"] - original.flip(-1)).abs().flatten(1).amax(1) < 1e-6
    assert (plain | mirrored).all() and 200 < mirrored.sum() < 300
    assert batch["x"].dtype == torch.float32 and batch["cond"]["z"].dtype == torch.float32 and "id" not in batch


def test_a_picture_that_cannot_be_read_stops_its_own_batch(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    batches = Batches(ImageFolder(tmp_path, 8), 1, 0)
    bad = next(it for it in range(4) if batches.indices(it) == [3])
    for it in range(bad):
        batches(it)
    with pytest.raises(InputError, match=r"3\.png"):
        batches(bad)


@pytest.mark.parametrize("make, message", [
    (lambda: Batches(Arrays({"x": torch.zeros(2, 1)}), 0), "at least 1 item"),
    (lambda: Batches(Arrays({"x": torch.zeros(2, 1)}), 1, cond=["y"])(0), "no field"),
    (lambda: Batches(Arrays({"x": torch.zeros(2, 3, 4, 4), "std": torch.zeros(2)}), 1, flip=True)(0), "latents"),
    (lambda: Arrays({"x": torch.zeros(2), "y": torch.zeros(3)}), "one length"),
    (lambda: Arrays({}), "one length"),
])  # fmt: skip
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_picture_may_be_a_file_a_pillow_image_an_array_or_a_tensor(tmp_path):
    path = picture(tmp_path / "a.png", size=(16, 16))
    want = read_image(path, 16)
    values = np.asarray(Image.open(path))
    for given_as in (path, str(path), Image.open(path), values, want, values[None], want[None]):
        assert torch.equal(as_pixels(given_as, 16), want[None])
    wide = Image.open(picture(tmp_path / "b.png", size=(32, 16)))
    assert torch.equal(as_pixels(wide, (16, 16))[0], read_image(tmp_path / "b.png", 16, fit="pad"))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert as_pixels(clear, 8).min() == 255 and as_pixels(clear, 8, background=(0, 0, 0)).max() == 0
    for wrong in (values.astype(np.float32), want.float(), values[..., 0], [1, 2], want[None, None]):
        with pytest.raises(InputError, match="reference: a file, a Pillow image"):
            as_pixels(wrong, 16, what="reference")
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path, 16)
