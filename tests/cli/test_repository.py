"""What the repository promises a fresh clone: versions, extras, pins, and nothing that only works here."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import sfumato
from sfumato.cli.doctor import EXTRAS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line[:1].isalpha()
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(names) -> set[str]:
    return {canonical(re.split(r"[\[<>=!~; ]", name)[0]) for name in names}


def test_the_version_is_said_once_and_elsewhere_the_same():
    assert "version" in PROJECT["dynamic"]
    assert f"version: {sfumato.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"## [{sfumato.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_extra_that_an_error_names_exists():
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r'extra="([\w-]+)"', sources)) | set(re.findall(r"sfumato\[([\w-]+)\]", sources))
    assert named and named <= set(PROJECT["optional-dependencies"])


def test_doctor_knows_the_packages_of_the_extras():
    for name, (packages, _) in EXTRAS.items():
        assert requirements(packages) == requirements(PROJECT["optional-dependencies"][name])


def test_what_ci_installs_is_pinned():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    extras = re.search(r"^MODEL := (.*)$", makefile, re.MULTILINE)[1].split(",") + ["dev"]
    wanted = requirements(PROJECT["dependencies"])
    for extra in extras:
        wanted |= requirements(PROJECT["optional-dependencies"][extra])
    assert wanted <= {canonical(name) for name in PINS}
    assert all(re.fullmatch(r"[\w.]+", version) for version in PINS.values()), "no paths, no local builds"


def test_the_architecture_names_the_layers_that_are_enforced():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    listed = re.search(r"keeps it so\.\n\n(.*?)\n\n", page, re.DOTALL)[1]
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    layers = [[name.strip(" ()") for name in layer.split("|")] for layer in reversed(tool["contracts"][0]["layers"])]
    there = {path.stem for path in (ROOT / "src" / "sfumato").iterdir()} - {"__main__"}
    enforced = [[name for name in layer if name in there] for layer in layers]
    assert [re.findall(r"`(\w+)`", layer) for layer in listed.split(" -")] == [layer for layer in enforced if layer]


def test_ci_runs_the_command_of_the_developer():
    assert (ROOT / ".ci" / "run").read_text("utf-8").rstrip().endswith("exec make test")


def test_every_example_and_page_is_linked_to_something_that_exists():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_reference_lists_all_that_is_registered():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    pages = generate.pages()
    for kind, registry in generate.REGISTRIES.items():
        assert re.findall(r"^## (.*)$", pages[f"{kind}.md"], re.MULTILINE) == registry.names()
    for name in ("sample", "zoo make", "doctor"):
        assert f"## sfumato {name}\n" in pages["commands.md"]
    assert pages["systems.md"].count("\n|") == 109 + 2
