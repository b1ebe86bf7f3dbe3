"""The README's table of systems is what `make docs` writes, and its Python runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_table_of_systems_is_generated():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.with_systems(README) == README, "run `make docs`"


def test_the_first_two_examples_run_as_they_stand():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    for example in examples[:2]:
        exec(example, names)
    assert names["images"].shape == (2, 3, 64, 64)
    assert names["step"].index == 6 and names["picture"].shape == (1, 3, 64, 64)
    assert names["x"].shape == (4, 2)


def test_the_training_example_runs_and_its_model_is_loaded_again(tmp_path, monkeypatch):
    import torch
    from PIL import Image

    import sfumato as sf

    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 10, 200)).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    example = next(e for e in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Trainer" in e)
    quick = example.replace("steps=10_000", "steps=2").replace("width=32", "width=8").replace(", 64, seed", ", 4, seed")
    assert quick.count("=2,") == 1 and "width=8" in quick and ", 4, seed" in quick
    names: dict = {"sf": sf}
    exec(quick, names)
    again = sf.load("runs/mine").generate(1, steps=2)
    assert again.shape == (1, 3, 32, 32)
    assert (again.int() - names["mine"].generate(1, steps=2).int()).abs().max() <= 1 and torch.is_tensor(again)
