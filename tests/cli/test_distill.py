"""``sfumato distill``: a folder that samples, goes on, and refuses what would not be the same distillation."""

from __future__ import annotations

import json

import pytest

import sfumato
import sfumato.cli.distill  # noqa: F401 (registers the command)

QUICK = (
    "--set",
    "iterations=4",
    "--set",
    "batch=2",
    "--set",
    "trajectories=4",
    "--set",
    "calls=4",
    "--set",
    "save_every=2",
)


def test_a_student_is_a_model_with_a_card(run, models, tmp_path):
    found = run("distill", models / "styled", "--steps", 2, "--out", "fast", *QUICK, "--json").record
    assert found["pipeline"] == "fast/pipeline" and found["card"]["method"] == "segments"
    assert set(found["card"]["scores"]["median distance to the teacher's end"]) == {
        "student", "teacher with ddim at as many steps",
    }  # fmt: skip
    made = sfumato.load(tmp_path / "fast")
    assert (made.steps, made.guidance, made.solver) == (2, 1.0, "ddim")
    assert made.card["teacher"]["card"]["what"] == "tiny" and made.card["cost"]["iterations"] == 4
    sampled = run("sample", "noto", "-m", "fast", "-n", 1, "--json").record
    assert sampled["steps"] == 2


def test_a_distillation_goes_on_as_it_was(run, models, tmp_path):
    run("distill", models / "styled", "--steps", 2, "--out", "fast", *QUICK).fine()
    again = run("distill", models / "styled", "--steps", 2, "--out", "fast", *QUICK)
    assert again.status == 2 and "--resume" in again.stderr
    other = run("distill", "--out", "fast", "--resume", "--set", "lr=0.1")
    assert other.status == 2 and "lr cannot change" in other.stderr
    more = run("distill", "--out", "fast", "--resume", "--set", "iterations=6", "--json").record
    assert more["settings"]["iterations"] == 6 and more["card"]["cost"]["iterations"] == 6
    assert json.loads((tmp_path / "fast" / "distill.json").read_text())["settings"]["iterations"] == 6
    nothing = run("distill", "--out", "empty", "--resume")
    assert nothing.status == 2 and "no distillation" in nothing.stderr


def test_a_method_that_needs_pictures_is_given_them_with_what_they_show(run, models, tmp_path):
    from PIL import Image

    for style in ("noto", "fluent"):
        (tmp_path / "pictures" / style).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (12, 12), (80 * k, 20, 60)).save(tmp_path / "pictures" / style / f"{k}.png")
    quick = [*QUICK, "--set", "latent=3"]
    found = run(
        "distill",
        models / "styled",
        "--method",
        "ddgan",
        "--steps",
        2,
        "--out",
        "fast",
        "--data",
        "pictures",
        *quick,
        "--json",
    )
    assert found.record["card"]["cost"]["pictures"] == 6 and found.record["data"] == "pictures"
    assert found.record["settings"]["latent"] == 3
    more = run("distill", "--out", "fast", "--resume", "--set", "iterations=6", "--json").record
    assert more["card"]["cost"]["iterations"] == 6
    other = run("distill", "--out", "fast", "--resume", "--data", "others")
    assert other.status == 2 and "data cannot change" in other.stderr
    run("sample", "noto", "-m", "fast", "-n", 1).fine()
    one = run("distill", models / "styled", "--method", "boot", "--out", "once", *QUICK, "--json").record
    assert one["settings"]["steps"] == 1 and one["card"]["method"] == "boot"


def test_what_cannot_be_is_one_line(run, models):
    for wrong, text in (
        (("--method", "magic"), "one of segments"),
        (("--set", "colour=1"), "no setting 'colour'"),
        (("--set", "lr"), "key=value"),
        (("--set", "calls=3"), "multiple"),
        (("--method", "mmd-ddm"), "give --data"),
        (("--data", "digits"), "has no classes among"),
        (("--method", "ddgan", "--data", "digits"), "told what it draws"),
    ):
        refused = run("distill", models / "styled", "--steps", 2, "--out", "no", *wrong)
        assert refused.status == 2 and text in refused.stderr
    assert run("distill", "--out", "no").status == 2


def test_a_pipeline_of_diffusers_gives_one_of_diffusers(run, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    tiny.pipeline("pixels").save_pretrained(tmp_path / "theirs")
    quick = [v.replace("batch=2", "batch=2") for v in QUICK]
    found = run("distill", "theirs", "--steps", 2, "--out", "fast", *quick, "--json").record
    assert found["card"]["teacher"]["model"] == "theirs"
    again = sfumato.from_diffusers(tmp_path / "fast" / "pipeline")
    assert (again.steps, again.solver, again.guidance) == (2, "ddim", 1.0)
    assert again.card["method"] == "segments"
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "fast" / "pipeline")
    ours, before = (dict(p.unet.named_parameters()) for p in (pipe, tiny.pipeline("pixels")))
    assert any(not ours[k].equal(before[k]) for k in ours)
