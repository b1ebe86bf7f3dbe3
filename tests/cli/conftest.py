"""Tiny models, made once, and the command run in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sfumato
from sfumato import codecs, conditioners, networks, processes
from sfumato.denoisers import parametrized
from sfumato.pipeline import Pipeline

STYLES = ("noto", "twemoji", "fluent")


class Words:
    """In the place of the sentence encoder: other words, other numbers."""

    def encode(self, prompts, tokens=16):
        rows = [torch.randn(tokens, 385, generator=torch.Generator().manual_seed(sum(map(ord, p)))) for p in prompts]
        found = torch.stack(rows)
        return networks.TextFeatures(
            found[..., :384], torch.ones(len(rows), tokens, dtype=torch.bool), found[:, 0, :384] / 20
        )


def network(**conditions):
    """A small U-Net whose output depends on its input and conditions (a fresh one would say 0)."""
    torch.manual_seed(0)
    net = networks.build(
        "unet",
        {
            "channels": 3,
            "width": 8,
            "multipliers": [1, 2],
            "blocks": 1,
            "attention": "context_channels" in conditions,
            **conditions,
        },
    )
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with the saved pipelines ``styled`` (class-conditional) and ``worded`` (text and style)."""
    folder = tmp_path_factory.mktemp("models")
    classes = {"vendor": list(STYLES)}
    styled = parametrized(network(embeddings={"vendor": 3}), processes.Cosine(), "v", null={"vendor": 3})
    card = {"what": "tiny", "licence": "Apache-2.0", "cites": ["dpm-solver-pp"]}
    Pipeline(styled, codecs.Identity(3), conditioners.Classes(classes), (8, 8), steps=3, card=card).save(
        folder / "styled"
    )
    null = {"vendor": 3, "text": 0.0, "text_mask": False, "vector": 0.0}
    worded = network(embeddings={"vendor": 3}, context_channels=384, vector_channels=384)
    worded = parametrized(worded, processes.Cosine(), "v", null=null)
    Pipeline(worded, codecs.Identity(3), conditioners.Text(16, classes), (8, 8), steps=3, guidance=2.0).save(
        folder / "worded"
    )
    return folder


@pytest.fixture
def words(monkeypatch):
    """Text models hear without the sentence encoder."""
    monkeypatch.setattr(conditioners.Text, "encoder", Words())


class Ran:
    """What a command did."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr

    def fine(self) -> Ran:
        """Itself, if the command ended well."""
        assert self.status == 0, self.stderr
        return self

    @property
    def record(self) -> dict:
        """The one JSON object on stdout."""
        assert self.status in (0, 1), self.stderr
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run("sample", ...)`` in this process, in an empty folder."""
    from sfumato.cli import app

    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Ran:
        found = CliRunner().invoke(app, [str(a) for a in args])
        return Ran(found.exit_code, found.stdout, found.stderr)

    return call


def environment() -> dict[str, str]:
    """The environment for a process that finds this very package."""
    source = str(Path(sfumato.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path):
    """``start("train", ...)``: a process of its own, in an empty folder; ended with the test."""
    started: list[subprocess.Popen] = []

    def call(*args: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "sfumato", *map(str, args)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment(), **streams))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()
