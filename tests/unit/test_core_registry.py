"""Names: look-ups, presets, specs, and packages whose modules register themselves."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato import grids, solvers
from sfumato.core import InputError, Registry, SfumatoError, UnknownName


@dataclass(frozen=True)
class Thing:
    size: int = 1
    name: str = "a"


def registry() -> Registry:
    made = Registry("thing")
    made.register("plain", "simple")(Thing)
    made.register("large", size=9)(Thing)
    return made


def test_names_numbers_and_presets() -> None:
    r = registry()
    assert r.names() == ["large", "plain", "simple"]
    assert r.get("plain") == r.get("simple") == Thing()
    assert (
        r.get("large") == Thing(9) and r.get("large", name="b") == Thing(9, "b") and r.get("large", size=2) == Thing(2)
    )
    assert r.find("plain") is Thing


def test_specs() -> None:
    r = registry()
    assert r.make("plain") == Thing() and r.make(" plain ( ) ") == Thing()
    assert r.make("plain(size=3, name='b')") == Thing(3, "b") and r.make("large(name='c')") == Thing(9, "c")
    for spec in ("plain(3)", "plain(size=)", "plain(size=3", "plain(", "plain(**{'size': 3})", "plain(size=open)",
                 "plain(size={[]: 1})", "plain(size=3)(name='b')", "plain(size=1)+1", "plain(\0)"):  # fmt: skip
        with pytest.raises(InputError, match="is no thing: write name or name"):
            r.make(spec)
    with pytest.raises(InputError, match="it takes: size"):
        r.make("plain(colour=3)")


@given(st.text(max_size=30))
def test_no_text_makes_anything_else_than_one_clear_error(text: str) -> None:
    try:
        made = registry().make(text)
    except SfumatoError:
        return
    assert isinstance(made, Thing)


def test_an_unknown_name_lists_the_known_and_guesses() -> None:
    with pytest.raises(
        UnknownName, match=r"no thing named 'plane' \(did you mean 'plain'\?\); there are: large, plain, simple"
    ):
        registry().get("plane")
    with pytest.raises(KeyError, match="there are"):
        registry().get("xxxxxxxx")
    with pytest.raises(UnknownName, match="did you mean 'dpm-solver"):
        solvers.get("dpm-solver+")
    with pytest.raises(UnknownName, match="did you mean 'karras'"):
        grids.get("karas")


def test_wrong_numbers_say_what_is_taken() -> None:
    with pytest.raises(InputError, match=r"thing 'plain': .*colour.*it takes: size: 'int' = 1, name: 'str' = 'a'"):
        registry().get("plain", colour=2)
    with pytest.raises(InputError, match="it takes: size: 'int' = 9"):
        registry().get("large", colour=2)
    with pytest.raises(InputError, match="it takes no numbers"):
        grids.get("uniform", rho=7)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(InputError, match="'plain' is registered twice"):
        registry().register("plain")(Thing)


def package(folder: Path, name: str, **modules: str) -> Registry:
    (folder / name).mkdir()
    registered = f"from {name} import _r\n"
    for module, text in {
        "__init__": "",
        "_r": f"from sfumato.core import Registry\nr = Registry('x', {name!r})",
        **modules,
    }.items():
        (folder / name / f"{module}.py").write_text(text.replace("REGISTER", registered + "_r.r.register"))
    return __import__(f"{name}._r", fromlist=["r"]).r


def test_a_new_file_in_the_package_is_enough(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    r = package(
        tmp_path, "shelf_one", a="REGISTER('one')(lambda **k: k)", _private="raise RuntimeError('never imported')"
    )
    assert "shelf_one.a" not in sys.modules, "nothing is imported before it is asked for"
    assert r.names() == ["one"] and r.get("one", k=1) == {"k": 1}


def test_a_broken_file_is_told_every_time_and_never_hides_names(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    r = package(
        tmp_path,
        "shelf_two",
        a="REGISTER('one')(lambda **k: k)",
        b="import no_such_module",
        c="REGISTER('three')(lambda **k: k)",
    )
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            r.names()
