"""Pictures to learn from, as states and conditions of a pipeline; with the teacher's runs on them for restoration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.conditioners import Degraded
from sfumato.core import Context, InputError, Streams, mix
from sfumato.pipeline import Pipeline
from sfumato.training.shards import Arrays, Dataset
from sfumato.training.trajectories import Stored, Trajectories


class Pictures:
    """A data set whose ``batch(indices)`` is {"x": states (B, *), "cond": conditions, "index": (B,)} of a pipeline.

    given  pictures (N, C, H, W), uint8 or in [-1, 1]; a mapping of fields of one length; or a data set of such fields: "x", the
           pictures, of the pipeline's size; "prompt", captions or class names, for a model that reads them; and raw conditions
           by name, as ``Pipeline.generate(cond=)`` takes them. A restoration model's "image", the degraded picture, is made by
           the model's own operator where it is not given, with noise that is a function of (seed, index)
    raw    conditions that are the same for all

    Codes of a latent model are the codec's means. Raises InputError for pictures of another size, for floats of another range
    (when they are read), and where the model reads prompts that are not there.
    """

    def __init__(self, pipeline: Pipeline, given: Any, raw: Mapping[str, Any], seed: int) -> None:
        fields = {"x": given} if isinstance(given, Tensor) else given
        self.dataset: Dataset = Arrays(fields) if isinstance(fields, Mapping) else fields
        self.pipeline, self.raw, self.seed = pipeline, dict(raw), seed
        if not hasattr(self.dataset, "batch") or not len(self.dataset):
            raise InputError("data are pictures (N, C, H, W), a mapping of fields, or a data set with batch(indices)")
        self._check(self.dataset.batch([0]))

    def __len__(self) -> int:
        return len(self.dataset)

    @torch.no_grad()
    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Those items."""
        rows = list(indices)
        fields = dict(self.dataset.batch(rows))
        x = self._encoded(fields["x"])
        return {"x": x, "cond": self._told(fields, rows), "index": torch.tensor(rows)}

    def conditions(self, indices: Sequence[int]) -> dict[str, Any]:
        """What the model is told of items, counted on from the first again after the last."""
        rows = [i % len(self) for i in indices]
        with torch.no_grad():
            return self._told(dict(self.dataset.batch(rows)), rows)

    def _encoded(self, x: Tensor) -> Tensor:
        """The pictures as states. InputError for floats that are none in [-1, 1], which an enlargement may overshoot by half."""
        if x.is_floating_point() and not bool((x.abs() <= 1.5).all()):
            low, high = float(x.min()), float(x.max())
            raise InputError(f"the pictures run from {low:g} to {high:g}: give uint8, or floats in [-1, 1]")
        return self.pipeline.codec.encode(x)  # type: ignore[no-any-return]

    def _told(self, fields: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """The conditions of these items: from prompts and raw ones, a degraded picture made where there is none."""
        x, prompts = fields.pop("x"), fields.pop("prompt", None)
        conditioner = self.pipeline.conditioner
        if isinstance(conditioner, Degraded) and "image" not in fields:
            streams = Streams.of([mix(self.seed, 6, i) for i in rows], len(rows))
            fields["image"] = conditioner.degraded(self._encoded(x), Context(rng=streams, batch=len(rows)))
        return self.pipeline.conditions(len(rows), prompts, **{**self.raw, **fields})

    def _check(self, first: Mapping[str, Any]) -> None:
        """InputError where an item lacks pictures of the pipeline's size, or what the model reads."""
        if "x" not in first:
            raise InputError(f"the data have no pictures: a field 'x' is wanted, there are {sorted(first)}")
        x, size = first["x"], self.pipeline.size
        channels = self.pipeline.codec.decode(torch.zeros(1, *self.pipeline.codec.shape(*size))).shape[1]
        if x.ndim != 4 or tuple(x.shape[1:]) != (channels, *size):
            raise InputError(
                f"the pictures are {tuple(x.shape[1:])}; this model's are {(channels, *size)}: resize them"
            )
        names = bool(getattr(self.pipeline.conditioner, "vocabulary", [])) or "text" in (
            self.pipeline.denoiser.reads or ()
        )
        if names and "prompt" not in first and not (set(first) - {"x"} or self.raw):
            raise InputError(
                "this model is told what it draws: the data need a field 'prompt', captions or class names"
            )


class Restored:
    """Pictures with "states" (B, 2, *): start and end of the teacher's deterministic run on each."""

    def __init__(self, pictures: Pictures, runs: Any) -> None:
        self.pictures, self.runs = pictures, runs

    def __len__(self) -> int:
        return len(self.runs)

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Those items."""
        rows = list(indices)
        found = self.pictures.batch([i % len(self.pictures) for i in rows])
        return {**found, "states": self.runs.batch(rows)["states"]}


def restored(pictures: Pictures, teacher: Any, n: int, calls: int, seed: int, out: Path | None) -> Restored:
    """The teacher's runs on n pictures in turn, kept under ``out``; in the process's own equal steps, by DDIM."""
    shape = tuple(pictures.pipeline.codec.shape(*pictures.pipeline.size))
    made = Trajectories(
        teacher, n, shape, conditions=pictures.conditions, solver="ddim", grid="uniform", steps=calls, keep="ends", seed=mix(seed, 1)
    )  # fmt: skip
    if out is not None:
        made.write(out / "trajectories", per_shard=256)
        return Restored(pictures, Stored(out / "trajectories"))
    parts = [made.batch(range(i, min(i + 64, n)))["states"] for i in range(0, n, 64)]
    return Restored(pictures, Arrays({"states": torch.cat(parts)}))


__all__ = ["Pictures", "Restored", "restored"]
