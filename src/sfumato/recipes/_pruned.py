"""What the recipe of prompt-tailored pruning uses: small emoji with their names, a transformer taught on them, and measures."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor

import sfumato as sf
from sfumato.acceleration.pruning import materialize, structure
from sfumato.acceleration.routing import PromptRouter, Routed
from sfumato.acceleration.tailoring import PromptPruning
from sfumato.core import Context, mix
from sfumato.denoisers import parametrized
from sfumato.networks import DiT
from sfumato.objectives import Denoising
from sfumato.processes import Flow
from sfumato.training import Trainer
from sfumato.training.data import Arrays, Batches
from sfumato.zoo import emoji

SIDE, BATCH, EXPERTS, TARGET = 16, 64, 4, 0.6
TEACHER, PRUNE, TUNE, DRAWN = 320, 120, 60, 160
SHAPE = (3, SIDE, SIDE)


class Bed:
    """Emoji of 16 pixels with the sentence vectors of their names, a DiT taught on them here, and the measures."""

    def __init__(self, seed: int) -> None:
        conditions = sf.load("emoji-pixel").conditions
        self.seed, self.train = seed, emoji.load(SIDE, split="train", skin_tones=False)
        self.unseen = emoji.load(SIDE, split="unseen", skin_tones=False)
        self.vectors, self.told = (conditions(len(e), e.captions)["vector"] for e in (self.train, self.unseen))
        self.x, self.y = (e.images.float() / 127.5 - 1 for e in (self.train, self.unseen))
        torch.manual_seed(mix(seed, 1) % 10**6)
        net = DiT(3, size=SIDE, patch=4, width=96, depth=6, heads=6, modulation="shared", vector_channels=384)
        self.teacher = self.taught(Denoising(parametrized(net, Flow(), "flow", null={"vector": 0.0})), TEACHER, 2e-3, 2)
        self.teacher.eval().requires_grad_(False)
        self.structure = structure(self.teacher, SHAPE)

    def taught(self, objective: Any, steps: int, lr: float, stream: int, ema: float = 0.97, more: Any = None) -> Any:
        """The first player after so many steps on the training emoji."""
        fields = {"x": self.x, "vector": self.vectors, **({} if more is None else {"expert": more})}
        names = [name for name in fields if name != "x"]
        data = Batches(Arrays(fields), BATCH, mix(self.seed, stream), cond=names)
        trainer = Trainer(objective, data, steps=steps, lr=lr, warmup=20, decay="cosine", ema=ema, clip=1.0, seed=self.seed, cpu=True, progress=False)  # fmt: skip
        return next(iter(trainer.fit().values()))

    def router(self, experts: int, transport: bool = True) -> PromptRouter:
        """A router and codes learnt with the frozen teacher."""
        begun = PromptRouter(384, self.structure, experts, seed=mix(self.seed, 3) % 10**6)
        options: dict[str, Any] = {"target": TARGET, "warmup": 20, "transport": transport}
        return self.taught(PromptPruning(self.teacher, begun, **options), PRUNE, 0.03, 4, ema=0)  # type: ignore[no-any-return]

    def tuned(self, gates: Tensor, router: PromptRouter) -> Any:
        """Experts cut out by gates (N, size), each taught on the prompts the router sends it."""
        cut = [copy.deepcopy(materialize(self.teacher, self.structure, g)).requires_grad_() for g in gates]
        routed, index = Routed(cut, router.requires_grad_(False)), router.assign(self.vectors)
        return self.taught(Denoising(routed), TUNE, 1e-3, 5, more=index).eval().requires_grad_(False)

    @torch.no_grad()
    def loss(self, denoiser: Any, repeat: int = 4) -> float:
        """Mean squared error of the prediction on unseen emoji, at the same times and noise for everyone."""
        ctx, n = Context.of(len(self.y), mix(self.seed, 6), cond={"vector": self.told}), len(self.y)
        total = 0.0
        for k in range(repeat):
            t = (torch.arange(n, dtype=torch.float64) + (k + 0.5) / repeat) / n
            x, noise = denoiser.process.corrupt(self.y, t, ctx)
            post = denoiser(x, t, ctx)
            total += (
                float((post.native - denoiser.process.target(post.kind, self.y, noise, t)).square().mean()) / repeat
            )
        return total

    @torch.no_grad()
    def drawn(self, denoiser: Any) -> Tensor:
        """uint8 emoji of unseen names."""
        cond = {"vector": self.told[:DRAWN]}
        told = denoiser.told(cond) if isinstance(denoiser, Routed) else cond
        x = sf.sample(
            sf.guidance.cfg(2.0)(denoiser),
            solver="ddim",
            steps=10,
            shape=(DRAWN, *SHAPE),
            cond=told,
            seed=mix(self.seed, 7),
        )
        return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def alike(gates: Tensor, bed: Bed, seed: int) -> Tensor:
    """Random gates of the same costs, a row each."""
    draw, shape = torch.Generator().manual_seed(seed), bed.structure
    made = []
    for cost in shape.cost(gates).tolist():
        new = torch.ones(shape.size)
        for i in torch.randperm(shape.size, generator=draw).tolist():
            new[i] = 0
            blocks, _ = shape.split(new)
            if float(shape.cost(new)) < cost - 0.005 or not all(bool(p.any()) for b in blocks for p in b.values()):
                new[i] = 1
        made.append(new)
    return torch.stack(made)


def seconds(runs: dict[str, Any], times: int = 7) -> dict[str, float]:
    """The least processor seconds of each run, in turns: what others do on the machine is left out."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            began = time.process_time()
            run()
            taken[name].append(time.process_time() - began)
    return {name: min(values) for name, values in taken.items()}


def entropy(index: Tensor) -> float:
    """Of the use of the experts, over its greatest."""
    p = torch.bincount(index, minlength=EXPERTS).double() / len(index)
    return float(-(p * p.clamp(min=1e-12).log()).sum() / math.log(EXPERTS))
