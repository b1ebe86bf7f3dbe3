"""``sfumato edit``: before and after side by side, the list of methods, and refusals."""

from __future__ import annotations

import torch
from PIL import Image

import sfumato

from .test_commands import pixels


def picture(path):
    Image.frombytes("RGB", (8, 8), bytes(range(192))).save(path)
    return path


def test_before_and_after_are_what_the_library_gives(run, models, tmp_path):
    source = picture(tmp_path / "in.png")
    model = models / "styled"
    found = run(
        "edit", source, "-m", model, "--prompt", "noto", "--method", "sdedit(strength=0.5)", "--steps", 4, "--json"
    ).record
    given = pixels(source).permute(2, 0, 1).contiguous()
    after = sfumato.edit(sfumato.load(model), given, "noto", method="sdedit", strength=0.5, steps=4)[0]
    sheet = pixels(tmp_path / "edit.png")
    assert found["calls"] == 2 and sheet.shape[1] > 2 * 8
    run(
        "edit",
        source,
        "-m",
        model,
        "--prompt",
        "noto",
        "--method",
        "sdedit(strength=0.5)",
        "--steps",
        4,
        "--only",
        "--out",
        "o.png",
    ).fine()
    assert torch.equal(pixels(tmp_path / "o.png"), after.permute(1, 2, 0))


def test_the_list_names_every_method_and_its_needs(run):
    rows = run("edit", "--list", "--json").record["methods"]
    assert [row["method"] for row in rows] == sfumato.editing.names()
    assert all(row["what it does"] for row in rows)
    assert "sdedit" in run("edit", "--list").fine().stdout


def test_refusals_are_one_line(run, models, tmp_path):
    source = picture(tmp_path / "in.png")
    for arguments, said in [
        ((), "which picture"),
        ((tmp_path / "no.png", "--prompt", "noto"), "no.png"),
        ((source, "--prompt", "noto", "--method", "magic"), "no edit method"),
        ((source, "--method", "sdedit"), "needs"),
        ((source, "--prompt", "noto", "--method", "sdedit", "--points", "1,2"), "X,Y,U,V"),
        ((source, "--prompt", "noto", "--method", "sdedit", "--out", "a.jpg"), ".png"),
        ((source, "--prompt", "noto", "--method", "sdedit", "--cond", "vendor"), "NAME=VALUE"),
    ]:
        found = run("edit", *arguments, "-m", models / "styled")
        assert found.status == 2 and said in found.stderr and found.stderr.count("\n") == 1, found.stderr


def test_a_layout_of_words_needs_no_picture(run, models, tmp_path):
    given = ("edit", "-m", models / "styled", "--source", "noto", "--prompt", "fluent", "--steps", 6)
    run(*given, "--method", "magicmix(nu=0.4)", "--out", "m.png").fine()
    method = sfumato.editing.get("magicmix", nu=0.4)
    image = sfumato.editing.mix(sfumato.load(models / "styled"), "noto", "fluent", method=method, steps=6)[0]
    sheet = pixels(tmp_path / "m.png")
    assert torch.equal(sheet[:: sheet.shape[0] // 8, :: sheet.shape[1] // 8], image.permute(1, 2, 0))
    for more, said in [
        (("--method", "sdedit"), "which picture"),
        (("--method", "magicmix", "--points", "1,1,2,2"), "points"),
    ]:
        found = run(*given, *more)
        assert found.status == 2 and said in found.stderr
