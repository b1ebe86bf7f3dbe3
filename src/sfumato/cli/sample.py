"""``sfumato sample``: pictures from a model, one sheet with a card that replays it, or a whole data set in shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli._app import FAILED, Answer, command, named_values, progress, scale_or_spec
from sfumato.cli._options import Conditions, OfModel

if TYPE_CHECKING:
    from sfumato.pipeline import Pipeline

DEFAULT_MODEL = "emoji-latent"
MOST = 1024  # pictures on one sheet
BESIDE = ("negative", "also", "regions", "accelerate")  # in a card only where they were given
RUN = ("model", "weights", "prompts", "n", "steps", "solver", "grid", "guidance", "seed", "cond", "columns", "scale")


Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Words or class names; none: any picture.")]
Number = Annotated[int, typer.Option("-n", "--number", min=1, help="Pictures for each prompt.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of the solver. Default: the model's.")]
Solver = Annotated[str | None, typer.Option(help="E.g. 'dpm-solver++' or 'dpm-solver++(order=3)'.")]
Grid = Annotated[str | None, typer.Option(help="Where the steps lie, e.g. 'logsnr', 'karras(rho=5)'.")]
Guidance = Annotated[
    str | None, typer.Option(help="Classifier-free scale (1 is none), or e.g. 'apg(scale=6)'. Default: the model's.")
]
Negative = Annotated[
    list[str] | None,
    typer.Option(metavar="PROMPT", help="What guidance leads away from; may be repeated for 'perp-neg'."),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PROMPT",
        help="A further prompt for each picture; may be repeated. --guidance 'cfg(scale=4) | interpolated' joins "
        "them otherwise than by averaging ('superposition' too, with --solver ddpm).",
    ),
]
Regions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="L,T,R,B:PROMPT", help="A prompt for a box in shares of the picture, e.g. '0,0,0.5,1:red heart'."
    ),
]
Seed = Annotated[int, typer.Option(help="Picture i depends on (seed, i) and on nothing else.")]
Accelerate = Annotated[
    str | None, typer.Option(help="Less work a call, e.g. 'deepcache(interval=3)': see docs/acceleration.md.")
]
Vendor = Annotated[str | None, typer.Option(help="Short for --cond vendor=...: noto, twemoji or fluent.")]
Columns = Annotated[int | None, typer.Option(min=1, help="Pictures in a row of the sheet.")]
Scale = Annotated[int | None, typer.Option(min=1, max=64, help="Enlarge each pixel. Default: to 128 pixels or more.")]
Out = Annotated[str | None, typer.Option(help="NAME.png, or a folder (ends in /) for shards. Default: out.png.")]
Replay = Annotated[Path | None, typer.Option(help="Make a sheet again from the card inside it, and compare.")]
Processes = Annotated[int, typer.Option(min=1, help="For shards: processes that share the work.")]
Sampler = Annotated[
    Path | None, typer.Option(help="A card that `sfumato tune` wrote, for steps, solver, grid and guidance.")
]
Force = Annotated[bool, typer.Option(help="Use a sampler card of another model or guidance.")]


@command("sample")
def sample(
    prompts: Prompts = None,
    n: Number = 4,
    model: OfModel = DEFAULT_MODEL,
    steps: Steps = None,
    solver: Solver = None,
    grid: Grid = None,
    guidance: Guidance = None,
    negative: Negative = None,
    also: Also = None,
    region: Regions = None,
    seed: Seed = 0,
    cond: Conditions = None,
    accelerate: Accelerate = None,
    vendor: Vendor = None,
    columns: Columns = None,
    scale: Scale = None,
    out: Out = None,
    replay: Replay = None,
    processes: Processes = 1,
    sampler: Sampler = None,
    force: Force = False,
) -> Answer:
    """Make pictures, e.g. `sfumato sample "red heart" -n 4 --steps 12 --out hearts.png`."""
    from sfumato.cli._pictures import png
    from sfumato.core.errors import InputError

    if replay is not None:
        return _replayed(replay, None if out is None else png(out))
    options = {"solver": solver, "grid": grid, "steps": steps, "guidance": scale_or_spec(guidance)}
    conditions = named_values([*(cond or ()), *([f"vendor={vendor}"] if vendor else ())])
    extra = {
        "negative": list(negative or ()),
        "also": list(also or ()),
        "regions": [_region(text) for text in region or ()],
        "accelerate": accelerate,
    }
    extra = {name: given for name, given in extra.items() if given not in (None, [])}
    target = out or "out.png"
    if target.endswith("/") or Path(target).is_dir():
        if sampler is not None:
            raise InputError("shards are drawn with --solver, --grid and --steps: --sampler is for a sheet")
        return _shards(prompts, n, model, options, seed, conditions, extra, Path(target), processes)
    path, count = png(target), n * max(1, len(prompts or ()))
    if count > MOST:
        raise InputError(f"{count} pictures on one sheet: at most {MOST}; --out FOLDER/ writes shards of any number")
    card = described(model, prompts, n, options, seed, conditions, sampler, force) | extra
    card |= {"columns": columns, "scale": scale}
    picture, seconds = drawn(card)
    return _written(picture, path, card, seconds)


def described(
    model: str,
    prompts: Sequence[str] | None,
    n: int,
    options: Mapping[str, Any],
    seed: int,
    cond: Mapping[str, str],
    sampler: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """The card of a run: everything that its pixels depend on, with the model's own settings where none was given."""
    import sfumato

    made: dict[str, Any] = {"sfumato": sfumato.__version__, "model": model, "weights": fingerprint(model)}
    if sampler is None:
        pipeline = sfumato.load(model)
        settings = {name: getattr(pipeline, name) if value is None else value for name, value in options.items()}
        if options["grid"] is None:
            settings["grid"] = sfumato.solvers.registry.make(settings["solver"]).grid or settings["grid"]
    else:
        settings = _tuned(sampler, options, force)
        made |= {"sampler": str(sampler), "sampler_file": _digest(sampler), "force": force}
    return {**made, "prompts": list(prompts or ()), "n": n, **settings, "seed": seed, "cond": dict(cond)}


