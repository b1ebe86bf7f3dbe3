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
    assert names["x"].shape == (4, 2)
