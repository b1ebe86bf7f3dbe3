"""Every snippet of docs/diffusers.md runs, in order, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'sfumato[diffusers]'")
pytest.importorskip("transformers", reason="needs the extra: pip install 'sfumato[diffusers]'")

PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*")
@pytest.mark.filterwarnings("ignore::UserWarning:(diffusers|transformers).*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    names: dict = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    assert re.search(r"before: [0-9.]+", capsys.readouterr().out)
    assert names["tuned"].shape == (1, 3, 16, 16)
    assert names["images"].shape == (2, 3, 16, 16)
