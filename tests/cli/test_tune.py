"""``sfumato tune`` and ``sample --sampler``: a card made by one command is used by the other."""

from __future__ import annotations

import sfumato

QUICK = ("--items", 4, "--unseen", 4, "--fine", 8, "--budget", 6)


def test_a_tuned_card_samples_what_the_pipeline_samples_with_it(run, models, tmp_path):
    model = models / "styled"
    found = run("tune", model, "--nfe", 3, "--method", "olss", "--out", "c.json", *QUICK, "--json").record
    assert found["out"] == "c.json" and found["nfe"] <= 3 and found["seconds"] > 0
    assert len(set(found["seeds"].values())) == 3 and found["after"]["n"] == 4
    made = run("sample", "noto", "-m", model, "-n", 1, "--sampler", "c.json", "--scale", 1, "--json").record
    assert made["steps"] == found["steps"] and made["solver"] == found["made_by"]
    image = sfumato.load(model).generate(["noto"], sampler=tmp_path / "c.json")[0]
    from .test_commands import pixels

    assert (pixels(tmp_path / "out.png") == image.permute(1, 2, 0)).all()
    assert run("sample", "--replay", "out.png", "--json").record["same"] is True


def test_a_table_and_how_long_it_took(run, models):
    found = run("tune", models / "styled", "--nfe", 3, "--method", "untuned", *QUICK).fine()
    assert "unseen starts" in found.stdout and "Tuned in" in found.stdout and "styled-3.json" in found.stdout


def test_the_choice_can_be_by_the_distance_of_distributions(run, models):
    options = ("tune", models / "styled", "--nfe", 3, "--method", "untuned", *QUICK, "--json")
    near, alike = run(*options).record, run(*options, "--by", "distance").record
    scores = [[row["score"] for row in found["rows"]] for found in (near, alike)]
    assert scores[0] != scores[1] and min(scores[1]) > 0
    assert "'trajectory' or 'distance'" in run(*options, "--by", "magic").stderr
    assert run(*options, "--by", "distance", "--items", 2).record["nfe"] <= 3


def test_a_card_of_another_model_is_refused(run, models, words):
    run("tune", models / "styled", "--nfe", 2, "--method", "untuned", "--out", "c.json", *QUICK).fine()
    refused = run("sample", "a heart", "-m", models / "worded", "--sampler", "c.json", "-n", 1)
    assert refused.status == 2 and "fingerprint" in refused.stderr
    run("sample", "a heart", "-m", models / "worded", "--sampler", "c.json", "-n", 1, "--force").fine()
    both = run("sample", "-m", models / "styled", "--sampler", "c.json", "--steps", 4)
    assert both.status == 2 and "--steps" in both.stderr
    assert run("tune", models / "styled", "--out", "c.png").status == 2
    assert run("tune", models / "styled", "--method", "magic").status == 2


def test_commands_that_measure_take_the_spec_of_a_guidance(run, models, tmp_path):
    model = models / "styled"
    spec = ("--guidance", "cfg(scale=3, interval=(0.2, 0.9))")
    compared = ("compare", model, "--solver", "ddim", "--nfe", 2, "-n", 8, "--fine", 4, "--prompt", "noto")
    plain, guided = (run(*compared, *more, "--json").record["rows"][0] for more in ((), spec))
    assert guided["error"] != plain["error"]
    found = run("tune", model, "--nfe", 2, "--method", "untuned", *QUICK, *spec, "--out", "c.json", "--json").record
    assert found["guidance"] == spec[1]
    card = run("sample", "noto", "-m", model, "--sampler", "c.json", "-n", 1, "--json").record
    assert card["guidance"] == spec[1] and run("sample", "--replay", "out.png").status == 0
    other = run("sample", "noto", "-m", model, "--sampler", "c.json", "-n", 1, "--guidance", 2)
    assert other.status == 2 and "tuned at guidance" in other.stderr
    assert "no guidance" in run("compare", model, "--guidance", "magic").stderr
    assert "guidance" in run("evaluate", model, "--reference", "digits:test", "--guidance", "magic").stderr
    image = ("invert", "out.png", "--prompt", "noto", "-m", model, "--steps", 2, "--out", "i.png")
    assert run(*image, *spec, "--json").record["guidance"] == spec[1]


def test_compare_ranks_students_and_accelerated_models_by_the_quality_of_their_pictures(run, models, tmp_path):
    model = models / "styled"
    asked = ("compare", model, "--solver", "ddim", "--nfe", 2, "-n", 8, "--fine", 4, "--guidance", 1)
    more = (
        "--also",
        model,
        "--accelerate",
        "deepcache(interval=2)",
        "--reference",
        "emoji:train",
        "--features",
        "pixels",
    )
    found = run(*asked, *more, "--metric", "kernel", "--out", "q.png", "--json").record
    assert len(found["rows"]) == 3 and all(row["quality"]["features"] == "pixels" for row in found["rows"])
    assert (tmp_path / "q.png").stat().st_size > 5000
    assert "kernel" in run(*asked, *more, "--metric", "kernel").fine().stdout
    assert "magic" in run(*asked, "--accelerate", "magic").stderr
    assert "--reference" in run(*asked, "--metric", "kernel").stderr
    words = run(*asked, "--reference", "digits:train", "--features", "pixels", "--metric", "text-agreement")
    assert words.status == 2 and "--prompt" in words.stderr
    apart = run(*asked, "--also", "digits").fine().stdout
    assert "no common starts" in apart and "digits on ," not in apart
