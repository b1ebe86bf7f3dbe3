"""``sfumato distill``: a few-step student of a model, in a folder that goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, command

FREE = ("iterations", "save_every", "log_every")  # what a resume may change


Teacher = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A bundled name, a folder that a training wrote, or one of a diffusers pipeline."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of trajectories, checkpoints and the pipeline.")]
Method = Annotated[
    str,
    typer.Option(
        help="segments, progressive, rectified-diffusion, reflow, slimflow, consistency, consistency-training, "
        "lcm-lora, slam, distribution-matching, boot; with --data mmd-ddm, ddgan, tad-sr."
    ),
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Network calls an image of the student. Default: 4; boot and tad-sr: 1.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Pictures for the methods that learn from them: a folder, shards, or a data set such as digits or emoji:train."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the distillation in OUT, bit for bit.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="What the student shall know; may be repeated. Default: all the model knows."),
]
Scores = Annotated[
    bool,
    typer.Option(
        "--scores/--no-scores", help="Measure for the card how near the student is to its teacher, or to the data."
    ),
]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="iterations, batch, lr, ema, trajectories, calls, guidance, rank, halvings, width (slimflow), features "
        "(mmd-ddm), latent and r1 (ddgan), detail and adversarial (tad-sr), seed; may be repeated.",
    ),
]


@command("distill")
def distill(
    model: Teacher = None,
    out: Out = Path("distilled"),
    method: Method = "segments",
    steps: Steps = None,
    data: Data = None,
    resume: Resume = False,
    prompts: Prompts = None,
    scores: Scores = True,
    given: Given = None,
) -> Answer:
    """Teach a student of a few calls, e.g. `sfumato distill digits --method segments --steps 4 --out fast`.

    Most methods need no data: the teacher makes its own. mmd-ddm, ddgan and tad-sr learn from pictures, `--data digits`.
    OUT/pipeline is what `sfumato sample --model OUT` loads; guidance is in the student.
    """
    import time

    from sfumato import distillation
    from sfumato import pipeline as sfumato_pipeline
    from sfumato.cli._launch import on_cpu

    plan = _planned(out, model, method, steps, resume, prompts, data, list(given or ()))
    began = time.perf_counter()
    pipeline = _loaded(plan["model"])
    made = distillation.distill(
        pipeline,
        data=None if plan.get("data") is None else _pictures(plan["data"], pipeline),
        prompts=plan["prompts"],
        out=out,
        scores=scores,
        model=plan["model"] if plan["model"] in sfumato_pipeline.bundled() else Path(plan["model"]).name,
        cpu=on_cpu(),
        **plan["settings"],
    )
    record: dict[str, Any] = {"out": str(out), "pipeline": str(out / "pipeline"), **plan, "card": made.card}
    record["seconds"] = round(time.perf_counter() - began, 1)
    return Answer(record, _shown(record, out / "pipeline"))


def _shown(record: dict[str, Any], saved: Path) -> str:
    """The scores of the student, what it is, and how to use it."""
    scored = {name: found for name, found in record["card"].get("scores", {}).items() if name != "items"}
    lines = [f"{name}, {who}: {value:.4f}" for name, figures in scored.items() for who, value in figures.items()]
    foreign = (saved / "model_index.json").exists()
    use = f"sfumato.from_diffusers({str(saved)!r})" if foreign else f"sfumato sample --model {record['out']}"
    return "\n".join([*lines, f"{record['card']['what']}, in {record['seconds']:.0f} s", use])


def _loaded(model: str) -> Any:
    import sfumato

    if (Path(model) / "model_index.json").is_file():
        return sfumato.from_diffusers(model)
    return sfumato.load(model)


class Told:
    """Pictures with "prompt", what the model would be asked to draw them: their captions, or the names of their classes."""

    def __init__(self, found: Any, field: str | None) -> None:
        self.found, self.field = found, field

    def __len__(self) -> int:
        return len(self.found)

    def batch(self, indices: Any) -> dict[str, Any]:
        """Those items."""
        part = self.found.batch(indices)
        if self.field is None:
            return {"x": part["x"]}
        names = part["caption"] if self.field == "caption" else [self.found.classes[i] for i in part["label"].tolist()]
        return {"x": part["x"], "prompt": list(names)}


def _pictures(source: str, pipeline: Any) -> Told:
    """The pictures of a data set at the model's size, with what the model reads of them."""
    from sfumato.cli.data import pictures
    from sfumato.core.errors import InputError

    height, width = pipeline.size
    if height != width:
        raise InputError(
            f"this model draws {height} x {width} pixels: --data is for square pictures, use sf.distill(data=)"
        )
    found = pictures(source, height)
    reads, known = pipeline.denoiser.reads or (), set(pipeline.conditioner.vocabulary)
    if found.classes and set(found.classes) <= known:
        return Told(found, "label")
    if found.captioned and "text" in reads:
        return Told(found, "caption")
    if known or "text" in reads:
        lacking = "captions" if "text" in reads else f"classes among {', '.join(sorted(known)[:12])}"
        raise InputError(f"this model is told what it draws, and {source} has no {lacking}")
    return Told(found, None)