def _tuned(path: Path, options: Mapping[str, Any], force: bool) -> dict[str, Any]:
    """The settings of a sampler card, in the place of those that were not given."""
    from sfumato.core.errors import InputError
    from sfumato.tuning.card import SamplerCard

    given = [f"--{name}" for name in ("solver", "grid", "steps") if options[name] is not None]
    if given:
        raise InputError(f"a sampler card brings its own steps, solver and grid: leave out {' and '.join(given)}")
    card = SamplerCard.load(path, force)
    guidance = card.guidance if options["guidance"] is None else options["guidance"]
    return {"solver": card.made_by, "grid": card.grid_spec or "tuned times", "steps": card.steps, "guidance": guidance}


def fingerprint(model: str) -> str:
    """SHA-256 of a model's weights, shortened: a card names the very weights that it was made with."""
    from sfumato.pipeline import find

    return _digest(find(model) / "model.safetensors")


def _digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def drawn(card: Mapping[str, Any]) -> tuple[Any, float]:
    """The sheet that a card describes, and the seconds of sampling."""
    import time

    import sfumato
    from sfumato.cli._pictures import sheet

    pipeline = sfumato.load(card["model"])
    began = time.perf_counter()
    images = generated(pipeline, card)
    seconds = time.perf_counter() - began
    return sheet(images, card["columns"], card["scale"]), seconds


