"""``sf.compare``: figures against a known truth, fronts, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sfumato as sf
from sfumato.core import InputError
from sfumato.evaluation import Measurement
from sfumato.evaluation.compare import compare, picture


def denoiser() -> sf.core.Denoiser:
    return sf.oracles.GaussianMixture([[-1.0, 0.5], [1.0, 0.0], [0.2, -1.2]], [0.2, 0.3, 0.25]).denoiser(
        sf.processes.VP()
    )


def test_errors_fall_with_calls_and_the_front_holds_what_nothing_beats() -> None:
    table = compare(denoiser(), solvers=["ddim", "arc", "heun", "ddpm"], nfe=[4, 16], n=16, shape=(2,), fine=64)
    rows = list(table)
    assert len(rows) == 8 and [r["calls"] for r in rows] == sorted(r["calls"] for r in rows)
    by = {(r["solver"], round(r["calls"])): r for r in rows}
    for name in ("ddim", "arc"):
        assert by[name, 16]["error"]["value"] < by[name, 4]["error"]["value"]
    assert by["arc", 16]["error"]["value"] < by["ddim", 16]["error"]["value"]
    assert by["heun", 15]["error"]["low"] <= by["heun", 15]["error"]["value"] <= by["heun", 15]["error"]["high"]
    assert "error" not in by["ddpm", 16] and by["ddpm", 16]["distance"] > 0, "a stochastic run has no end to compare"
    for cost in ("calls", "seconds"):
        front = [r for r in rows if r["front"] in (cost, "both")]
        assert front
        for row in front:
            rivals = [r for r in rows if "error" in r and r is not row and r[cost] <= row[cost]]
            assert all(r["error"]["value"] > row["error"]["value"] or r[cost] == row[cost] for r in rivals)


def test_calls_are_those_of_the_sampler_in_compare_as_in_tune_and_rows_are_what_guidance_makes_of_them() -> None:
    """Under guidance a call is one call of nfe, two rows of the network: in every table."""
    digits = sf.load("digits")
    settings = {"fine": 12, "guidance": 2.0}
    card = sf.tune(digits, nfe=4, method="untuned", items=4, unseen=4, budget=2, rehearsals=20, **settings)
    for scale, rows in ((2.0, 8), (1.0, 4)):
        samplers = [card] if scale == 2.0 else []
        table = compare(digits, solvers=["ddim"], nfe=[4], samplers=samplers, n=8, fine=12, guidance=scale)
        assert [(r["calls"], r["rows"]) for r in table] == [(4, rows)] * (1 + len(samplers))
    assert card.nfe == 4 and all(row["nfe"] <= 4 for row in card.rows)


def test_what_a_solver_refuses_is_a_row_and_equal_arguments_give_equal_figures() -> None:
    options = {"solvers": ["pndm"], "grids": ["karras", None], "nfe": [8], "n": 8, "shape": (2,), "fine": 32, "seed": 3}
    table = compare(denoiser(), **options)
    refused, kept = sorted(table, key=lambda r: "error" in r)
    assert "equally spaced" in refused["refused"] and refused["grid"] == "karras"
    assert kept["grid"] == "uniform" and kept["error"]["n"] == 8
    again = [r for r in compare(denoiser(), **options) if "error" in r]
    assert again[0]["error"] == kept["error"] and again[0]["distance"] == kept["distance"]


def test_a_tuned_card_is_a_row_of_its_own_and_another_model_refuses_it() -> None:
    card = sf.tune(denoiser(), nfe=4, method="untuned", shape=(2,), items=8, unseen=8, fine=32, budget=4, rehearsals=20)
    table = compare(denoiser(), solvers=["ddim"], nfe=[4], samplers=[card], n=12, shape=(2,), fine=48)
    ours = next(r for r in table if r["solver"].startswith("card"))
    assert (
        ours["calls"] <= 4
        and ours["error"]["value"] <= next(r for r in table if r["solver"] == "ddim")["error"]["value"]
    )
    other = sf.oracles.GaussianMixture([[0.0, 0.0], [1.0, 1.0]], [0.2, 0.2]).denoiser(sf.processes.VP())
    assert "fingerprint" in next(iter(compare(other, solvers=[], nfe=[4], samplers=[card], n=8, shape=(2,))))["refused"]


def test_the_picture_shows_every_sampler_and_bad_arguments_are_refused() -> None:
    table = compare(denoiser(), solvers=["ddim", "arc"], nfe=[4, 8], n=8, shape=(2,), fine=32)
    image = picture(table)
    assert min(image.size) > 300 and len(image.getcolors(1 << 20)) > 50
    for wrong in ({"n": 4}, {"nfe": []}, {"nfe": [0]}, {"fine": 1}):
        with pytest.raises(InputError):
            compare(denoiser(), **({"shape": (2,), "n": 8} | wrong))
    with pytest.raises(InputError, match="shape="):
        compare(denoiser(), n=8)


def test_students_and_accelerated_models_are_rows_beside_the_solvers_ranked_by_quality() -> None:
    teacher = sf.load("digits")
    same = replace(teacher, steps=4, solver="ddim", grid="uniform", guidance=1.0)

    def quality(images: torch.Tensor) -> Measurement:
        grey = float(images.double().mean())
        return Measurement("grey", grey, grey, grey, len(images), higher_is_better=True)

    table = compare(
        teacher, solvers=["ddim"], grids=["uniform"], nfe=[4], accelerations=["deepcache(interval=1)"],
        models={"student": same}, n=8, fine=8, guidance=1.0, quality=quality,
    )  # fmt: skip
    rows = {row["solver"]: row for row in table}
    assert set(rows) == {"ddim", "ddim, deepcache(interval=1)", "student"} and not any("refused" in r for r in table)
    assert len({row["error"]["value"] for row in rows.values()}) == 1, "three ways to say the same run"
    assert all(row["quality"]["value"] == rows["ddim"]["quality"]["value"] for row in rows.values())
    assert min(picture(table).size) > 300
    other = compare(teacher, solvers=[], nfe=[4], models={"emoji": sf.load("emoji-latent")}, n=8, fine=4)
    assert "no common starts" in next(iter(other))["refused"]
    with pytest.raises(InputError, match="Pipeline"):
        compare(denoiser(), shape=(2,), n=8, quality=quality)


def test_citations_name_the_systems_of_a_pipeline_a_recipe_and_a_slug() -> None:
    text = sf.cite(sf.load("digits"), "dpm-ot")
    assert text.count("@") == 3 and "sfumato" in text and "DPM-Solver++" in text and "DPM-OT" in text
    assert sf.cite("dpm-ot", "dpm-ot").count("@") == 2
    with pytest.raises(sf.SfumatoError, match="sfumato papers"):
        sf.cite("nothing-like-it")
