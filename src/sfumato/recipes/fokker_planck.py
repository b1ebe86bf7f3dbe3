"""The gap between ODE and SDE samples of one model, and what a penalty on the Fokker-Planck residual does to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import sfumato.analysis as analysis
from sfumato import core, oracles
from sfumato.evaluation.metrics import sliced_wasserstein
from sfumato.objectives import Denoising, Uniform
from sfumato.objectives.fokker_planck import FokkerPlanck
from sfumato.processes import VP
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._small import digits, learn

LAW, SIDE, WEIGHT, CALLS = VP(), 4.5, 1e-3, 100  # the weight was chosen on seed 100 among 1e-4, 1e-3, 5e-3 and 1e-2
CITATION = """@article{deveney2023closing,
  title = {Closing the ODE-SDE gap in score-based diffusion models through the Fokker-Planck equation},
  author = {Deveney, Teo and Stanczuk, Jan and Kreusser, Lisa Maria and Budd, Chris and Sch{\\"o}nlieb, Carola-Bibiane},
  journal = {arXiv:2311.15996}, year = {2023}
}"""


class Perceptron(nn.Module):
    """The published network, (x, t) to one number, with smooth activations."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        sizes = (3, width, width, width)
        hidden = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.layers(torch.cat([x, label[:, None]], -1))


def points(name: str, n: int, seed: int) -> Tensor:
    """Two rings (radii 1.3 and 2.8), nine blobs, a checkerboard of eight squares, or digits in two principal components."""
    rng = torch.Generator().manual_seed(core.mix(seed, n))
    u, normal = torch.rand(n, 2, generator=rng), torch.randn(n, 2, generator=rng)
    cell = torch.randint(72, (n,), generator=rng)
    if name == "rings":
        radius, angle = torch.where(u[:, 0] < 0.5, 1.3, 2.8) + 0.2 * normal[:, 0], 2 * math.pi * u[:, 1]
        x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    elif name == "blobs":
        x = 2.0 * torch.stack([cell % 3, cell // 3 % 3], 1) - 2 + 0.25 * normal
    elif name == "checkerboard":
        row = cell % 8 // 2
        x = 1.5 * (torch.stack([2 * (cell % 2) + row % 2, row], 1) + u) - 3
    else:
        centred = digits().x - digits().x.mean(0)
        plane = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
        x = (plane / plane.std(0))[torch.randint(len(plane), (n,), generator=rng)]
    return x.clamp(-SIDE, SIDE)  # moves nothing but a ring's point in a million


def taught(name: str, weight: float, seed: int) -> Any:
    """The potential of one set after 400 steps, with the penalty of this weight or without one."""
    torch.manual_seed(core.mix(seed, 1))
    potential = analysis.Potential(Perceptron(), LAW, reference=True)
    base = Denoising(potential, weighting="eps", dropout=0.0, times=Uniform(1e-3))
    objective = FokkerPlanck(base, weight, box=(-SIDE, SIDE), every=2) if weight else base
    return learn(objective, {"x": points(name, 8192, seed)}, seed, steps=400, lr=3e-3)


def distance(x: Tensor, y: Tensor) -> float:
    """Sliced Wasserstein distance of two samples (n, 2)."""
    return sliced_wasserstein(x, y, projections=48, groups=2).value


def compared(name: str, weight: float, seed: int, n: int = 30_000) -> dict[str, Any]:
    """Gap, mean squared residual and distances to fresh data of one training."""
    model = taught(name, weight, seed)
    table = analysis.Tabulated(model, 2 * SIDE)
    gap = analysis.ode_sde_gap(table, (n, 2), steps=CALLS, parts=1, distance=distance, seed=core.mix(seed, 2), halves=2)
    rng = torch.Generator().manual_seed(core.mix(seed, 3))
    x, t = SIDE * (2 * torch.rand(2000, 2, generator=rng) - 1), 1e-3 + 0.999 * torch.rand(2000, generator=rng)
    data = points(name, n, core.mix(seed, 4))
    return {
        "gap": gap, "residual": float(analysis.log_density_residual(model, x, t).square().mean()), "data": data, "model": model, "table": table,
        "ode": distance(gap.ode, data), "sde": distance(gap.sde, data),
    }  # fmt: skip


def picture(found: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> Any:
    """Data, ODE and SDE samples without and with the penalty, and the sizes of the residuals in the plane at t = 0.3."""
    with plots.style():
        made = plots.figure(11.5, 1.75 * len(found) + 0.3)
        grid = made.subplots(len(found), 7)
        axis = torch.linspace(-SIDE, SIDE, 60)
        plane = torch.cartesian_prod(axis, axis)
        for row, (name, (plain, ours)) in zip(grid, found.items(), strict=True):
            clouds = (plain["data"], plain["gap"].ode, plain["gap"].sde, ours["gap"].ode, ours["gap"].sde)
            titles = ("data", "ODE, plain", "SDE, plain", "ODE, penalty", "SDE, penalty")
            colours = (plots.INK, plots.ACCENT, plots.ACCENT, plots.SECOND, plots.SECOND)
            for ax, x, title, colour in zip(row, clouds, titles, colours, strict=False):
                ax.scatter(*x[:2500].T, s=1.2, lw=0, color=colour, alpha=0.7)
                ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE))
                ax.set_title(title if ax in grid[0] else "")
            sizes = [
                analysis.log_density_residual(arm["model"], plane, 0.3).abs().reshape(60, 60).T for arm in (plain, ours)
            ]
            for ax, size, title in zip(row[5:], sizes, ("|R|, plain", "|R|, penalty"), strict=True):
                ax.imshow(size, origin="lower", cmap="magma_r", vmin=0, vmax=float(sizes[0].quantile(0.95)))
                ax.set(xticks=[], yticks=[], title=title if ax in grid[0] else "")
            row[0].set_ylabel(name, fontweight="bold")
            row[1].set_xlabel(f"gap {plain['gap'].distance:.3f}", color=plots.ACCENT)
            row[3].set_xlabel(f"gap {ours['gap'].distance:.3f}", color=plots.SECOND)
        return plots.image(made)


@recipe(
    "fokker-planck",
    kind="objective",
    claim="Penalising the residual of the Fokker-Planck equation of a learned log density closes the gap between what the "
    "probability flow and the reverse equation sample from it.",
    baseline="the same potential taught by denoising alone: same data, steps and seed",
    citation=CITATION,
)
def fokker_planck(seed: int) -> Findings:
    """Flow and reverse equation of a learned log density, with and without the penalty on its residual."""
    names = ("rings", "blobs", "checkerboard", "digits in 2-D")
    found = {name: (compared(name, 0.0, seed), compared(name, WEIGHT, seed)) for name in names}
    closed = sum(ours["gap"].distance < 0.7 * plain["gap"].distance for plain, ours in found.values())
    fell = min(plain["residual"] / ours["residual"] for plain, ours in found.values())
    plain = found["rings"][0]
    finer = analysis.ode_sde_gap(  # the same starts and Brownian paths: what differs is what the steps do
        plain["table"], (30_000, 2), steps=2 * CALLS, parts=1, distance=distance, seed=core.mix(seed, 2)
    )
    exact = oracles.GaussianMixture([[-2.0, 0.0], [2.0, 1.0]], [0.3, 0.5]).denoiser(LAW)
    x = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rounding = float(analysis.score_residual(exact, x, torch.linspace(0.05, 1, 200)).abs().max())
    each = "; ".join(
        f"{name}: gap {a['gap'].distance:.3f} to {b['gap'].distance:.3f} (floor {a['gap'].floor:.3f}), ODE to data {a['ode']:.3f} to "
        f"{b['ode']:.3f}, SDE to data {a['sde']:.3f} to {b['sde']:.3f}" for name, (a, b) in found.items()
    )  # fmt: skip
    return Findings(
        [
            Check("sets of 4 whose gap is below 0.7 of the baseline's", closed, None, "ours >= 3"),
            Check("mean squared residual, baseline's over ours, least of 4 sets", fell, None, "ours >= 2"),
            Check(
                "gap of the baseline on rings with twice the steps",
                finer.raw,
                plain["gap"].raw,
                "0.9 * baseline <= ours <= 1.1 * baseline",
            ),
            Check("score residual of an exact denoiser, float64", rounding, None, "ours <= 1e-8"),
        ],
        nfe=CALLS,
        data="rings, blobs, checkerboard and scikit-learn digits in two principal components: 8,192 points learned, 30,000 fresh ones "
        "(digits: drawn from the same 1,797)",
        model="potentials of 5,000 parameters taught in this run for 400 steps",
        notes=f"Sliced Wasserstein distance, floor removed: exact assignment has a floor above these gaps at the counts that fit. "
        f"The models are early in training, where there is a gap: after 1,500 steps rings had none above the floor (seed 100). {each}. Twice "
        "the steps follow the same Brownian paths; of independent ones gaps differ by 0.005 whatever the steps. The residual falls mostly in its "
        "mean over x, the normalisation, which no sample feels (rings at t = 0.05: -7 without the penalty); its spread, which makes the gap, "
        "fell on rings from 0.31 to 0.20 at t = 0.4 and from 0.20 to 0.18 at t = 0.6, where the gap arises (seed 100, 800 steps). With the "
        "published clock, in which R is per unit of -log alpha, gaps were 0.57, 0.81 and 0.72 of the baseline's on rings, blobs and "
        "checkerboard, and after 800 steps on twice the batch with ten times that weight 0.80, 0.54, 0.59 and, on digits, 0.84 (seed 100).",
        picture=picture(found),
    )
