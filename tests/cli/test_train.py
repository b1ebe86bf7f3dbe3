"""Training from the command line: what the data decides, what a run leaves behind, and what can be done with it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.cli.train import Settings, parsed
from sfumato.core.errors import InputError

SMALL = {"steps": 3, "size": 8, "batch": 4, "network.width": 8, "network.blocks": 1, "network.attention": "true"}
UNET, DIT = (
    {"network.multipliers": "[1]"},
    {"network": "dit", "network.width": 16, "network.depth": 1, "network.heads": 2},
)


def flags(*settings: dict) -> list[str]:
    merged = {k: v for given in settings for k, v in given.items()}
    return [word for key, value in merged.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture
def folder(tmp_path):
    """Pictures of two colours, one sub-folder each."""
    for i in range(12):
        place = tmp_path / "photos" / ("dark" if i % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10 + i), (20 * (i % 2), 10 * i, 99)).save(place / f"{i}.png")
    return tmp_path / "photos"


def test_a_folder_of_classes_makes_a_model_of_classes(run, folder, tmp_path):
    found = run("train", "--data", folder, "--out", "run", *flags(SMALL, UNET), "--json").record
    pipeline = sfumato.load(tmp_path / "run")
    assert pipeline.conditioner.config == {"classes": {"class": ["dark", "light"]}} and pipeline.size == (8, 8)
    assert pipeline.generate(["dark", "light"], steps=2).shape == (2, 3, 8, 8)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found["last"] == rows[-1] and rows[-1]["it"] == 3 and math.isfinite(rows[-1]["loss"])
    assert pipeline.card["settings"]["steps"] == 3 and pipeline.card["data"] == {"source": "photos", "pictures": 12}
    assert [p.name for p in (tmp_path / "run" / "samples").iterdir()] == ["0000003.png"]
    run("sample", "dark", "-m", "run", "--steps", 2).fine()


@pytest.mark.parametrize("objective", ["eps", "x0", "v", "flow"])
def test_every_objective_trains_and_its_model_predicts_it(run, tmp_path, objective):
    run(
        "train", "--data", "digits", "--out", "run", *flags(SMALL, UNET, {"objective": objective, "condition": "none"})
    ).fine()
    pipeline = sfumato.load(tmp_path / "run")
    assert pipeline.denoiser.predicts == objective and pipeline.codec.channels == 1
    assert type(pipeline.process).__name__ == {"flow": "Flow", "eps": "VP"}.get(objective, "Cosine")
    assert pipeline.generate(2, steps=2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("process", ["vp", "edm", "ve"])
def test_every_process_trains(run, tmp_path, process):
    found = run(
        "train", "--data", "digits", "--out", "run", *flags(SMALL, UNET, {"process": process, "objective": "eps"})
    )
    assert found.status == 0, found.stderr
    assert type(sfumato.load(tmp_path / "run").process).__name__.lower() == process


def test_a_transformer_trains_and_unknown_numbers_are_refused(run, tmp_path):
    options = {k: v for k, v in SMALL.items() if not k.startswith("network")}
    run("train", "--data", "digits", "--out", "run", *flags(options, DIT, {"condition": "none"})).fine()
    assert sfumato.load(tmp_path / "run").denoiser.net.network_name == "dit"
    wrong = run("train", "--data", "digits", "--out", "other", *flags(options, {"network.wdth": 3}))
    assert wrong.status == 2 and "wdth" in wrong.stderr


def test_captions_make_a_model_of_words(run, folder, tmp_path, monkeypatch):
    from sfumato.networks import SentenceEncoder

    from .conftest import Words

    monkeypatch.setattr(SentenceEncoder, "encode", Words.encode)
    for picture in folder.rglob("*.png"):
        picture.with_suffix(".txt").write_text(f"a {picture.parent.name} thing")
    run("train", "--data", folder, "--out", "run", *flags(SMALL, UNET, {"guidance_dropout": 0.5})).fine()
    pipeline = sfumato.load(tmp_path / "run")
    assert pipeline.conditioner.name == "text" and not pipeline.conditioner.classes
    assert pipeline.denoiser.null == {"text": 0.0, "text_mask": False, "vector": 0.0}
    assert pipeline.generate(["a dark thing"], steps=2, guidance=2.0).shape == (1, 3, 8, 8)
    refused = run(
        "train", "--data", "emoji:unseen", "--out", "other", *flags(SMALL, UNET, {"condition": "label", "steps": "x"})
    )
    assert refused.status == 2


def test_a_condition_that_the_data_lacks_is_refused(run, folder):
    found = run("train", "--data", folder, "--out", "run", *flags(SMALL, {"condition": "text"}))
    assert found.status == 2 and "captions" in found.stderr


def test_settings_that_were_wrong_can_be_mended_in_the_same_folder(run, tmp_path):
    assert run("train", "--data", "digits", "--out", "run", *flags(SMALL, {"network.wdth": 3})).status == 2
    run("train", "--data", "digits", "--out", "run", *flags(SMALL, UNET)).fine()


def test_a_resume_keeps_the_settings_and_changes_only_how_long(run, tmp_path):
    run("train", "--data", "digits", "--out", "run", *flags(SMALL, UNET, {"lr": 0.01})).fine()
    assert "--resume" in run("train", "--data", "digits", "--out", "run").stderr
    assert "lr" in run("train", "--out", "run", "--resume", "--set", "lr=1").stderr
    assert "data" in run("train", "--out", "run", "--resume", "--data", "emoji").stderr
    found = run("train", "--out", "run", "--resume", "--set", "steps=5", "--json").record
    assert found["settings"]["lr"] == 0.01 and found["last"]["it"] == 5 and found["data"] == "digits"


def test_two_processes_train_what_one_does(run, tmp_path):
    for n in (1, 2):
        run("train", "--data", "digits", "--out", str(n), *flags(SMALL, UNET, {"processes": n, "lr": 0.01})).fine()
    one, two = (sfumato.load(tmp_path / str(n)).denoiser.net.state_dict() for n in (1, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=1e-2)


def test_settings_are_what_was_written():
    found = parsed(["steps=2e3", "lr=1e-4", "flip=true", "network.multipliers=[1, 2]", "network.norm=group"])
    assert (found.steps, found.lr, found.flip) == (2000, 1e-4, True)
    assert found.numbers == {"multipliers": [1, 2], "norm": "group"}
    assert parsed(["lr=1"], {"steps": 7}).steps == 7
    with pytest.raises(InputError, match="objective=v"):
        parsed(["objective=eps", "process=cosine"])
    for wrong in ("flip=yes", "steps=1.5", "guidance_dropout=2", "network.=3", "numbers={}"):
        with pytest.raises(InputError):
            parsed([wrong])
    assert Settings(objective="flow").process == "flow" and Settings(objective="flow", process="vp").process == "vp"
