"""How the bundled few-step emoji models were made: trajectories of the guided teacher, then students of its segments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core import mix
from sfumato.networks import perceptual_distance
from sfumato.objectives.distill import Segments, Unrolled
from sfumato.pipeline import Pipeline, load
from sfumato.training import Trainer
from sfumato.training.data import Batches
from sfumato.training.trajectories import Stored, Trajectories
from sfumato.zoo import captions, emoji
from sfumato.zoo.encoders import load_encoder
from sfumato.zoo.make_emoji import SKIN_TONE_WEIGHT, VENDORS

TEACHER, GUIDANCE = "emoji-latent", 3.0
TRAJECTORIES, SEGMENTS, GUIDED = "emoji-latent-trajectories", "emoji-latent-4-segments", "emoji-latent-4-guided"
TIMES = (
    1.0,
    0.9,
    0.75,
    0.6,
    0.45,
    0.3,
    0.16,
    0.06,
    0.0,
)  # of the teacher; the student of four steps takes every second
PART, APART = 1024, 1000  # trajectories a folder; the first part of other requests
SEEN = 0.5  # weight of the looks
UNNAMED, SILENT = 0.15, 0.03  # how often no vendor, and no text, is asked for


class Requests:
    """indices -> what is asked for: a drawing of the training split, one of its texts, its vendor. Each index has its own draws."""

    def __init__(self, seed: int = 0) -> None:
        items = emoji.load(64, split="train")
        self.items, self.bank, self.seed = items, captions.bank(items), seed
        toned = torch.tensor([items.concepts[c].tone is not None for c in items.concept.tolist()])
        self.cumulative = torch.where(toned, SKIN_TONE_WEIGHT, 1.0).double().cumsum(0)

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows, texts, vendors, silent = [], [], [], []
        for index in indices:
            generator = torch.Generator().manual_seed(mix(self.seed, index) & 0xFFFFFFFF)
            u = torch.rand(3, generator=generator, dtype=torch.float64)
            row = torch.searchsorted(self.cumulative, u[:1] * self.cumulative[-1])
            rows.append(row)
            texts.append(self.bank.choose(row, generator))
            silent.append(bool(u[1] < SILENT))
            vendors.append(VENDORS if u[2] < UNNAMED else int(self.items.vendor[row]))
        cond = self.bank.conditions(torch.cat(texts))
        spoken = ~torch.tensor(silent)
        cond = {
            "text": cond["text"] * spoken[:, None, None],
            "text_mask": cond["text_mask"] & spoken[:, None],
            "vector": cond["vector"] * spoken[:, None],
        }
        return {**cond, "vendor": torch.tensor(vendors)}


def trajectories(part: int) -> Trajectories:
    """Trajectories ``part`` PART .. (part + 1) PART of the guided teacher, 8 calls each."""
    teacher = load(TEACHER)
    return Trajectories(
        teacher.guided(GUIDANCE), PART, teacher.codec.shape(*teacher.size), conditions=Requests(), solver="arc",
        grid=f"piecewise(times={TIMES})", steps=len(TIMES) - 1, first=part * PART,
    )  # fmt: skip


def further(part: int, run: Path) -> Trajectories:
    """Pairs of the student of segments in ``run``, of requests that the teacher was not asked: a sixth of the teacher's cost."""
    student = learnt(make_segments, run).eval().requires_grad_(False)
    return Trajectories(
        student, PART, load(TEACHER).codec.shape(64, 64), conditions=Requests(), solver="ddim",
        grid=f"piecewise(times={TIMES[::2]})", steps=4, keep="ends", first=(APART + part) * PART,
    )  # fmt: skip


def written(run: Path, parts: int, make: Callable[[int], Trajectories], card: Mapping[str, Any]) -> list[Path]:
    """The folders of the first parts in ``run``; what is not there is solved now."""
    folders = [run / f"{part:02d}" for part in range(parts)]
    for part, folder in enumerate(folders):
        if not (folder / "index.json").is_file():
            make(part).write(folder, dtype=torch.float16, per_shard=PART, card=card)
    return folders


def solved(run: Path, parts: int) -> list[Path]:
    """The teacher's trajectories."""
    return written(run / TRAJECTORIES, parts, trajectories, {"teacher": TEACHER, "guidance": GUIDANCE})


def batches(folders: Sequence[Path], times: Sequence[float], size: int) -> Batches:
    """Batches of the states at these times; of one time, as data."""
    data = Stored(*folders, conditions=Requests(), times=times)

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        read = {"x": batch["states"][:, 0]} if len(times) == 1 else {"states": batch["states"]}
        return {**read, "cond": batch["cond"]}

    return Batches(data, size, transform=transform)


def four() -> Any:
    """The network of the teacher, to become the student of four steps."""
    return copy.deepcopy(load(TEACHER).denoiser).train().requires_grad_()


