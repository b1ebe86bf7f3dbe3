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
from sfumato.core import Context, Objective, mix, sample
from sfumato.denoisers import lora
from sfumato.distillation.job import Job, rewrapped
from sfumato.distillation.methods import METHODS
from sfumato.distillation.settings import Settings
from sfumato.networks.scalars import settled
from sfumato.objectives.distill import Segments
from sfumato.pipeline import Pipeline
from sfumato.training import Trainer


def distill(
    pipeline: Pipeline,
    method: str = "segments",
    steps: int = 4,
    *,
    prompts: Sequence[str] | None = None,
    cond: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    scores: bool = False,
    model: str = "",
    cpu: bool = False,
    progress: bool | None = None,
    **settings: Any,
) -> Pipeline:
    """A Pipeline of ``steps`` calls an image, without a second call for guidance, taught by this one alone.

    The teacher first solves ``trajectories`` of its guided probability flow; the student, a copy of its network (or adapters
    in it, with ``rank``), learns from them. No data set is needed.

    method    'segments'               the teacher's move between the student's times, each in one call
              'progressive'            the same from noised samples, two steps in one, halving by halving (Salimans & Ho)
              'rectified-diffusion'    every state between them tells the same first-order move (one step: matched pairs)
              'reflow'                 matched pairs on straight lines, for flow models
              'consistency'            consistency distillation, guidance inside
              'consistency-training'   the same from samples alone, the teacher is not asked (Song et al.)
              'lcm-lora'               latent consistency, a range of guidance, in adapters only
              'slam'                   consistency along sub-paths
              'distribution-matching'  a critic of the student's own samples; pairs beside it for one step
    prompts   what the student shall know (default: the model's classes or its table of captions)
    cond      raw conditions as in ``Pipeline.generate``, the same for all items or one a prompt
    out       folder of trajectories, checkpoints and the result; a distillation in it goes on bit for bit
    scores    measure how far student and teacher at equal calls are from the teacher's fine ends, for the card
    settings  see :class:`Settings`

    The card of the result says teacher, method and cost. A pipeline from diffusers gives one whose ``source`` is a diffusers
    pipeline with the student in it. Raises InputError for what a method cannot serve.
    """
    chosen = Settings(method=method, steps=steps, **settings)
    folder = None if out is None else Path(out)
    job = Job(pipeline, chosen, prompts, dict(cond or {}))
    began = time.perf_counter()
    fit = _halved if method == "progressive" else _fitted
    student, facts = fit(job, folder, {"resume": resume, "cpu": cpu, "progress": progress})
    facts |= {"minutes": round((time.perf_counter() - began) / 60, 2)}
    made = bundled(job, student, model, facts)
    if scores:
        made.card["scores"] = compared(job, made)
    if folder is not None and _saves(made):
        made.save(folder / "pipeline")
    return made


