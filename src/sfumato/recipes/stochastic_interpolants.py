"""Stochastic interpolants: exact fields in the plane and in 16 dimensions, learned ones from handwritten 3 to 8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato import core, oracles
from sfumato.denoisers.interpolants import GaussianMixtureInterpolant, Interpolated
from sfumato.evaluation import PCAFeatures
from sfumato.evaluation.likelihood import kl_of_errors, random_fields
from sfumato.evaluation.metrics import frechet_distance, sliced_wasserstein
from sfumato.networks import MLP
from sfumato.objectives.interpolant import InterpolantMatching
from sfumato.processes import Interpolant
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._small import digits, learn, pictures
from sfumato.solvers.interpolant import InterpolantSDE, ends

EPSILONS, NOISES = (0.0, 0.5, 2.0), (0.3, 1.0, 3.0)
FLOW = InterpolantSDE(0.0)
CITATION = """@article{albergo2023stochastic,
  title = {Stochastic Interpolants: A Unifying Framework for Flows and Diffusions},
  author = {Albergo, Michael S. and Boffi, Nicholas M. and Vanden-Eijnden, Eric},
  journal = {arXiv:2303.08797}, year = {2023}
}"""


def run(denoiser: Any, solver: Any, x: Tensor, seed: int = 0, steps: int = 50, **options: Any) -> Tensor:
    """A run of an interpolant from x."""
    return core.sample(denoiser, solver, ends(), steps, x=x, seed=seed, **options)


def two_mixtures(d: int, seed: int, modes: int = 5) -> GaussianMixtureInterpolant:
    """The exact interpolant between two Gaussian mixtures in d dimensions, drawn by the seed."""
    draw = torch.Generator().manual_seed(seed)
    means, stds = (torch.rand(2, modes, d, dtype=torch.float64, generator=draw) for _ in range(2))
    return GaussianMixtureInterpolant(
        *(oracles.GaussianMixture(5 * m - 2.5, 0.3 + 0.3 * s) for m, s in zip(means, stds, strict=True))
    )


def exact(d: int, seed: int, n: int = 250, groups: int = 40) -> tuple[list[float], float]:
    """Sliced Wasserstein distance to fresh target samples for each epsilon, and of two target sets: means over groups."""
    mixtures = two_mixtures(d, seed)
    target, other = (mixtures.data.sample(n * groups, seed=core.mix(seed, k)) for k in (1, 2))
    x1 = mixtures.base.sample(n * groups, seed=core.mix(seed, 3))

    def distance(x: Tensor) -> float:
        pairs = zip(x.split(n), target.split(n), strict=True)
        return sum(sliced_wasserstein(a, b, projections=64).value for a, b in pairs) / groups

    denoiser = mixtures.denoiser(Interpolant())
    return [distance(run(denoiser, InterpolantSDE(e, 0.0), x1, seed, 40)) for e in EPSILONS], distance(other)


def learned(kinds: str, law: Interpolant, pairs: dict[str, Tensor], seed: int) -> Interpolated:
    """An interpolant of these kinds of heads, taught in this run."""
    torch.manual_seed(seed)
    net = MLP(64, 64 * len(kinds.split("+")), width=192)
    return learn(InterpolantMatching(Interpolated({kinds: net}, law), antithetic=False), pairs, seed, steps=800)


def picture(kl: Tensor, bound: Tensor, ways: Any, starts: Tensor, seed: int) -> Any:
    """Paths of the exact fields, the bound, and what becomes of 24 threes."""
    with plots.style():
        made = plots.figure(11, 5.5)
        made.get_layout_engine().set(wspace=0.06)
        axes, sheets = made.subplots(2, 4, height_ratios=(1.4, 1))
        mixtures = two_mixtures(2, seed)
        x1, denoiser = mixtures.base.sample(200, seed), mixtures.denoiser(Interpolant())
        for ax, epsilon in zip(axes, EPSILONS, strict=False):
            steps: Any = [st.x for st in core.trajectory(denoiser, InterpolantSDE(epsilon, 0.0), ends(), 60, x=x1)]
            ax.plot(*torch.stack(steps)[:, :25].permute(2, 0, 1), color="#aab4bd", lw=0.6, zorder=0)
            ax.scatter(*x1.T, s=6, color=plots.SECOND, label="start", lw=0)
            ax.scatter(*steps[-1].T, s=6, color=plots.ACCENT, label="end", lw=0)
            ax.set(title=f"exact fields, epsilon = {epsilon:g}", xticks=[], yticks=[], xlim=(-4, 4), ylim=(-4, 4))
            ax.spines[:].set_visible(False)
        axes[0].legend(loc="upper left", handletextpad=0, markerscale=2, borderpad=0)
        axes[3].scatter(bound, kl, s=16, color=plots.ACCENT, lw=0)
        axes[3].axline((0, 0), slope=1, color=plots.INK, lw=0.8, ls="--")
        top = 1.08 * float(bound.max())
        axes[3].set(title="20 wrong fields", xlabel="bound, nats", ylabel="KL, nats", xlim=(0, top), ylim=(0, top))
        for ax in axes:
            ax.set_box_aspect(1)
        for ax, (title, way) in zip(sheets, ways.items(), strict=True):
            plots.show(ax, 255 - pictures(way(starts[:24])), 6, title=title)
        return plots.image(made)


@recipe(
    "stochastic-interpolants",
    kind="process",
    claim="With exact fields samples have the same law for every noise level of sampling, and errors of the fields cost at "
    "most the stated divergence; with learned fields from 3 to 8 sampling with noise is at least as good as the flow.",
    baseline="two sets of target samples; the bound; the flow of the same networks, and the same network taught without "
    "noise (gamma = 0, flow matching)",
    citation=CITATION,
)
def stochastic_interpolants(seed: int) -> Findings:
    """Laws of samples with exact and learned fields at several noise levels, beside the flow."""
    laws = {d: exact(d, seed) for d in (2, 16)}
    fields = random_fields(20, 0.7, seed=core.mix(seed, 4)), random_fields(20, 0.7, seed=core.mix(seed, 5))
    kl, bound, _ = kl_of_errors(two_mixtures(2, seed), Interpolant(), fields, 0.5, half_width=4.5, cells=48, steps=700)

    images, labels, unseen = digits()
    threes, eights = ((images[(labels == k) & ~unseen], images[(labels == k) & unseen]) for k in (3, 8))
    chosen = torch.randint(10**9, (2, 6000), generator=torch.Generator().manual_seed(seed))
    pairs = {"x": eights[0][chosen[0] % len(eights[0])], "x1": threes[0][chosen[1] % len(threes[0])]}
    ours = learned("flow+eps", Interpolant(), pairs, seed)
    plain = learned("flow", Interpolant("linear", "zero"), pairs, seed)
    features = PCAFeatures(pictures(eights[0]), 8)

    def distance(denoiser: Any, solver: Any, part: int) -> float:
        """Mean over noises of the distance between where the threes of a part end and the eights of that part."""
        ways = [run(denoiser, solver, threes[part], core.mix(seed, k)) for k in range(6 if solver.stochastic else 1)]
        reference = features(pictures(eights[part]))
        return sum(frechet_distance(features(pictures(y)), reference).value for y in ways) / len(ways)

    best = min((InterpolantSDE(e) for e in NOISES), key=lambda solver: distance(ours, solver, 0))
    noisy, flow, matching = distance(ours, best, 1), distance(ours, FLOW, 1), distance(plain, FLOW, 1)
    code = run(ours, FLOW, eights[1], start=0.0, stop=1.0)
    round_trip = float((run(ours, FLOW, code) - eights[1]).norm() / eights[1].norm())
    ways = {
        "24 unseen threes": lambda x: x,
        "flow matching (gamma = 0)": lambda x: run(plain, FLOW, x),
        "interpolant, flow": lambda x: run(ours, FLOW, x),
        f"interpolant, epsilon = {best.epsilon:g} gamma": lambda x: run(ours, best, x),
    }
    return Findings(
        [
            *(
                Check(f"sliced W2 in {d}-D, worst epsilon", max(w), floor, "ours <= 1.25 * baseline")
                for d, (w, floor) in laws.items()
            ),
            Check("KL of the worst of 20 errors over its bound", float((kl / bound).max()), None, "ours <= 1"),
            Check("Fréchet distance 3 to 8, against the flow of the same networks", noisy, flow, "ours <= baseline"),
            Check("Fréchet distance 3 to 8, against flow matching", noisy, matching, "ours <= baseline"),
            Check("round trip of the flow, relative error", round_trip, None, "ours <= 0.01"),
        ],
        nfe=99,
        data=f"two mixtures of 5 modes in 2-D and 16-D; scikit-learn digits: {len(threes[0])} threes and {len(eights[0])} eights "
        f"learned, {len(threes[1])} and {len(eights[1])} unseen, every third item of the table",
        model="exact fields; MLPs of 0.5 million parameters taught in this run for 800 steps",
        notes="Sliced W2 is the mean over 40 groups of 250 samples: with 12 of 500 the check in 2-D failed on seed 0 (ratio 1.29) by chance, as 96 groups on seeds 100 and 101 say (at most 1.11). "
        f"Distances in 8 principal components of the pixels. Noise epsilon = {best.epsilon:g} gamma, chosen on the learned digits. "
        f"KL of the errors {float(kl.min()):.2g} to {float(kl.max()):.2g} nats.",
        picture=picture(kl, bound, ways, threes[1], seed),
    )
