"""A distillation under way: teacher, conditions, trajectories and the student."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import grids
from sfumato.core import Denoiser, InputError, mix
from sfumato.denoisers import lora, parametrized
from sfumato.distillation.pictures import Pictures, restored
from sfumato.distillation.settings import Settings
from sfumato.distillation.smaller import slimmed
from sfumato.pipeline import Pipeline
from sfumato.training.data import Batches
from sfumato.training.shards import Arrays
from sfumato.training.trajectories import Stored, Trajectories


@dataclass
class Job:
    """A distillation under way: the teacher, what it is told, the student and its times."""

    pipeline: Pipeline
    settings: Settings
    prompts: Sequence[str] | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    given: Any = None

    @cached_property
    def pictures(self) -> Pictures:
        """The data. Raises InputError where there are none."""
        if self.given is None:
            raise InputError(f"{self.settings.method} learns from pictures: give data= (--data on the command line)")
        return Pictures(self.pipeline, self.given, self.raw, self.settings.seed)

    @cached_property
    def scale(self) -> float:
        """The guidance that is put into the student."""
        own = self.pipeline.guidance
        if not self.settings.guidance and not isinstance(own, (int, float)):
            raise InputError("this pipeline's guidance is no scale: give guidance=")
        return self.settings.guidance or float(own)  # type: ignore[arg-type]

    @cached_property
    def teacher(self) -> Denoiser:
        """Guided."""
        return self.pipeline.guided(self.scale)  # type: ignore[no-any-return]

    @cached_property
    def fine(self) -> list[float]:
        """The teacher's times."""
        times: list[float] = grids.get("arc")(self.pipeline.process, self.settings.teacher_calls, 1.0, 0.0).tolist()
        return times

    @property
    def run(self) -> int:
        """Calls of the teacher's run on a picture that it restores: the steps of its process where that has such."""
        return self.settings.calls or int(getattr(self.pipeline.process, "steps", self.pipeline.steps))

    @cached_property
    def times(self) -> list[float]:
        """The student's: every so many of the teacher's."""
        return self.fine[:: self.settings.teacher_calls // self.settings.steps]

    @cached_property
    def student(self) -> Any:
        """A copy of the network to train, or a tree with adapters in it that shares the teacher's."""
        rank = self.settings.rank or self.settings.adapters
        if rank:
            return lora.inject(self.pipeline.denoiser, rank, targets=r"^net\.", seed=self.settings.seed).train()
        return self.copied().train()

    def copied(self) -> Any:
        """The pipeline's denoiser with weights of its own."""
        return copy.deepcopy(self.pipeline.denoiser).requires_grad_()

    def small(self) -> Any:
        """A student of fewer channels with fresh weights, in the teacher's process."""
        net = slimmed(self.pipeline.denoiser.net, self.settings.width, self.settings.seed)
        return answering(rewrapped(self.pipeline.denoiser, net)).requires_grad_().train()

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one item."""
        return tuple(self.pipeline.codec.shape(*self.pipeline.size))

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What item i is told: a prompt and classes drawn by (seed, i)."""
        known, options = self._known
        n = max(len(v) for v in known.values()) if known else 1
        rows = [mix(self.settings.seed, i, 1) % n for i in indices]
        cond = {k: v[rows] for k, v in known.items()}
        for position, (name, count) in enumerate(options.items()):
            drawn = [mix(self.settings.seed, i, 2 + position) % (count + 1) for i in indices]
            cond[name] = torch.tensor(drawn)
        return cond

    @cached_property
    def _known(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(conditions of every prompt, number of options of every further class, which may also be none)."""
        conditioner: Any = self.pipeline.conditioner
        heard = list(self.prompts) if self.prompts is not None else vocabulary(conditioner)
        reads = getattr(self.pipeline.denoiser, "reads", None) or set()
        if not heard and "text" in reads:
            raise InputError("this model reads text: give the prompts that the student shall learn, prompts=[...]")
        cond = self.pipeline.conditions(max(len(heard), 1), heard or None, **self.raw)
        free = {} if self.raw else dict(getattr(conditioner, "classes", {}))
        if heard and conditioner.name == "classes":
            free.pop(next(iter(free)))
        return {k: v for k, v in cond.items() if k not in free}, {k: len(v) for k, v in free.items()}

    def data(self, out: Path | None) -> Any:
        """The teacher's trajectories, kept under ``out``; made now where they are not there."""
        made = Trajectories(
            self.teacher, self.settings.trajectories, self.shape, conditions=self.conditions, solver="arc",
            grid=grids.fixed(self.fine), steps=self.settings.teacher_calls, seed=mix(self.settings.seed, 1),
        )  # fmt: skip
        if out is not None:
            made.write(out / "trajectories", per_shard=256)
            return Stored(out / "trajectories", conditions=self.conditions)
        parts = [made.batch(range(i, min(i + 64, len(made)))) for i in range(0, len(made), 64)]
        return Arrays({k: torch.cat([p[k] for p in parts]) for k in ("states", "index")})

    def reading(self, out: Path | None, form: str) -> Any:
        """What a method learns from: 'data', pictures; 'restored', pictures and the teacher's run on each; 'conditions' alone;
        or the teacher's trajectories, as in :meth:`batches`, where 'x' may be pictures instead."""
        s = self.settings
        if form == "conditions":
            return self._told
        if form == "restored":
            runs = restored(self.pictures, self.teacher, s.trajectories, self.run, s.seed, out)
            return Batches(runs, s.batch, s.seed)
        if form == "data" or (form == "x" and self.given is not None):
            return Batches(self.pictures, s.batch, s.seed)
        return self.batches(self.data(out), form)

    def _told(self, it: int) -> dict[str, Any]:
        """The conditions of iteration ``it``, each of an item that no other one has."""
        rows = range(it * self.settings.batch, (it + 1) * self.settings.batch)
        return {"index": torch.tensor(rows), "cond": self.conditions(rows)}

    def batches(self, data: Any, form: str) -> Batches:
        """Batches of 'states' at the student's times, of 'pairs', or of samples 'x', with conditions."""
        every = self.settings.teacher_calls // self.settings.steps

        def transform(batch: dict[str, Any]) -> dict[str, Any]:
            """A batch in that form, with its conditions."""
            states = batch["states"]
            fields = {"states": states[:, ::every], "pairs": states[:, [0, -1]], "x": states[:, -1]}
            cond = batch["cond"] if "cond" in batch else self.conditions(batch["index"].tolist())
            return {"x" if form == "x" else "states": fields[form], "cond": cond}

        return Batches(data, self.settings.batch, self.settings.seed, transform=transform)


def rewrapped(denoiser: Any, net: Any, predicts: str | None = None) -> Any:
    """The same parameterisation of another network, or of one that predicts something else."""
    d = denoiser
    return parametrized(net, d.process, predicts or d.predicts, d.clock, d.null, d.data_std).train(d.training)


def answering(denoiser: Any) -> Any:
    """The same network, its output read as 'v' where an 'eps' or a score would say next to nothing of x0 at t = 1.

    There alpha is nearly 0, and x0 = (x - sigma eps) / alpha multiplies every error by 1 / alpha. A student whose one call
    begins there learns its last layer anew.
    """
    weak = denoiser.predicts in ("eps", "score") and denoiser.process.coef(1.0).alpha < 0.1
    return rewrapped(denoiser, denoiser.net, "v") if weak else denoiser


def vocabulary(conditioner: Any) -> list[str]:
    """What a conditioner knows by name: its table of captions, or its first classes."""
    if getattr(conditioner, "table", None):
        return list(conditioner.encoder.captions)
    if conditioner.name == "classes":
        return list(next(iter(conditioner.classes.values())))
    return []
