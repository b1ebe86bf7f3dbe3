"""Each command: what it writes, and the one JSON object it prints."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import sfumato
from sfumato import recipes
from sfumato.recipes import Check, Findings, recipe
from sfumato.training.data import Shards

from .conftest import STYLES


def pixels(path) -> torch.Tensor:
    with Image.open(path) as picture:
        flat = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        return flat.view(picture.height, picture.width, 3)


def test_a_sheet_holds_the_pictures_of_the_pipeline(run, models, tmp_path):
    model = models / "styled"
    found = run(
        "sample", "noto", "fluent", "-m", model, "-n", 2, "--scale", 1, "--columns", 3, "--seed", 5, "--json"
    ).record
    images = sfumato.load(model).generate(["noto", "noto", "fluent", "fluent"], seed=5)
    sheet = pixels(tmp_path / "out.png")
    assert tuple(sheet.shape) == (8 + 4 + 8, 3 * 8 + 2 * 4, 3)
    for i, image in enumerate(images):
        top, left = i // 3 * 12, i % 3 * 12
        assert torch.equal(sheet[top : top + 8, left : left + 8], image.permute(1, 2, 0))
    assert found["out"] == "out.png" and (found["steps"], found["solver"], found["grid"]) == (
        3,
        "dpm-solver++",
        "arctan",
    )


def test_options_reach_the_sampler(run, models, words, tmp_path):
    options = {"solver": "heun", "grid": "karras(rho=5)", "steps": 2, "guidance": 1.5, "seed": 3}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    run(
        "sample",
        "a heart",
        "-m",
        models / "worded",
        "-n",
        3,
        "--vendor",
        "twemoji",
        *flags,
        "--scale",
        1,
        "--columns",
        3,
    ).fine()
    images = sfumato.load(models / "worded").generate(["a heart"] * 3, cond={"vendor": "twemoji"}, **options)
    sheet = pixels(tmp_path / "out.png")
    assert torch.equal(sheet[:, :8], images[0].permute(1, 2, 0)) and torch.equal(
        sheet[:, 24:], images[2].permute(1, 2, 0)
    )


def test_a_solver_that_needs_a_grid_of_its_own_gets_it(run, models, tmp_path):
    for solver, grid in (("pndm", "uniform"), ("arc", "arc"), ("ddim", None)):
        given = ["--model", models / "styled", "-n", 1, "--steps", 5, "--solver", solver, "--out", tmp_path / "s.png"]
        card = run("sample", "noto", *given, "--json").record
        assert grid in (None, card["grid"]), card


def test_several_prompts_for_one_picture(run, models, words, tmp_path):
    model = models / "worded"
    found = run(
        "sample", "a heart", "-m", model, "-n", 1, "--also", "a star", "--negative", "dull", "--scale", 1, "--json"
    )
    assert found.record["also"] == ["a star"]
    image = sfumato.load(model).generate(["a heart"], also=["a star"], negative="dull")[0]
    assert torch.equal(pixels(tmp_path / "out.png"), image.permute(1, 2, 0))
    assert run("sample", "--replay", "out.png", "--json").record["same"] is True
    run("sample", "a heart", "-m", model, "-n", 1, "--also", "a star", "--out", "set/").fine()
    assert Shards(tmp_path / "set").card["also"] == ["a star"]


def test_the_line_names_the_acceleration_and_an_empty_one_is_none(run, models):
    given = ("sample", "noto", "-m", models / "styled", "-n", 1, "--steps", 2)
    assert "deepcache(interval=2)" in run(*given, "--accelerate", "deepcache(interval=2)").fine().stdout
    empty = run(*given, "--accelerate", "")
    assert empty.status == 2 and "no acceleration named" in empty.stderr


def test_a_fitted_acceleration_says_what_it_keeps_and_where(run, models, tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    given = ("sample", "noto", "-m", models / "styled", "-n", 1, "--steps", 2, "--accelerate", "quantized(items=4, steps=2)", "--json")  # fmt: skip
    first, second = run(*given).fine(), run(*given).fine()
    assert "calibration on 4 runs of 2 steps: made now" in first.stderr and str(tmp_path / "cache") in first.stderr
    assert "read from" in second.stderr and "made now" not in second.stderr
    assert first.record["seed"] == second.record["seed"]


def test_small_pictures_are_enlarged_to_be_seen(run, models, tmp_path):
    run("sample", "-m", models / "styled", "-n", 1).fine()
    assert pixels(tmp_path / "out.png").shape == (128, 128, 3)


def test_a_sheet_replays_to_the_same_bytes(run, models, words, tmp_path):
    run("sample", "crème brûlée 🍮", "-m", models / "worded", "--solver", "ddpm", "--out", "deep/a.png").fine()
    assert run("sample", "--replay", "deep/a.png", "--json").record["same"] is True
    found = run("sample", "--replay", "deep/a.png", "--out", "b.png")
    assert found.status == 0 and "same pixels" in found.stdout
    assert (tmp_path / "deep" / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_replay_notices_other_pixels_and_other_weights(run, models, tmp_path):
    from sfumato.cli import _pictures

    run("sample", "-m", models / "styled", "--out", "a.png").fine()
    picture, card = _pictures.read(tmp_path / "a.png")
    picture.putpixel((3, 3), (1, 2, 3))
    _pictures.save(picture, tmp_path / "b.png", card)
    assert run("sample", "--replay", "b.png").status == 1
    _pictures.save(picture, tmp_path / "c.png", {**card, "weights": "0" * 16})
    found = run("sample", "--replay", "c.png")
    assert found.status == 2 and "weights" in found.stderr
    _pictures.save(picture, tmp_path / "d.png", {"command": "demo"})
    assert "lacks" in run("sample", "--replay", "d.png").stderr
    picture.save(tmp_path / "e.png")
    assert "no card" in run("sample", "--replay", "e.png").stderr


def test_shards_hold_what_the_card_says(run, models, tmp_path):
    model = models / "styled"
    found = run("sample", "noto", "fluent", "-m", model, "-n", 700, "--steps", 1, "--out", "set/", "--json").record
    assert found["count"] == 1400
    shards = Shards(tmp_path / "set")
    assert len(shards) == 1400 and shards.counts == [1024, 376] and shards.card["solver"] == "dpm-solver++"
    batch = shards.batch([0, 699, 700, 1399])
    assert batch["caption"] == ["noto", "noto", "fluent", "fluent"]
    from sfumato.core import Streams

    again = sfumato.load(model).generate(["noto", "fluent"], steps=1, seed=Streams.of(0, 701).select([699, 700]))
    assert torch.equal(batch["x"][1:3], again)


def test_shards_are_the_same_in_two_processes(run, models, tmp_path):
    for processes in (1, 2):
        args = ("sample", "-m", models / "styled", "-n", 2100, "--steps", 1, "--out", f"{processes}/")
        run(*args, "--processes", processes).fine()
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_evaluate_measures_a_model_or_a_folder(run, models, tmp_path):
    options = ["--reference", "digits:test", "-n", 250, "--features", "pixels", "--metrics", "frechet, kernel"]
    found = run("evaluate", models / "styled", *options, "--steps", 1, "--json").record
    assert (found["n_samples"], found["size"], found["prompts_of_reference"]) == (250, 8, False)
    assert [row["name"] for row in found["rows"]] and all(
        row["low"] <= row["value"] <= row["high"] for row in found["rows"]
    )
    run("sample", "-m", models / "styled", "-n", 250, "--steps", 1, "--out", "set/").fine()
    from_shards = run("evaluate", "set", *options, "--size", 8, "--out", "table.md").fine().stdout
    assert "| " in from_shards and (tmp_path / "table.md").read_text() in from_shards + "\n"


def test_a_model_that_reads_words_is_given_the_captions_of_the_reference(run, models, words):
    options = ["--reference", "digits:test", "-n", 100, "--features", "pixels", "--metrics", "kernel", "--steps", 1]
    assert run("evaluate", models / "worded", *options, "--json").record["prompts_of_reference"] is True


def test_evaluate_by_default_measures_fewer_pictures_than_there_are_features(run, models):
    options = ["--reference", "digits:test", "-n", 60, "--features", "pixels", "--steps", 1]
    rows = run("evaluate", models / "styled", *options, "--json").record["rows"]
    assert "kernel distance" in {row["name"] for row in rows}


@pytest.mark.parametrize(
    ("metrics", "says"), [("frechet", "content with fewer"), ("frechets", "frechets"), ("memorisation", "training")]
)
def test_evaluate_refuses_what_it_cannot_measure_before_it_draws(run, models, monkeypatch, metrics, says):
    monkeypatch.setattr(sfumato.Pipeline, "generate", lambda *_, **__: pytest.fail("drawn"))
    options = ["--reference", "digits:test", "-n", 60, "--features", "pixels", "--metrics", metrics]
    found = run("evaluate", models / "styled", *options)
    assert found.status == 2 and says in found.stderr
    assert run("evaluate", models / "styled", *options[:-1], "kernel", "--out", "table.xls").status == 2


class Reader:
    """Pictures and words in one space."""

    name = "reader"

    def __call__(self, images):
        return images.flatten(1).float()[:, :8]

    def encode_text(self, texts):
        return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(len(text))) for text in texts])


def test_evaluate_asks_the_pictures_for_the_words_of_the_reference(run, models, words, monkeypatch):
    monkeypatch.setattr("sfumato.evaluation.features.get", lambda name: Reader())
    options = ["--reference", "digits:test", "-n", 60, "--metrics", "text-agreement", "--steps", 1, "--json"]
    rows = run("evaluate", models / "worded", *options).record["rows"]
    assert rows[0]["name"] == "text agreement" and rows[0]["n"] == 60


def test_demo_says_before_it_draws_that_a_file_is_no_folder(run, tmp_path):
    (tmp_path / "here.png").write_bytes(b"kept")
    said = run("demo", "--out", "here.png")
    assert said.status == 2 and "is a file" in said.stderr and (tmp_path / "here.png").read_bytes() == b"kept"


def test_papers_lists_all_systems(run):
    found = run("papers", "--json").record
    assert found["systems"] == len(found["papers"]) == 109
    assert list(found["papers"][0]) == ["slug", "title", "family", "kind", "command", "verdict", "checks"]
    some = run("papers", "--family", "solvers", "--json").record["papers"]
    assert {row["family"] for row in some} == {"solvers"} and 0 < len(some) < 109
    assert "dpm-solver-pp" in run("papers").stdout


@pytest.fixture
def two_recipes(monkeypatch):
    """One that holds and one that does not, in the place of all others."""
    for slug, ours in (("ddgan", 0.5), ("boot", 2.0)):

        @recipe(slug, kind="objective", claim="is smaller", baseline="one", citation=f"@article{{{slug}}}")
        def measure(seed: int, ours=ours) -> Findings:
            print("noise on stdout")
            return Findings([Check("size", ours, 1.0, "ours < baseline")], nfe=1, data="d", model="m", notes="why")

    made = {slug: recipes._made.pop(slug) for slug in ("ddgan", "boot")}
    monkeypatch.setattr(recipes, "names", lambda: sorted(made))
    monkeypatch.setattr(recipes, "get", lambda slug: made[slug] if slug in made else recipes.about(slug))


def test_reproduce_prints_the_evidence_and_says_whether_it_held(run, two_recipes, tmp_path):
    good = run("reproduce", "ddgan", "--seed", 4, "--out", "kept", "--json")
    assert good.status == 0 and good.record["holds"] is True and good.record["seed"] == 4
    assert good.record == json.loads((tmp_path / "kept" / "ddgan.json").read_text())
    assert "noise on stdout" in good.stderr
    bad = run("reproduce", "boot")
    assert bad.status == 1 and "not reproduced" in bad.stdout and "why" in bad.stdout and "FAILS" in bad.stdout
    both = run("reproduce", "--all", "--json")
    assert both.status == 1 and [e["slug"] for e in both.record["evidence"]] == ["boot", "ddgan"]


def test_papers_shows_the_last_verdict(run, two_recipes, tmp_path, monkeypatch):
    run("reproduce", "--all", "--out", "kept")
    monkeypatch.setattr(recipes, "EVIDENCE", (tmp_path / "kept",))
    rows = {row["slug"]: row for row in run("papers", "--made", "--json").record["papers"]}
    assert {slug: row["verdict"] for slug, row in rows.items()} == {"ddgan": "holds", "boot": "does not hold"}
    assert {slug: row["checks"] for slug, row in rows.items()} == {"ddgan": "1 of 1", "boot": "0 of 1"}
    assert rows["ddgan"]["command"] == "sfumato reproduce ddgan" and rows["ddgan"]["kind"] == "objective"


def test_cite_gives_bibtex_of_systems_and_of_what_a_model_uses(run, models, two_recipes):
    found = run("cite", "ddgan", models / "styled", "--json").record["entries"]
    assert list(found) == ["sfumato", "ddgan", "dpm-solver-pp"]
    assert found["ddgan"] == "@article{ddgan}" and sfumato.__version__ in found["sfumato"]
    assert recipes.about("dpm-solver-pp").title in run("cite", "dpm-solver-pp").stdout


def test_zoo_lists_models_and_data_with_their_licences(run):
    found = run("zoo", "--json").record
    assert {row["name"] for row in found["data"]} >= {"emoji", "digits"}
    assert all(row["licence"] and row["command"] for row in found["data"])
    assert all(row["licence"] and row["card"] for row in found["models"])
    assert "emoji" in run("zoo").stdout


def test_a_card_is_shown(run, models):
    assert run("zoo", "card", models / "styled", "--json").record["card"]["what"] == "tiny"


def test_data_is_located_or_written_as_a_folder(run, tmp_path):
    found = run("data", "digits", "--json").record
    assert found["name"] == "digits" and found["path"]
    written = run("data", "digits", "--split", "test", "--out", "d", "--json").record
    assert written["out"] == "d" and len(list((tmp_path / "d").rglob("*.png"))) == 297
    assert run("data", "digits", "--out", "d").status == 2


def test_doctor_says_what_is_here_and_tests_itself(run, monkeypatch):
    found = run("doctor", "--json").record
    assert found["self_test"]["holds"] and found["self_test"]["error"] <= found["self_test"]["limit"]
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["cores"] >= 1
    assert all(extra["present"] is not bool(extra["missing"]) for extra in found["extras"].values())
    assert "self-test right" in run("doctor").stdout
    monkeypatch.setattr(
        sfumato.processes.VP, "coef", lambda self, t, old=sfumato.processes.VP.coef: old(self, min(1.0, t * 0.9 + 0.1))
    )
    assert run("doctor").status == 1


def test_demo_draws_words_steps_and_solvers(run, models, words, tmp_path):
    options = ["-m", models / "worded", "-m", models / "styled", "--prompt", "a heart", "--prompt", "a tree"]
    found = run("demo", *options, "--out", "here", "--json").record
    assert [row[:2] for row in found["rows"][:3]] == [[str(models / "worded"), style] for style in STYLES]
    assert len(found["rows"]) == 3 + 3 + 1 + 3
    sheet = pixels(tmp_path / "here" / "demo.png")
    assert len(sheet.reshape(-1, 3).unique(dim=0)) > 1000
    again = run("demo", *options, "--out", "there", "--json").record
    assert again["rows"] == found["rows"]
    assert torch.equal(pixels(tmp_path / "there" / "demo.png")[48:], sheet[48:])  # the title says the seconds
