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


def test_a_card_of_another_model_is_refused(run, models, words):
    run("tune", models / "styled", "--nfe", 2, "--method", "untuned", "--out", "c.json", *QUICK).fine()
    refused = run("sample", "a heart", "-m", models / "worded", "--sampler", "c.json", "-n", 1)
    assert refused.status == 2 and "fingerprint" in refused.stderr
    run("sample", "a heart", "-m", models / "worded", "--sampler", "c.json", "-n", 1, "--force").fine()
    both = run("sample", "-m", models / "styled", "--sampler", "c.json", "--steps", 4)
    assert both.status == 2 and "--steps" in both.stderr
    assert run("tune", models / "styled", "--out", "c.png").status == 2
    assert run("tune", models / "styled", "--method", "magic").status == 2