def _trainer(
    job: Job, objective: Objective, data: Any, reads: str, out: Path | None, how: Mapping[str, Any]
) -> Trainer:
    s = job.settings
    kept = ("method", "steps", "batch", "trajectories", "calls", "guidance", "rank")
    return Trainer(
        objective, job.batches(data, reads), steps=s.iterations, out=out, lr=s.lr, betas=(0.9, 0.99), decay="cosine", clip=1.0,
        warmup=min(50, s.iterations // 10), ema=s.ema, seed=s.seed, save_every=s.save_every, log_every=s.log_every,
        cpu=how["cpu"], progress=how["progress"], config={k: getattr(s, k) for k in kept},
    )  # fmt: skip


def _fitted(job: Job, out: Path | None, how: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    method = METHODS[job.settings.method]
    trainer = _trainer(job, method.make(job), job.data(out), method.reads, out, how)
    students = trainer.fit(how["resume"])
    adapter = None
    student: Any = students["student"]
    if any(isinstance(m, lora.Adapted) for m in student.modules()):
        adapter, student = lora.extract(student), lora.merge(student)
        if out is not None:
            adapter.save(out / "adapter.safetensors")
    if "gamma" in (getattr(student, "reads", None) or ()):
        student = rewrapped(student, settled(student.net, "gamma", 1.0))
    facts: dict[str, Any] = {"iterations": trainer.it, "training seconds": round(trainer.seconds, 1)}
    return student.eval(), facts | ({} if adapter is None else {"adapter parameters": lora.size(adapter)})


def _halved(job: Job, out: Path | None, how: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Progressive distillation: each student is the next one's teacher, with half as many steps."""
    data, teacher, student, seconds = job.data(out), job.teacher, job.student, 0.0
    for halving in reversed(range(job.settings.halvings)):
        times = _subdivided(job.times, 2**halving)
        objective = Segments(student, times, teacher, substeps=2, read="native", weighting="max-snr")
        folder = None if out is None else out / f"{len(times) - 1}-steps"
        trainer = _trainer(job, objective, data, "x", folder, how)
        last: Any = trainer.fit(how["resume"])["student"]
        seconds += trainer.seconds
        teacher, student = last, copy.deepcopy(last).requires_grad_().train()
    facts = {"iterations": job.settings.iterations * job.settings.halvings, "training seconds": round(seconds, 1)}
    return last, facts


def _subdivided(times: Sequence[float], parts: int) -> list[float]:
    inner = [a + (b - a) * k / parts for a, b in zip(times, times[1:], strict=False) for k in range(parts)]
    return [*inner, times[-1]]


def bundled(job: Job, student: Any, model: str, facts: Mapping[str, Any]) -> Pipeline:
    """The result as a pipeline, with its card."""
    s, method = job.settings, METHODS[job.settings.method]
    times = tuple(round(t, 12) for t in (*job.times[:-1], 0.0))
    card = {
        "what": f"{s.steps} calls an image, distilled from {model or 'another pipeline'} by {s.method}",
        "teacher": {"model": model, "guidance": job.scale, "calls": s.teacher_calls, "card": job.pipeline.card},
        "method": s.method,
        "settings": dataclasses.asdict(s),
        "cost": {**facts, "teacher trajectories": s.trajectories},
    }  # fmt: skip
    made = dataclasses.replace(
        job.pipeline,
        denoiser=student,
        solver=method.solver,
        grid=f"piecewise(times={times})",
        steps=s.steps,
        guidance=1.0,
        card=card,
    )
    source = getattr(made, "source", None)
    if source is not None and callable(source):
        made.source = _swapped(source, student.net.model)  # type: ignore[attr-defined]
    return made


def _swapped(source: Any, model: Any) -> Any:
    """The diffusers pipeline with another denoising model in it."""
    name = "unet" if "unet" in source.components else "transformer"
    return type(source)(**{**source.components, name: model})


def _saves(made: Pipeline) -> bool:
    return type(made).save is Pipeline.save


@torch.no_grad()
def compared(job: Job, made: Pipeline, n: int = 64) -> dict[str, Any]:
    """Root mean square distance to the teacher's fine ends from the same noise, which neither has seen (median of n)."""
    cond = job.conditions(range(10**6, 10**6 + n))
    seed = [mix(job.settings.seed, 3, i) for i in range(n)]
    fine = grids.get("arc")

    def ends(denoiser: Any, solver: str, grid: Any, steps: int) -> Tensor:
        parts = []
        for i in range(0, n, 32):
            part = {k: v[i : i + 32] for k, v in cond.items()}
            ctx = Context.of(len(seed[i : i + 32]), seed[i : i + 32], cond=part)
            parts.append(
                sample(
                    denoiser,
                    solvers.registry.make(solver),
                    grid,
                    steps,
                    shape=(len(seed[i : i + 32]), *job.shape),
                    ctx=ctx,
                )
            )
        return torch.cat(parts)

    end = ends(job.teacher, "arc", fine, 4 * job.settings.teacher_calls)
    grid = grids.registry.make(str(made.grid))
    runs = {
        "student": ends(made.denoiser, str(made.solver), grid, made.steps),
        "teacher with ddim at as many steps": ends(job.teacher, "ddim", grid, made.steps),
    }
    errors = {k: float((v - end).flatten(1).square().mean(1).sqrt().median()) for k, v in runs.items()}
    return {"median distance to the teacher's end": errors, "items": n}