def generated(pipeline: Pipeline, card: Mapping[str, Any]) -> Any:
    """uint8 (N, C, H, W): the pictures of a card, the ``n`` of each prompt together."""
    prompts = [prompt for prompt in card["prompts"] for _ in range(card["n"])]
    settings = {name: card[name] for name in ("guidance", "seed", "cond")}
    settings |= {name: card[name] for name in BESIDE if name in card}
    if "sampler" in card:
        from sfumato.tuning.card import SamplerCard

        settings["sampler"] = SamplerCard.load(card["sampler"], card["force"])
    else:
        settings |= {name: card[name] for name in ("steps", "solver", "grid")}
    with progress("sampling") as told:
        return pipeline.generate(prompts or card["n"], **settings, progress=told)


def _written(picture: Any, out: Path, card: Mapping[str, Any], seconds: float) -> Answer:
    from sfumato.cli._pictures import save

    save(picture, out, card)
    record = {**card, "out": str(out), "seconds": round(seconds, 2)}
    shown = f"{out}: {card['model']}, {card['solver']} on {card['grid']}, {card['steps']} steps, guidance {card['guidance']}, seed {card['seed']}"
    less = f", {card['accelerate']}" if "accelerate" in card else ""
    return Answer(record, f"{shown}{less} ({seconds:.1f} s)")


def _replayed(path: Path, out: Path | None) -> Answer:
    """Make the picture again; status 1 where its pixels differ (another machine, another version)."""
    from sfumato.cli._pictures import read, save
    from sfumato.core.errors import InputError

    kept, card = read(path)
    missing = [name for name in RUN if name not in card]
    if missing:
        raise InputError(f"the card of {path} lacks {', '.join(missing)}: it was made by another command or version")
    now = fingerprint(card["model"])
    if now != card["weights"]:
        raise InputError(f"{path} was made with weights {card['weights']} of {card['model']}, here they are {now}")
    if "sampler" in card and _digest(Path(card["sampler"])) != card["sampler_file"]:
        raise InputError(f"the sampler card {card['sampler']} is not the one that {path} was made with")
    picture, seconds = drawn(card)
    same = picture.tobytes() == kept.tobytes()
    if out is not None:
        save(picture, out, card)
    record = {**card, "replayed": str(path), "out": None if out is None else str(out), "same": same}
    verdict = "the same pixels" if same else "other pixels (another machine, number of threads or version)"
    return Answer(record | {"seconds": round(seconds, 2)}, f"{path}: {verdict}", 0 if same else FAILED)


def _region(text: str) -> list[Any]:
    """[[left, top, right, bottom], prompt] from "0,0,0.5,1:red heart"."""
    from sfumato.core.errors import InputError

    where, colon, prompt = text.partition(":")
    try:
        left, top, right, bottom = (float(number) for number in where.split(","))
    except ValueError:
        colon = ""
    if not (colon and prompt.strip()):
        raise InputError(f"a region is written LEFT,TOP,RIGHT,BOTTOM:PROMPT, e.g. '0,0,0.5,1:red heart'; not {text!r}")
    return [[left, top, right, bottom], prompt.strip()]


def _shards(
    prompts: Sequence[str] | None,
    n: int,
    model: str,
    options: Mapping[str, Any],
    seed: int,
    cond: Mapping[str, str],
    extra: Mapping[str, Any],
    out: Path,
    processes: int,
) -> Answer:
    import sfumato
    from sfumato.cli._launch import launched
    from sfumato.cli._places import folder
    from sfumato.cli.shards import make

    folder(out)
    count = n * max(1, len(prompts or ()))
    card = described(model, prompts, n, options, seed, cond) | dict(extra)
    pipeline = sfumato.load(model)  # what cannot be drawn is refused before it begins
    pipeline.conditions(len(prompts or ()) or 1, list(prompts or ()) or None, **cond)
    pipeline.guided(options.get("guidance"))
    launched(make, processes, str(out), card, count)
    record = {**card, "out": str(out), "count": count}
    return Answer(record, f"{out}: {count} pictures of {model} in shards (sfumato.training.data.Shards reads them)")
