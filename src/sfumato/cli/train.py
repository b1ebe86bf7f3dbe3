"""``sfumato train``: settings from the command line, checked before anything starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, command

OBJECTIVES = ("eps", "x0", "v", "flow")
PROCESSES = {"vp": "VP", "cosine": "Cosine", "flow": "Flow", "edm": "EDM", "ve": "VE"}
NETWORKS = ("unet", "dit")
CONDITIONS = ("auto", "text", "label", "none")
FREE = ("steps", "save_every", "sample_every", "log_every", "processes")  # what a resume may change


@dataclass(frozen=True)
class Settings:
    """The keys of ``--set``, with their defaults. ``network.NAME`` are arguments of the network's constructor."""

    steps: int = 10_000
    batch: int = 64
    lr: float = 3e-4
    warmup: int = 200
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    size: int = 32
    flip: bool = False
    objective: str = "v"
    process: str = ""
    network: str = "unet"
    condition: str = "auto"
    guidance_dropout: float = 0.1
    processes: int = 1
    save_every: int = 1000
    sample_every: int = 1000
    log_every: int = 50
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from sfumato.core.errors import InputError

        if not self.process:
            object.__setattr__(self, "process", {"flow": "flow", "eps": "vp"}.get(self.objective, "cosine"))
        choices = {"objective": OBJECTIVES, "process": tuple(PROCESSES), "network": NETWORKS, "condition": CONDITIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} = {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        if self.objective == "eps" and self.process in ("cosine", "flow"):
            raise InputError(
                f"objective=eps says nothing at the noisy end of process={self.process}, where alpha is 0: "
                "use objective=v, or process=vp"
            )
        for name in ("steps", "batch", "size", "processes", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: at least 1")
        if not 0 <= self.guidance_dropout <= 1:
            raise InputError(f"guidance_dropout = {self.guidance_dropout}: between 0 and 1")
        if self.sample_every < 0 or self.warmup < 0 or not self.lr > 0:
            raise InputError(
                f"sample_every = {self.sample_every}, warmup = {self.warmup}, lr = {self.lr}: not negative, lr above 0"
            )


def parsed(given: Sequence[str], base: Mapping[str, Any] | None = None) -> Settings:
    """Settings from ``key=value`` texts, over those of ``base``. Raises InputError that lists the keys there are."""
    from sfumato.core.errors import InputError

    values: dict[str, Any] = dict(base or {})
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Settings) if f.name != "numbers"}
    numbers = dict(values.get("numbers", {}))
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: write key=value")
        if key.startswith("network.") and len(key) > len("network."):
            numbers[key.removeprefix("network.")] = _json(value)
        elif key in kinds:
            values[key] = _as(kinds[key], key, value)
        else:
            raise InputError(f"no setting {key!r}; there are: {', '.join(kinds)}, and network.NAME for its constructor")
    return Settings(**{**values, "numbers": numbers})


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _as(kind: type, key: str, value: str) -> Any:
    from sfumato.core.errors import InputError

    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise InputError(f"{key} = {value!r}: true or false")
        return value.lower() == "true"
    try:
        return kind(float(value)) if kind is int and float(value).is_integer() else kind(value)
    except ValueError as error:
        raise InputError(f"{key} = {value!r}: {'a whole number' if kind is int else 'a number'} is wanted") from error


@command("train")
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, metrics.jsonl, samples/, pipeline/.")],
    data: Annotated[
        str | None, typer.Option(help="A folder of pictures, shards, or a data set such as digits or emoji:train.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the training in OUT, bit for bit.")] = False,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="steps, batch, lr, objective, process, network, ...; may be repeated."
        ),
    ] = None,
) -> Answer:
    """Train a model on pictures, e.g. `sfumato train --data photos --out run --set steps=20000 --set size=32`.

    Pictures with captions (NAME.txt beside NAME.png, or metadata.jsonl) make a text-to-image model, those in sub-folders a
    class-conditional one. OUT/pipeline is what `sfumato sample --model OUT` loads.
    """
    import time

    from sfumato.cli._launch import launched
    from sfumato.cli.training import run

    data, settings = _planned(out, data, resume, list(given or ()))
    began = time.perf_counter()
    launched(run, settings.processes, data, str(out), settings, resume)
    record: dict[str, Any] = {
        "out": str(out),
        "pipeline": str(out / "pipeline"),
        "data": data,
        "settings": dataclasses.asdict(settings),
    }
    last = json.loads((out / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    record |= {"last": last, "seconds": round(time.perf_counter() - began, 1)}
    shown = f"{out}: {last['it']} steps, loss {last['loss']:.4f}, {last['images_per_second']:.0f} images/s\nsfumato sample --model {out}"
    return Answer(record, shown)


def _planned(out: Path, data: str | None, resume: bool, given: list[str]) -> tuple[str, Settings]:
    """Data and settings: a resume takes those of the run, and may change only how long and how often."""
    from sfumato.cli._places import folder
    from sfumato.core.errors import InputError
    from sfumato.files import write_atomically

    plan = out / "run.json"
    if not resume and (out / "checkpoint.safetensors").exists():
        raise InputError(f"{out} holds a training: --resume continues it, or choose another folder")
    if resume and plan.is_file():
        kept = json.loads(plan.read_text("utf-8"))
        settings, then = parsed(given, kept["settings"]), Settings(**kept["settings"])
        changed = [f.name for f in dataclasses.fields(then) if getattr(then, f.name) != getattr(settings, f.name)]
        fixed = [name for name in changed if name not in FREE] + (["data"] if data not in (None, kept["data"]) else [])
        if fixed:
            raise InputError(f"{', '.join(fixed)} cannot change in a training that goes on; {', '.join(FREE)} can")
        data = kept["data"]
    else:
        if resume:
            raise InputError(f"there is no training in {out} to resume")
        if data is None:
            raise InputError("--data is missing: a folder of pictures, or the name of a data set")
        settings = parsed(given)
    folder(out).mkdir(parents=True, exist_ok=True)
    plan_text = json.dumps({"data": data, "settings": dataclasses.asdict(settings)}, indent=1)
    write_atomically(plan, plan_text.encode())
    return str(data), settings
