"""``sfumato invert``: the error of the way there and back, the noise in a file, a table of all ways, and refusals."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.editing import inversion
from sfumato.editing.recorded import NoiseMaps

from .test_commands import pixels


def picture(path):
    Image.frombytes("RGB", (8, 8), bytes(range(192))).save(path)
    return path


@pytest.mark.parametrize("method", ["edict", "bdia", "implicit", "ddim", "edit-friendly", "cycle-diffusion(eta=0.5)"])
def test_the_noise_in_the_file_draws_the_picture(run, models, tmp_path, method):
    source, model = picture(tmp_path / "in.png"), models / "styled"
    given = ["--cond", "vendor=noto", "--guidance", 3, "--steps", 8, "--strength", 0.9, "-m", model]
    found = run("invert", source, "--method", method, *given, "--out", "a/b.png", "--json").record
    assert found["latent"] == "a/b.safetensors" and found["method"] == method and len(found["methods"]) == 1
    latent, card = inversion.load(tmp_path / "a" / "b.safetensors")
    assert card["guidance"] == 3 and card["cond"] == {"vendor": "noto"} and card["weights"] == found["weights"]
    pipe = sfumato.load(model)
    told = pipe.conditions(1, None, vendor="noto")
    x0 = pipe.codec.encode(pixels(source).permute(2, 0, 1)[None].contiguous())
    if isinstance(latent, NoiseMaps):
        back = latent.decode(pipe.guided(3.0), cond=told)
    else:
        start = latent if latent.carry is not None else latent.x
        back = sfumato.sample(pipe.guided(3.0), solver=method, grid=pipe.grid, steps=8, x=start, start=0.9, cond=told)
    error = float((back - x0).square().mean().sqrt() / x0.square().mean().sqrt())
    assert error == pytest.approx(found["error"], rel=1e-2, abs=1e-6)
    assert found["error"] < 1e-3 or method == "ddim" and found["error"] > 1e-3
    assert pixels(tmp_path / "a" / "b.png").shape == (128, 3 * 128 + 2 * 4, 3)


def test_the_table_of_all_ways(run, models, tmp_path):
    source = picture(tmp_path / "in.png")
    found = run("invert", source, "--all", "--steps", 6, "-m", models / "styled", "--json").record
    rows = {row["method"]: row for row in found["methods"]}
    assert set(rows) == set(inversion.METHODS) and found["method"] == "edict"
    assert rows["edict"]["calls"] == 24 and rows["ddim"]["calls"] == 12 and rows["edit-friendly"]["calls"] == 12
    for name, row in rows.items():
        assert "refused" in row or (row["error"] < 1e-4) == (name != "ddim")
    shown = run("invert", source, "--all", "--steps", 6, "-m", models / "styled").fine().stdout
    assert all(name in shown for name in rows)


def test_refusals_are_one_line(run, models, tmp_path):
    source, model = picture(tmp_path / "in.png"), ("-m", models / "styled")
    for arguments, said in [
        ((tmp_path / "no.png", *model), "no.png"),
        ((source, "--method", "magic", *model), "no solver"),
        ((source, "--method", "ddpm", *model), "draws noise"),
        ((source, "--strength", 0, *model), "above 0"),
        ((source, "--out", "a.jpg", *model), ".png"),
        ((source, "--cond", "vendor", *model), "NAME=VALUE"),
        ((source, "--cond", "vendor=acme", *model), "one of"),
        ((source, "--prompt", "noto", "-m", "nothing"), "nothing"),
    ]:
        found = run("invert", *arguments)
        assert found.status == 2 and said in found.stderr and found.stderr.count("\n") == 1, found.stderr
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(sfumato.SfumatoError, match="no latent"):
        inversion.load(tmp_path / "bad.safetensors")


def test_the_latent_of_many_is_that_of_each(models):
    """Library: items do not depend on the batch, and a Step in the file is the Step."""
    pipe = sfumato.load(models / "styled")
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for method in ("edict", "edit-friendly"):
        many = inversion.invert(pipe, images, ["noto"] * 3, method=method, steps=5, guidance=2.0)
        one = inversion.invert(pipe, images[:1], "noto", method=method, steps=5, guidance=2.0)
        assert torch.allclose(many.back[:1], one.back, atol=1e-4) and many.error.shape == (3,)
        assert many.calls == one.calls
