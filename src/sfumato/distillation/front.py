"""``sf.distill``: the one call, and the pipeline it returns."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import grids, solvers
from sfumato.core import Context, InputError, Objective, mix, sample
from sfumato.denoisers import lora
from sfumato.distillation.activations import seen
from sfumato.distillation.job import Job, rewrapped
from sfumato.distillation.methods import METHODS
from sfumato.distillation.settings import Settings
from sfumato.networks.scalars import settled
from sfumato.objectives.distill import FlowGuided, Segments, squared_mmd
from sfumato.pipeline import Pipeline
from sfumato.pipeline import bundled as bundled_names
from sfumato.training import Trainer


def distill(
    pipeline: Pipeline,
    method: str = "segments",
    steps: int = 4,
    *,
    data: Any = None,
    prompts: str | Sequence[str] | None = None,
    cond: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    scores: bool = True,
    model: str = "",
    cpu: bool = False,
    progress: bool | None = None,
    **settings: Any,
) -> Pipeline:
    """A Pipeline of ``steps`` calls an image, without a second call for guidance, taught by this one.

    Most methods need no data set: the teacher first solves ``trajectories`` of its guided probability flow, and the student, a
    copy of its network (or adapters in it, with ``rank``), learns from them.

    method    'segments'               the teacher's move between the student's times, each in one call
              'progressive'            the same from noised samples, two steps in one, halving by halving (Salimans & Ho)
              'rectified-diffusion'    every state between them tells the same first-order move (one step: matched pairs)
              'reflow'                 matched pairs on straight lines, for flow models
              'slimflow'               a smaller network: pairs that become matched, then its own flow's moves (one step)
              'consistency'            consistency distillation, guidance inside
              'consistency-training'   the same from samples alone, the teacher is not asked (Song et al.)
              'lcm-lora'               latent consistency, a range of guidance, in adapters only
              'slam'                   consistency along sub-paths
              'distribution-matching'  a critic of the student's own samples; pairs beside it for one step
              'boot'                   one step, from noise alone: the teacher's trajectory as a function of the time
              'mmd-ddm'                samples whose moments are those of ``data``, through the few steps themselves
              'ddgan'                  few large random steps, each told a latent, against a critic that knows ``data``
              'tad-sr'                 one step of a restoration model, on ``data``
    data      pictures for the last three, and instead of the teacher's samples for those that learn from samples: see
              :class:`sfumato.distillation.pictures.Pictures`
    prompts   what the student shall know, a text or several (default: the model's classes or its table of captions)
    cond      raw conditions as in ``Pipeline.generate``, the same for all items or one a prompt
    out       folder of trajectories, checkpoints and the result; a distillation in it goes on bit for bit
    scores    measure the student for the card: how far it and the teacher at equal calls are from the teacher's fine ends; with
              ``data`` from the pictures
    model     the teacher's name, for the card. Adapters of a bundled model are kept alone in ``out``
    settings  see :class:`Settings`

    The card of the result says teacher, method and cost. A pipeline from diffusers gives one whose ``source`` is a diffusers
    pipeline with the student in it. Raises InputError for what a method cannot serve.
    """
    chosen = Settings.of(method, steps, settings)
    folder = None if out is None else Path(out)
    job = Job(pipeline, chosen, _texts(prompts), dict(cond or {}), data)
    if data is not None and METHODS[method].reads not in ("data", "restored", "x"):
        raise InputError(f"{method} learns from the teacher alone: leave data= out")
    return _made(job, folder, scores, model, {"resume": resume, "cpu": cpu, "progress": progress})


def _made(job: Job, folder: Path | None, scores: bool, model: str, how: Mapping[str, Any]) -> Pipeline:
    """The student taught, bundled, measured and kept."""
    began = time.perf_counter()
    fit = {"progressive": _halved, "slimflow": _slimmed}.get(job.settings.method, _fitted)
    student, facts, adapter = fit(job, folder, how)
    facts |= {"minutes": round((time.perf_counter() - began) / 60, 2)}
    alone = adapter is not None and model in bundled_names()
    made = bundled(job, student, model, facts | ({"kept as": _kept(alone, model)} if adapter is not None else {}))
    if scores:
        made.card["scores"] = judged(job, made) if job.given is not None else compared(job, made)
    if folder is not None:
        made.save(folder / "pipeline", **({"base": model, "adapter": adapter} if alone else {}))
    return made


def _texts(prompts: str | Sequence[str] | None) -> list[str] | None:
    """One prompt or several as a list; InputError where there is none in it, or something else than a text."""
    if prompts is None:
        return None
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"prompts = {prompts!r}: a text or several, or None for all that the model knows")
    return list(texts)


def _kept(alone: bool, model: str) -> str:
    """How the card says an adapter is kept."""
    return f"an adapter of {model} alone" if alone else "a whole network, its adapter beside it"


def _trainer(job: Job, objective: Objective, data: Any, out: Path | None, how: Mapping[str, Any]) -> Trainer:
    """The Trainer of one objective, with the rate and the momenta of the method."""
    s, method = job.settings, METHODS[job.settings.method]
    kept = ("method", "steps", "batch", "trajectories", "calls", "guidance", "rank")
    return Trainer(
        objective, data, steps=s.iterations, out=out, lr=s.rate, betas=method.betas, decay="cosine", clip=1.0,
        warmup=min(50, s.iterations // 10), ema=s.ema, seed=s.seed, save_every=s.save_every, log_every=s.log_every,
        cpu=how["cpu"], progress=how["progress"], config={k: getattr(s, k) for k in kept},
    )  # fmt: skip


def _fitted(job: Job, out: Path | None, how: Mapping[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """(student, facts, adapter or None) of one training; adapters are merged, a gamma is settled at 1."""
    method = METHODS[job.settings.method]
    objective = method.make(job)  # refuses before anything is made
    trainer = _trainer(job, objective, job.reading(out, method.reads), out, how)
    student: Any = trainer.fit(how["resume"])[method.player]
    adapter = None
    if any(isinstance(m, lora.Adapted) for m in student.modules()):
        adapter, student = lora.extract(student), lora.merge(student)
        if out is not None:
            adapter.save(out / "adapter.safetensors")
    if "gamma" in (getattr(student, "reads", None) or ()):
        student = rewrapped(student, settled(student.net, "gamma", 1.0))
    facts: dict[str, Any] = {"iterations": trainer.it, "training seconds": round(trainer.seconds, 1)}
    return student.eval(), facts | ({} if adapter is None else {"adapter parameters": lora.size(adapter)}), adapter


def _halved(job: Job, out: Path | None, how: Mapping[str, Any]) -> tuple[Any, dict[str, Any], None]:
    """Progressive distillation: each student is the next one's teacher, with half as many steps."""
    data, teacher, student, seconds = job.reading(out, "x"), job.teacher, job.student, 0.0
    for halving in reversed(range(job.settings.halvings)):
        times = _subdivided(job.times, 2**halving)
        objective = Segments(student, times, teacher, substeps=2, read="native", weighting="max-snr")
        folder = None if out is None else out / f"{len(times) - 1}-steps"
        trainer = _trainer(job, objective, data, folder, how)
        last: Any = trainer.fit(how["resume"])["student"]
        seconds += trainer.seconds
        teacher, student = last, copy.deepcopy(last).requires_grad_().train()
    facts = {"iterations": job.settings.iterations * job.settings.halvings, "training seconds": round(seconds, 1)}
    return last, facts, None


def _slimmed(job: Job, out: Path | None, how: Mapping[str, Any]) -> tuple[Any, dict[str, Any], None]:
    """SlimFlow: a small flow by annealing reflow, and for one step its distillation from pairs and its own moves."""
    data = job.reading(out, "pairs")
    facts: dict[str, Any] = {"iterations": 0, "training seconds": 0.0}

    def part(name: str, objective: Objective) -> Any:
        """The student of one part, its cost added to the facts."""
        trainer = _trainer(job, objective, data, None if out is None else out / name, how)
        student = trainer.fit(how["resume"])["student"]
        facts["iterations"] += trainer.it
        facts["training seconds"] = round(facts["training seconds"] + trainer.seconds, 1)
        return student

    last = part("reflow", METHODS["slimflow"].make(job))
    if job.settings.steps == 1:
        last = part("distilled", FlowGuided(copy.deepcopy(last).requires_grad_().train(), last))
    sizes = [sum(p.numel() for p in d.parameters()) for d in (job.pipeline.denoiser, last)]
    return last, facts | {"parameters of the teacher": sizes[0], "parameters": sizes[1]}, None


def _subdivided(times: Sequence[float], parts: int) -> list[float]:
    """Each interval in so many equal ones."""
    inner = [a + (b - a) * k / parts for a, b in zip(times, times[1:], strict=False) for k in range(parts)]
    return [*inner, times[-1]]


def bundled(job: Job, student: Any, model: str, facts: Mapping[str, Any]) -> Pipeline:
    """The result as a pipeline, with its card."""
    s, method = job.settings, METHODS[job.settings.method]
    times = tuple(round(t, 12) for t in (*job.times[:-1], 0.0))
    teacher = {"model": model, "guidance": job.scale if method.guided else 1.0, "card": job.pipeline.card}
    cost = dict(facts)
    if job.given is not None:
        cost["pictures"] = len(job.pictures)
    if method.reads in ("states", "pairs", "restored") or (method.reads == "x" and job.given is None):
        teacher["calls"] = job.run if method.reads == "restored" else s.teacher_calls
        cost["teacher trajectories"] = s.trajectories
    card = {
        "what": f"{s.steps} call{'s' * (s.steps > 1)} an image, distilled from {model or 'another pipeline'} by {s.method}",
        "teacher": teacher,
        "method": s.method,
        "settings": dataclasses.asdict(s) | {"lr": s.rate},
        "cost": cost,
    }  # fmt: skip
    return job.pipeline.taught(
        student, solver=method.solver, grid=f"piecewise(times={times})", steps=s.steps, guidance=1.0, card=card
    )


@torch.no_grad()
def drawn(
    denoiser: Any, solver: str, grid: Any, steps: int, job: Job, cond: Mapping[str, Any], seeds: Sequence[int]
) -> Tensor:
    """Samples of one seed an item, a few at a time."""
    parts = []
    for i in range(0, len(seeds), 32):
        own = seeds[i : i + 32]
        ctx = Context.of(len(own), own, cond={k: v[i : i + 32] for k, v in cond.items()})
        parts.append(
            sample(denoiser, solvers.registry.make(solver), grid, steps, shape=(len(own), *job.shape), ctx=ctx)
        )
    return torch.cat(parts)


@torch.no_grad()
def compared(job: Job, made: Pipeline, n: int = 64) -> dict[str, Any]:
    """Root mean square distance to the teacher's fine ends from the same noise, which neither has seen (median of n)."""
    cond = job.conditions(range(10**6, 10**6 + n))
    seeds = [mix(job.settings.seed, 3, i) for i in range(n)]
    end = drawn(job.teacher, "arc", grids.get("arc"), 4 * job.settings.teacher_calls, job, cond, seeds)
    grid = grids.registry.make(str(made.grid))
    runs = {
        "student": drawn(made.denoiser, str(made.solver), grid, made.steps, job, cond, seeds),
        "teacher with ddim at as many steps": drawn(job.teacher, "ddim", grid, made.steps, job, cond, seeds),
    }
    errors = {k: float((v - end).flatten(1).square().mean(1).sqrt().median()) for k, v in runs.items()}
    return {"median distance to the teacher's end": errors, "items": n}


@torch.no_grad()
def judged(job: Job, made: Pipeline, n: int = 256) -> dict[str, Any]:
    """How far samples are from pictures of the data, told the same: restorations item by item, others as a law.

    A law is compared by the squared MMD of features that were not trained on: the states themselves, or, where those were, the
    teacher's activations. Negative is as near as another half of the data would be.
    """
    n = min(n, len(job.pictures))
    rows = [i * len(job.pictures) // n for i in range(n)]
    found = job.pictures.batch(rows)
    seeds = [mix(job.settings.seed, 3, i) for i in rows]
    grid = grids.registry.make(str(made.grid))
    runs = {
        "student": drawn(made.denoiser, str(made.solver), grid, made.steps, job, found["cond"], seeds),
        "teacher with ddim at as many steps": drawn(job.teacher, "ddim", grid, made.steps, job, found["cond"], seeds),
    }
    if METHODS[job.settings.method].reads == "restored":
        errors = {k: float((v - found["x"]).flatten(1).square().mean(1).sqrt().median()) for k, v in runs.items()}
        return {"median distance to the pictures": errors, "items": n}
    name = "teacher" if job.settings.features == "pixels" else "pixels"
    eyes = seen(job.pipeline, name, found["x"], dict(job.raw))
    real = eyes(found["x"])
    return {
        f"squared MMD to the data, {name}": {k: float(squared_mmd(eyes(v), real)) for k, v in runs.items()},
        "items": n,
    }