def make_segments(out: Path, steps: int = 2600, batch: int = 32, parts: int = 8) -> Trainer:
    """Train ``emoji-latent-4-segments``: the guided teacher's moves over four segments, each in one call."""
    return Trainer(
        Segments(four(), TIMES[::2], read="native"), batches(solved(out.parent, parts), TIMES[::2], batch), steps=steps, out=out,
        lr=3e-4, betas=(0.9, 0.99), warmup=100, decay="cosine", ema=0.998, clip=1.0, save_every=100, log_every=25,
        config={"model": "emoji-latent-4-segments", "batch": batch, "parts": parts},
    )  # fmt: skip


def make_guided(out: Path, steps: int = 2000, batch: int = 32, parts: int = 20) -> Trainer:
    """Train ``emoji-latent-4-guided``: two guided steps of the teacher in one call, from fresh noise on the teacher's samples."""
    objective = Segments(four(), TIMES[::2], load(TEACHER).guided(GUIDANCE), substeps=2, read="native")
    return Trainer(
        objective, batches(solved(out.parent, parts), (0.0,), batch), steps=steps, out=out, lr=2e-4,
        betas=(0.9, 0.99), warmup=100, decay="cosine", ema=0.998, clip=1.0, save_every=100, log_every=25,
        config={"model": GUIDED, "batch": batch, "parts": parts},
    )  # fmt: skip


def make_four(out: Path, steps: int = 700, batch: int = 32, parts: int = 20) -> Trainer:
    """Train ``emoji-latent-4`` from that: its own four steps against the teacher's samples, in codes and in looks."""
    student = learnt(make_guided, out.parent / GUIDED).train().requires_grad_()
    objective = Unrolled(student, TIMES[::2], last=2, looks=Looks(), seen=SEEN)
    return Trainer(
        objective, batches(solved(out.parent, parts), (1.0, 0.0), batch), steps=steps, out=out, lr=3e-5,
        betas=(0.9, 0.99), warmup=50, decay="cosine", ema=0.99, clip=1.0, save_every=100, log_every=25,
        config={"model": "emoji-latent-4", "batch": batch, "parts": parts},
    )  # fmt: skip


def learnt(make: Callable[[Path], Trainer], run: Path) -> Any:
    """The averaged student of another training."""
    trainer = make(run)
    trainer.load()
    return trainer.averaged()["student"]


class Looks(nn.Module):
    """How unlike two codes look: the perceptual distance of their pictures to ``emoji-encoder``, (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.codec, self.encoder = load(TEACHER).codec, load_encoder("emoji-encoder")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return perceptual_distance(self.encoder, *(F.avg_pool2d(self.codec.decode(z), 2) for z in (a, b)))  # type: ignore[arg-type]


def pairs(run: Path, parts: int, more: int) -> list[Path]:
    """Noise and samples: of the teacher, and of the student of segments."""
    first = run / SEGMENTS
    card = {"teacher": SEGMENTS, "guidance": 1.0}
    return [*solved(run, parts), *written(run / "emoji-latent-4-pairs", more, lambda part: further(part, first), card)]


def make_one(out: Path, steps: int = 1500, batch: int = 32, parts: int = 8, more: int = 12) -> Trainer:
    """Train ``emoji-latent-1`` from the student of segments: samples from their noise, in codes and in looks."""
    student = learnt(make_segments, out.parent / SEGMENTS).train().requires_grad_()
    objective = Segments(student, (1.0, 0.0), read="native", looks=Looks(), seen=SEEN)
    return Trainer(
        objective, batches(pairs(out.parent, parts, more), (1.0, 0.0), batch), steps=steps, out=out, lr=3e-4,
        betas=(0.9, 0.99), warmup=100, decay="cosine", ema=0.998, clip=1.0, save_every=100, log_every=25,
        config={"model": "emoji-latent-1", "batch": batch, "parts": parts, "more": more},
    )  # fmt: skip


MAKERS: dict[str, Callable[..., Trainer]] = {
    SEGMENTS: make_segments,
    GUIDED: make_guided,
    "emoji-latent-4": make_four,
    "emoji-latent-1": make_one,
}
BEGINS = {"emoji-latent-4": GUIDED, "emoji-latent-1": SEGMENTS}  # the training whose student they start from
METHODS = {
    SEGMENTS: "one step a segment of the teacher's trajectories",
    GUIDED: "two guided DDIM steps of the teacher in one call, from fresh noise on the teacher's samples",
    "emoji-latent-4": f"{GUIDED}, then its own four steps against the teacher's samples, with a perceptual distance",
    "emoji-latent-1": f"matched pairs of the teacher and of {SEGMENTS}, with a perceptual distance",
}


def bundle(student: Any, facts: Mapping[str, Any], name: str) -> Pipeline:
    """The student as a pipeline: the teacher's codec and conditions, its own times, guidance inside."""
    teacher = load(TEACHER)
    times = (1.0, 0.0) if name == "emoji-latent-1" else TIMES[::2]
    card = {
        **facts,
        "teacher": {"model": TEACHER, "guidance": GUIDANCE, "calls a trajectory": len(TIMES) - 1},
        "method": METHODS[name],
    }
    return Pipeline(
        student, teacher.codec, teacher.conditioner, teacher.size, solver="ddim", grid=f"piecewise(times={times})",
        steps=len(times) - 1, guidance=1.0, card=card,
    )  # fmt: skip
