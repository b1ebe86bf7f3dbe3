"""What the recipes of distillation share: a class-conditional teacher of digits, its pairs, and a distance none was fitted to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from sfumato import core, grids, solvers
from sfumato.core import Context, mix
from sfumato.denoisers import parametrized
from sfumato.evaluation.metrics import frechet_distance
from sfumato.guidance import cfg
from sfumato.networks import MLP
from sfumato.objectives import Denoising
from sfumato.recipes._small import Judge, digits, learn, pictures
from sfumato.training.trajectories import Trajectories

GREY = "#97a3ad"
DATA = "scikit-learn digits (8 x 8 in [-1, 1]): 899 learned, 449 for the classifier whose features measure, 449 for the reference"


class Skip(torch.nn.Module):
    """x + net(x): an eps network that begins where pure noise is answered rightly, as a U-Net's outer connection lets it."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.accepts = net, net.accepts

    def forward(self, x: Tensor, label: Tensor, **cond: Any) -> Tensor:
        return x + self.net(x, label, **cond)


class Bed:
    """Digits in three parts by place in the table: even ones are learned, of the odd ones half teach the judge, half are seen by none."""

    def __init__(self, seed: int) -> None:
        x, labels, _ = digits()
        place = torch.arange(len(x)) % 4
        self.seed, self.x, self.labels = seed, x[place % 2 == 0], labels[place % 2 == 0]
        self.judge = Judge(x[place == 1], labels[place == 1], mix(seed, 91) % 10**6)
        self.unseen, self.unseen_labels = x[place == 3], labels[place == 3]

    def distance(self, x: Tensor, change: Any = lambda x: x) -> float:
        """Fréchet distance of samples to the unseen digits (changed so) in the judge's 32 features (of the change undone)."""
        reference = self.judge.features(pictures(self.unseen))
        return frechet_distance(self.judge.features(pictures(change(x))).double(), reference.double()).value

    def teacher(self, process: Any, predicts: str, steps: int = 2000, x: Tensor | None = None, **network: Any) -> Any:
        """A class-conditional network taught to denoise, in this run."""
        torch.manual_seed(mix(self.seed, 1) % 10**6)
        net = MLP(64, embeddings={"y": 10}, **{"width": 192, "depth": 3, **network})
        built = Skip(net) if predicts == "eps" else net
        objective = Denoising(parametrized(built, process, predicts, null={"y": 10}))
        fields = {"x": self.x if x is None else x, "y": self.labels}
        return learn(objective, fields, mix(self.seed, 2), steps=steps, size=128, cond=("y",)).requires_grad_(False)

    def tuned(self, teacher: Any, x: Tensor, steps: int = 500, ends: bool = False) -> Any:
        """The teacher trained further on other data, of the same labels: all of it, or its first and last layer only."""
        learner = student(teacher)
        if ends:
            learner.requires_grad_(False)
            for layer in (learner.net.input, learner.net.output):
                layer.requires_grad_()
        rate = 1e-2 if ends else 1e-3
        fields = {"x": x, "y": self.labels}
        return learn(Denoising(learner), fields, mix(self.seed, 3), steps=steps, size=128, lr=rate, cond=("y",))

    def pairs(self, teacher: Any, n: int, scale: float = 1.0, steps: int = 12, keep: Any = "ends") -> dict[str, Tensor]:
        """Matched noise and samples of the guided teacher: 'states' (n, K, 64) and labels 'y'."""
        guided = cfg(scale)(teacher) if scale != 1 else teacher
        made = Trajectories(
            guided, n, (64,), conditions=lambda rows: {"y": torch.tensor(rows) % 10}, solver="arc", steps=steps, keep=keep,
            seed=mix(self.seed, 4),
        )  # fmt: skip
        return {"states": made.batch(range(n))["states"], "y": torch.arange(n) % 10}

    def samples(
        self, denoiser: Any, steps: int, scale: float = 1.0, n: int = 1200, solver: str = "ddim", start: float = 1.0, grid: Any = "uniform",
        more: Any = None,
    ) -> Tensor:  # fmt: skip
        """Digits of all classes in turn, from noise that no pair began with."""
        guided = cfg(scale)(denoiser) if scale != 1 else denoiser
        ctx = Context.of(n, mix(self.seed, 5), cond={"y": torch.arange(n) % 10, **(more or {})})
        noise = denoiser.process.coef(start).sigma * ctx.rng.normal(torch.empty(n, 64))  # type: ignore[union-attr]
        chosen: Any = grids.registry.make(grid) if isinstance(grid, str) else grid
        return core.sample(guided, solvers.registry.make(solver), chosen, steps, x=noise, start=start, ctx=ctx)  # type: ignore[no-any-return]


def student(teacher: Any) -> Any:
    """A copy of the teacher's network to train."""
    return copy.deepcopy(teacher).train().requires_grad_()


@torch.no_grad()
def trace(denoiser: Any, x: Tensor, cond: Any, steps: int = 20, start: float = 1.0) -> tuple[float, float]:
    """(V, S) of DDIM trajectories: the variance over times of eps (first-orderness), and |dx/dt - (x_1 - x_0)|^2 (straightness).

    Means over items and elements; both are 0 where one step is exact and the path is straight.
    """
    ctx = Context.of(len(x), 0, cond=cond)
    run: Any = list(
        core.trajectory(denoiser, solvers.get("ddim"), grids.get("uniform"), steps, x=x, start=start, ctx=ctx)
    )
    states = torch.stack([st.x for st in run])
    noise = torch.stack([denoiser(st.x, st.t, ctx).view("eps") for st in run[:-1]])
    times = torch.tensor([st.t for st in run])
    speed = (states[:-1] - states[1:]) / (times[:-1] - times[1:])[:, None, None]
    whole = (states[0] - states[-1]) / (times[0] - times[-1])
    return float(noise.var(0, correction=0).mean()), float((speed - whole).square().mean())