def _planned(
    out: Path,
    model: str | None,
    method: str,
    steps: int | None,
    resume: bool,
    prompts: list[str] | None,
    data: str | None,
    given: list[str],
) -> dict[str, Any]:
    """Model, data, prompts and settings: a resume takes those of the run, and may change only how long and how often."""
    from sfumato.cli._places import folder
    from sfumato.core.errors import InputError
    from sfumato.distillation import METHODS, Settings
    from sfumato.files import write_atomically

    file = out / "distill.json"
    if not resume and any(out.rglob("*.safetensors")):  # a plan alone is one that was refused
        raise InputError(f"{out} holds a distillation: --resume continues it, or choose another folder")
    if resume:
        if not file.is_file():
            raise InputError(f"there is no distillation in {out} to resume")
        kept = json.loads(file.read_text("utf-8"))
        settings = _settings(given, kept["settings"])
        before = dataclasses.asdict(Settings(**kept["settings"]))
        fixed = [k for k, v in dataclasses.asdict(settings).items() if v != before[k] and k not in FREE]
        fixed += ["model"] if model not in (None, kept["model"]) else []
        fixed += ["data"] if data not in (None, kept.get("data")) else []
        if fixed:
            raise InputError(f"{', '.join(fixed)} cannot change in a distillation that goes on; {', '.join(FREE)} can")
        plan = {**kept, "settings": dataclasses.asdict(settings)}
    else:
        if model is None:
            raise InputError("MODEL is missing: a bundled name, or a folder of a pipeline")
        once = method in METHODS and METHODS[method].once
        begun = {"method": method, "steps": (1 if once else 4) if steps is None else steps}
        settings = _settings(given, begun)
        if method in METHODS and METHODS[method].reads in ("data", "restored") and data is None:
            raise InputError(f"{method} learns from pictures: give --data, a folder or the name of a data set")
        plan = {"model": model, "data": data, "prompts": prompts or None, "settings": dataclasses.asdict(settings)}
    folder(out).mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(plan, indent=1).encode())
    return plan


def _settings(given: list[str], base: dict[str, Any]) -> Any:
    """Settings from ``key=value`` texts, over those of ``base``. Raises InputError that lists the keys there are."""
    from sfumato.cli.train import _as
    from sfumato.core.errors import InputError
    from sfumato.distillation import Settings

    kinds = {f.name: type(f.default) for f in dataclasses.fields(Settings)}
    values = {key: value for key, value in base.items() if key not in ("method", "steps")}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: write key=value")
        values[key] = _as(kinds[key], key, value) if key in kinds else value
    return Settings.of(base["method"], base["steps"], values)
