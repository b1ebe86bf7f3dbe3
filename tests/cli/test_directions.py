"""``sfumato directions``: learned by one command, followed by another, equal to what the library does."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import sfumato
from sfumato import editing
from sfumato.core import InputError
from sfumato.editing.boundary import Boundaries
from sfumato.editing.directions import Direction, learn, learning, load

from .test_commands import pixels
from .test_edit import picture


@pytest.fixture
def kinds(tmp_path):
    """Folders ``dark`` and ``light`` of 12 noisy pictures each."""
    generator = torch.Generator().manual_seed(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / name).mkdir()
        for i in range(12):
            noisy = (level + 20 * torch.randn(8, 8, 3, generator=generator)).clamp(0, 255).byte()
            Image.fromarray(noisy.numpy()).save(tmp_path / name / f"{i:02}.png")
    return "--from", tmp_path / "dark", "--to", tmp_path / "light"


def images(folder) -> torch.Tensor:
    return torch.stack([pixels(path).permute(2, 0, 1) for path in sorted(folder.iterdir())])


@pytest.mark.parametrize("method", learning.METHODS)
def test_what_is_learned_by_one_command_is_followed_by_another(run, models, kinds, tmp_path, method):
    model, source = models / "styled", picture(tmp_path / "in.png")
    found = run(
        "directions", model, *kinds, "--method", method, "--steps", 10, "--out", "d.safetensors", "--json"
    ).record
    assert found["pictures"] == [12, 12] and found["method"] == method
    numbers = "distance=3" if method == "boundary-diffusion" else "scale=2"
    given = ("edit", source, "-m", model, "--method", f"{method}({numbers})", "--steps", 10, "--only")
    run(*given, "--direction", "d.safetensors", "--out", "o.png").fine()

    pipe = sfumato.load(model)
    learned = learn(pipe, images(tmp_path / "dark"), images(tmp_path / "light"), method=method, steps=10)
    image = pixels(source).permute(2, 0, 1)
    edited = sfumato.edit(pipe, image, method=f"{method}({numbers})", direction=learned.direction, steps=10)[0]
    assert torch.equal(pixels(tmp_path / "o.png"), edited.permute(1, 2, 0))
    field = "boundaries" if method == "boundary-diffusion" else "direction"
    key, _, value = numbers.partition("=")
    method_itself = editing.get(method, **{field: learned.direction, key: float(value)})
    assert torch.equal(sfumato.edit(pipe, image, method=method_itself, steps=10)[0], edited)


def test_a_file_holds_the_direction_to_the_last_bit(models, kinds, tmp_path):
    pipe = sfumato.load(models / "styled")
    dark, light = images(tmp_path / "dark"), images(tmp_path / "light")
    boundary = learn(pipe, dark, light, time=0.4, steps=10, seed=1)
    again = load(boundary.save(tmp_path / "b.safetensors"))
    assert isinstance(again.direction, Boundaries) and again.card == boundary.card and again.direction.time == 0.4
    for space in ("x", "h"):
        ours, theirs = (getattr(d.direction, space) for d in (boundary, again))
        assert torch.equal(ours.normal, theirs.normal) and (ours.offset, ours.spread) == (theirs.offset, theirs.spread)
    encoded = pipe.codec.encode(torch.cat([dark, light]))
    assert boundary.card["accuracy"]["x"] > 0.9 and encoded.shape == (24, 3, 8, 8)
    for component in (0, 1):
        found = learn(pipe, method="h-space", component=component, n=6, steps=4)
        held = load(found.save(tmp_path / "h.safetensors"))
        assert isinstance(held.direction, Direction) and torch.equal(held.direction.vectors, found.direction.vectors)
        assert held.direction.times == found.direction.times and held.card["component"] == component
    of_pictures = learn(pipe, dark, method="h-space", steps=4).direction
    assert isinstance(of_pictures, Direction) and not torch.equal(of_pictures.vectors, found.direction.vectors)


def test_wrong_requests_are_one_line(run, models, words, kinds, tmp_path):
    model, source = models / "styled", picture(tmp_path / "in.png")
    run("directions", model, *kinds, "--method", "h-space", "--steps", 2, "--out", "h.safetensors").fine()
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    edit = ("edit", source, "-m", model, "--method", "boundary-diffusion")
    for arguments, said in [
        (("directions", model, "--from", tmp_path / "dark"), "give both"),
        (("directions", model, "--to", tmp_path / "dark"), "give both"),
        (("directions", model, *kinds, "--out", "d.json"), ".safetensors"),
        (("directions", model, *kinds, "--method", "edict"), "h-space"),
        (("directions", model, *kinds, "--method", "h-space", "--time", 0.3), "time="),
        (("directions", model, *kinds, "--time", 2), "(0, 1]"),
        (("directions", model, *kinds, "-n", 9), "9 and 9 pictures: a boundary is learned from at least 10"),
        (("directions", model, *kinds, "--steps", 6), "a multiple, or time="),
        (("directions", model, *kinds, "--component", 1), "leave it out"),
        (("directions", model, *kinds, "--method", "h-space", "--component", 1), "leave it out"),
        (("directions", model, "--from", "digits:train=eleven"), "eleven"),
        (("directions", model, "--from", "nowhere"), "nowhere"),
        (edit, "sfumato directions"),
        ((*edit, "--direction", "h.safetensors"), "give direction="),
        ((*edit, "--direction", "none.safetensors"), "no direction"),
        ((*edit, "--direction", "broken.safetensors"), "broken"),
        ((*edit[:3], models / "worded", *edit[4:-1], "h-space", "--direction", "h.safetensors"), "another model"),
        ((*edit[:-1], "sdedit", "--prompt", "noto", "--direction", "h.safetensors"), "does not use"),
    ]:
        found = run(*arguments)
        assert found.status == 2 and said in found.stderr, (arguments, found.stderr)
    with pytest.raises(InputError, match="known are"):
        learning._whole({}, {"kind": "elsewhere"})


def test_a_part_of_a_set_is_a_class_or_words_of_a_caption(run, models):
    found = run(
        "directions", models / "styled", "--from", "digits:train=three", "--to", "digits:train=eight", "-n", 10, "--time", 0.5,
        "--steps", 4, "--json",
    ).record  # fmt: skip
    assert found["pictures"] == [10, 10] and found["from"] == "digits:train=three"


def test_a_grey_model_learns_from_grey_pictures(run):
    halves = "--from", "digits:train=three", "--to", "digits:train=eight"
    found = run("directions", "digits", *halves, "-n", 10, "--time", 0.5, "--steps", 4, "--json").record
    assert found["pictures"] == [10, 10]
