"""What the recipe of prompt-tailored pruning uses: the bundled latent model, its emoji with their names, and measures."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sfumato as sf
from sfumato.acceleration.pruning import materialize, structure
from sfumato.acceleration.routing import PromptRouter, Routed
from sfumato.acceleration.tailoring import PromptPruning
from sfumato.core import Context, mix
from sfumato.objectives.distill.imitation import Imitation
from sfumato.training import Trainer
from sfumato.training.data import Arrays, Batches
from sfumato.zoo import emoji

SIDE, BATCH, EXPERTS, TARGET = 16, 16, 4, 0.6
PRUNE, TUNE, KNOWN, DRAWN = 64, 30, 2048, 160


class Bed:
    """The bundled latent model, latents and conditions of trained and unseen emoji, and the measures of what is cut out of it."""

    def __init__(self, seed: int) -> None:
        self.seed, self.pipeline = seed, sf.load("emoji-latent")
        self.teacher = self.pipeline.denoiser.requires_grad_(False)
        self.train, self.unseen = (emoji.load(SIDE, split=split, skin_tones=False) for split in ("train", "unseen"))
        self.cond, self.told = (self._heard(split) for split in ("train", "unseen"))
        self.vectors = self.cond["vector"]
        self.some = torch.randperm(len(self.vectors), generator=torch.Generator().manual_seed(mix(seed, 1) % 10**9))[
            :KNOWN
        ]
        self.x, self.y = self._seen("train", self.some), self._seen("unseen")
        self.shape = tuple(self.x.shape[1:])
        self.structure = structure(self.teacher, self.shape, {k: v[:1] for k, v in self.cond.items()})

    def _heard(self, split: str) -> dict[str, Tensor]:
        """What the network reads of the emoji of a split."""
        items = self.train if split == "train" else self.unseen
        return self.pipeline.conditions(len(items), items.captions, vendor=[emoji.VENDORS[v] for v in items.vendor.tolist()])  # type: ignore[no-any-return]  # fmt: skip

    @torch.no_grad()
    def _seen(self, split: str, rows: Any = slice(None)) -> Tensor:
        """Latents of the emoji of a split, or of some of them."""
        images = emoji.load(self.pipeline.size[0], split=split, skin_tones=False).images[rows]
        return torch.cat([self.pipeline.codec.encode(part) for part in images.split(128)])

    def taught(
        self, objective: Any, steps: int, lr: float, stream: int, batch: int, ema: float = 0.9, more: Any = None
    ) -> Any:
        """The first player after so many steps on the training emoji."""
        told = {**self.cond, **({} if more is None else {"expert": more})}
        fields = {"x": self.x, **{name: value[self.some] for name, value in told.items()}}
        names = [name for name in fields if name != "x"]
        data = Batches(Arrays(fields), batch, mix(self.seed, stream), cond=names)
        trainer = Trainer(objective, data, steps=steps, lr=lr, warmup=10, decay="cosine", ema=ema, clip=1.0, seed=self.seed, cpu=True, progress=False)  # fmt: skip
        return next(iter(trainer.fit().values()))

    def router(self, experts: int, transport: bool = True) -> PromptRouter:
        """A router and codes learnt with the frozen teacher."""
        begun = PromptRouter(384, self.structure, experts, seed=mix(self.seed, 3) % 10**6)
        options: dict[str, Any] = {
            "target": TARGET,
            "warmup": PRUNE // 2,
            "transport": transport,
            "contrast": 100.0,
            "items": (4, 12),
        }
        options["begin"] = "prompts" if transport else "book"
        return self.taught(PromptPruning(self.teacher, begun, **options), PRUNE, 0.02, 4, 512, ema=0)  # type: ignore[no-any-return]

    def tuned(self, gates: Tensor, router: PromptRouter) -> Any:
        """Experts cut out by gates (N, size), each taught on the prompts the router sends it to say what the teacher says."""
        cut = [copy.deepcopy(materialize(self.teacher, self.structure, g)).requires_grad_() for g in gates]
        routed, index = Routed(cut, router.requires_grad_(False)), router.assign(self.vectors)
        objective = Imitation(routed, self.teacher, data=0.02, private=["expert"])
        return self.taught(objective, TUNE, 1e-3, 5, BATCH, more=index).eval().requires_grad_(False)

    @torch.no_grad()
    def loss(self, denoiser: Any, repeat: int = 4) -> float:
        """Mean squared error of the prediction on unseen emoji, at the same times and noise for everyone."""
        ctx, n = Context.of(len(self.y), mix(self.seed, 6), cond=self.told), len(self.y)
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
        """uint8 emoji of unseen names, (DRAWN, 3, H, W) as large as the model makes them."""
        cond = {k: v[:DRAWN] for k, v in self.told.items()}
        told = denoiser.told(cond) if isinstance(denoiser, Routed) else cond
        x = sf.sample(
            sf.guidance.cfg(2.0)(denoiser),
            solver="ddim",
            steps=10,
            shape=(DRAWN, *self.shape),
            cond=told,
            seed=mix(self.seed, 7),
        )
        return torch.cat([self.pipeline.codec.images(part) for part in x.split(64)])


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


def small(images: Tensor) -> Tensor:
    """uint8 pictures of SIDE pixels, each the mean of a square."""
    return F.avg_pool2d(images.float(), images.shape[-1] // SIDE).round().to(torch.uint8)
