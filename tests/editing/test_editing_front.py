"""The front door of editing: pictures, texts, masks and points in, one clear error for each that does not fit."""

from __future__ import annotations

import pytest
import torch
from tiny_editing import tiny

import sfumato as sf
from sfumato import editing
from sfumato.core import InputError
from sfumato.zoo import edits, score_edits


@pytest.fixture(scope="module")
def pipe():
    return tiny(sf.processes.Cosine())


IMAGE = torch.full((3, 8, 8), 100, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": IMAGE.float()}, "uint8"),
        ({"image": IMAGE[0]}, "uint8"),
        ({"prompt": ["noto", "twemoji"]}, "2 texts in prompt"),
        ({"method": "sedit"}, "did you mean 'sdedit'"),
        ({"method": "sdedit", "strength": 0.0}, "above 0"),
        ({"method": "sdedit", "colour": 1}, "takes"),
        ({"method": editing.get("sdedit"), "strength": 0.4}, "brings its own"),
        ({"method": "sdedit(strength=0.4)", "strength": 0.4}, "not both"),
        ({"method": "sdedit", "steps": 0}, "steps = 0"),
        ({"method": "sdedit", "steps": -3}, "steps = -3"),
        ({"method": "sdedit", "steps": 2.5}, "whole number"),
        ({"method": "sdedit", "mask": torch.zeros(8, 8)}, "empty"),
        ({"method": "sdedit", "mask": torch.ones(4, 4)}, "does not fit"),
        ({"method": "sdedit", "mask": torch.full((8, 8), 2.0)}, "lies in"),
        ({"method": "sdedit", "cond": {"colour": "red"}}, "reads no"),
        ({"image": "nowhere.png", "method": "sdedit"}, "nowhere.png"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(pipe, options, said):
    given = {"image": IMAGE, "prompt": "noto", "method": "sdedit"} | options
    with pytest.raises((sf.SfumatoError, FileNotFoundError), match=said):
        sf.edit(pipe, given.pop("image"), given.pop("prompt"), **given)


def test_points_lie_in_the_picture():
    from sfumato.editing.front import _points

    assert _points([(1, 2, 3, 4)], IMAGE[None]) == ((1.0, 2.0, 3.0, 4.0),)
    with pytest.raises(InputError, match="outside"):
        _points([(1, 2, 3, 8)], IMAGE[None])
    with pytest.raises(InputError, match="from x"):
        _points([(1, 2)], IMAGE[None])


def test_what_is_outside_the_mask_returns_exactly(pipe):
    mask = torch.zeros(8, 8)
    mask[:, :3] = 1
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    after = sf.edit(pipe, images, "noto", method="sdedit", strength=1.0, mask=mask, steps=5)
    assert torch.equal(after[..., 3:], images[..., 3:])
    assert not torch.equal(after[..., :3], images[..., :3])


def test_ddim_there_and_back_is_the_identity_in_the_limit(pipe):
    images = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    errors = []
    for steps in (20, 80):
        found = editing.perform(
            pipe, images, "noto", source="noto", method="ddim-inversion", guidance=1.0, steps=steps, strength=0.8
        )
        errors.append((found.state - pipe.codec.encode(images)).abs().mean())
    assert errors[1] < errors[0] / 2.5  # first order


def test_a_file_is_brought_to_the_size_of_the_model(pipe, tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 10), (200, 0, 0)).save(tmp_path / "wide.png")
    assert sf.edit(pipe, tmp_path / "wide.png", "noto", method="sdedit", steps=2).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("kind", edits.KINDS)
def test_true_edits_differ_inside_their_mask_only(kind):
    found = edits.load(kind, 8, size=32, seed=1)
    assert len(found) == 8 and found.before.shape == (8, 3, 32, 32)
    apart = (found.before.int() - found.after.int()).abs().amax(1, keepdim=True)
    assert (apart * (1 - found.mask)).max() <= 24 and (apart * found.mask).flatten(1).amax(1).min() > 24
    if kind == "vendor":
        assert all(a != b for a, b in zip(found.source_cond["vendor"], found.cond["vendor"], strict=True))
    else:
        assert found.source_cond == found.cond and all(a != b for a, b in zip(found.source, found.target, strict=True))
    again = found.select([3, 1])
    assert again.source == [found.source[3], found.source[1]] and torch.equal(again.mask[0], found.mask[3])


def test_the_score_of_doing_nothing_and_of_the_truth():
    found = edits.load("tone", 6, size=32, seed=2)
    nothing, truth = (score_edits.measured(found, x) for x in (found.before, found.after))
    assert torch.equal(nothing["distance"], torch.ones(6)) and not truth["distance"].any()
    assert not nothing["reached"].any() and truth["reached"].all()
    assert not nothing["changed"].any() and truth["changed"].max() < 24
    assert score_edits.summary(truth)["likeness"].value == pytest.approx(1, abs=1e-5)


def test_bad_kinds_and_numbers_of_edits():
    with pytest.raises(InputError, match="one of tone"):
        edits.load("hat")
    with pytest.raises(InputError, match="there are"):
        edits.load("attribute", 10_000)


def test_guidance_may_be_a_spec_as_everywhere(pipe):
    options = {"method": "sdedit", "steps": 3, "strength": 0.7}
    number, spec = (sf.edit(pipe, IMAGE, "noto", guidance=g, **options) for g in (3.0, "cfg(scale=3.0)"))
    assert torch.equal(number, spec)
    with pytest.raises(sf.SfumatoError, match="no guidance"):
        sf.edit(pipe, IMAGE, "noto", guidance="magic(scale=2)", **options)
