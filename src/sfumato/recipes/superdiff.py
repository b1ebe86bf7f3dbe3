"""SuperDiff: exact mixtures in the plane, two networks taught on five digits each, and pairs of prompts for emoji."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato import grids, load, parametrized, solvers
from sfumato.core import Context, mix, sample
from sfumato.evaluation.metrics import frechet_distance
from sfumato.guidance import cfg, interpolated, log_densities, superpose, superposition
from sfumato.networks import MLP
from sfumato.objectives import Denoising
from sfumato.oracles import GaussianMixture
from sfumato.processes import VP
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._emoji import Judge as Judges
from sfumato.recipes._pairs import PROMPTS, pairs, told
from sfumato.recipes._small import Judge, digits, learn, pictures

LAW, STOP, SIDES = VP(), 1e-3, (-1.5, 1.5)
TEMPERATURE = 5.0  # of OR between learned networks, chosen on seeds 100, 102 and 103; exact ones have 1
CITATION = """@inproceedings{skreta2025superposition,
  title = {The Superposition of Diffusion Models Using the It{\\^o} Density Estimator},
  author = {Skreta, Marta and Atanackovic, Lazar and Bose, Avishek Joey and Tong, Alexander and Neklyudov, Kirill},
  booktitle = {International Conference on Learning Representations}, year = {2025}
}"""


def run(denoiser: Any, shape: tuple[int, ...], steps: int, seed: int, stop: float = 0.0, **fields: Any) -> Any:
    """(the samples, their context): DDPM steps on the arctan grid."""
    ctx = Context.of(shape[0], seed, **fields)
    return sample(denoiser, solvers.get("ddpm"), grids.get("arctan"), steps, shape=shape, ctx=ctx, stop=stop), ctx


def plane(seed: int) -> dict[str, Any]:
    """Two mixtures of two modes, left and right: errors of the densities, their gaps, and where samples lie."""
    laws = [GaussianMixture([[x, 1.5], [x, -1.5]], [0.4, 0.4]) for x in SIDES]
    ends = LAW.coef(1.0), LAW.coef(STOP)

    def go(steps: int, n: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        both = superpose(*(law.denoiser(LAW) for law in laws), **options)
        x, ctx = run(both, (n, 2), steps, seed, STOP, dtype=torch.float64)
        start = ends[0].sigma * Context.of(n, seed).rng.normal(x)  # type: ignore[union-attr]
        logs = [[_marginal(law, v, c) for law in laws] for v, c in ((start, ends[0]), (x, ends[1]))]
        return x, log_densities(ctx), torch.stack(logs[1], 1) - torch.stack(logs[0], 1)

    errors = [float((found - true).abs().median()) for _, found, true in (go(n, 256) for n in (250, 1000))]
    x = {"or": go(100, 1000)[0], "averaging": go(100, 1000, temperature=0.0)[0], "and": go(100, 1000, mode="and")[0]}
    gaps = {k: float((laws[0].log_prob(v) - laws[1].log_prob(v)).abs().median()) for k, v in x.items()}
    return {"errors": errors, "x": x, "gaps": gaps}


def _marginal(law: GaussianMixture, x: Tensor, c: Any) -> Tensor:
    stds = (c.alpha**2 * law.variances + c.sigma**2).sqrt()
    return GaussianMixture(c.alpha * law.means, stds, law.weights).log_prob(x)


def halves(seed: int, n: int = 1000, steps: int = 300) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Digits drawn with a network of 0-4 and one of 5-9: pictures, Frechet distances and entropies of the classes read."""
    x, labels, unseen = digits()
    models = []
    for k in (0, 1):
        torch.manual_seed(mix(seed, k))
        net = parametrized(MLP(64, 64, width=192), LAW, "v")
        told = {"x": x[(labels // 5 == k) & ~unseen]}
        models.append(learn(Denoising(net, weighting="eps", dropout=0.0), told, mix(seed, k), steps=600, size=192))
    judge = Judge(x[~unseen], labels[~unseen], seed)
    made = {
        "OR": run(superpose(*models, temperature=TEMPERATURE), (n, 64), steps, seed)[0],
        "one of the two each": torch.cat(
            [run(m, (n // 2, 64), steps, mix(seed, 2 + k))[0] for k, m in enumerate(models)]
        ),
        "averaging": run(superpose(*models, temperature=0.0), (n, 64), steps, seed)[0],
    }
    real = judge.features(x[unseen])
    distances = {k: frechet_distance(judge.features(v), real).value for k, v in made.items()}
    shares = {k: judge.logits(v).argmax(1).bincount(minlength=10) / n for k, v in made.items()}
    return made, distances, {k: float(-torch.xlogy(p, p).sum()) for k, p in shares.items()}


@torch.no_grad()
def prompts(
    seed: int, n: int = 24, steps: int = 16
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[tuple[str, str]]]:
    """Emoji of two prompts at once: images, and the lower of the judge's cosines (n,) to the two."""
    pipeline, judge, asked = load("emoji-latent"), Judges(), pairs(n, seed)
    cond, vectors = told(pipeline, asked)
    texts = judge.encoder.text(vectors.flatten(0, 1)).unflatten(0, (n, 2))
    ways = {
        "AND": superposition("and"), "averaging": superposition("or", temperature=0.0), "joint embedding": interpolated(),
    }  # fmt: skip
    images, lower = {}, {}
    for name, way in ways.items():
        x, _ = run(way(cfg(3.0)(pipeline.denoiser)), (n, *pipeline.codec.shape(64, 64)), steps, seed, cond=cond)
        images[name] = pipeline.codec.images(x)
        lower[name] = (texts @ judge(images[name])[:, :, None]).squeeze(-1).amin(1)
    return images, lower, asked


def picture(flat: Any, made: dict[str, Tensor], images: dict[str, Tensor], asked: list[tuple[str, str]]) -> Any:
    """Clouds in the plane, digits, and emoji of two prompts."""
    with plots.style():
        fig = plots.figure(10.5, 7.2)
        axes = fig.subplots(3, 3, height_ratios=(1.15, 0.75, 1))
        fig.get_layout_engine().set(wspace=0.04)
        for ax, (name, x) in zip(axes[0], flat["x"].items(), strict=True):
            ax.scatter(*x[:500].T, s=3, color=plots.SECOND, lw=0)
            ax.set(title=f"two exact mixtures, {name.upper() if len(name) < 4 else name}", xlim=(-3, 3), ylim=(-3, 3))
            ax.set(xticks=[], yticks=[], aspect="equal")
        for ax, (name, x) in zip(axes[1], made.items(), strict=True):
            plots.show(ax, 255 - pictures(x[:: len(x) // 40][:40]), 10, title=f"networks of 0-4 and of 5-9, {name}")
        for ax, (name, u) in zip(axes[2], images.items(), strict=True):
            plots.show(ax, u[:8], 4, 4, title=f"two prompts, {name}")
        lines = ["; ".join(f"{a} + {b}" for a, b in asked[i : i + 4]) for i in (0, 4)]
        axes[2, 1].set_xlabel("\n".join(lines), fontsize=8)
        return plots.image(fig)


@recipe(
    "superdiff",
    kind="guidance",
    claim="Log densities found along the path converge with the step; OR samples the mixture of two models where averaging their "
    "scores does not, and AND keeps densities equal and shows both of two prompts better than averaging.",
    baseline="averaging the scores with the same seeds and calls; for OR also one of the two networks an item, for AND the "
    "mean of the two prompts' features",
    citation=CITATION,
)
def superdiff(seed: int) -> Findings:
    """Densities along the path, and OR and AND of two models with them, beside averaged scores."""
    flat = plane(seed)
    made, distance, entropy = halves(seed)
    images, lower, asked = prompts(seed)
    x = flat["x"]["or"]
    mean = {k: 100 * float(v.mean()) for k, v in lower.items()}
    gain = 100 * (lower["AND"] - lower["averaging"])
    error = float(gain.std() / math.sqrt(len(gain)))
    return Findings(
        [
            Check("plane: median error of the log densities, 1000 steps against 250", flat["errors"][1], flat["errors"][0], "ours <= 0.7 * baseline"),
            Check("plane: median gap of the exact log densities, AND", flat["gaps"]["and"], flat["gaps"]["averaging"], "ours <= 0.1 * baseline"),
            Check("plane: share of OR on the right, off one half", abs(float((x[:, 0] > 0).double().mean()) - 0.5), None, "ours <= 0.06"),
            Check("plane: mean |x| of OR off 1.5", abs(float(x[:, 0].abs().mean()) - 1.5), None, "ours <= 0.075"),
            Check("digits: Fréchet distance, OR against averaging", distance["OR"], distance["averaging"], "ours <= 0.7 * baseline"),
            Check("digits: Fréchet distance, OR against one each", distance["OR"], distance["one of the two each"], "ours <= 1.15 * baseline"),
            Check("digits: entropy of the classes of OR over log 10", entropy["OR"] / math.log(10), None, "ours >= 0.9"),
            Check("emoji: lower of two cosines x 100, AND against averaging", mean["AND"], mean["averaging"], "ours > baseline"),
            Check("emoji: lower of two cosines x 100, AND against the mean of the features", mean["AND"], mean["joint embedding"], "ours > baseline"),
        ],
        nfe={"two models or prompts": 2, "guided prompts": 4},
        data="two mixtures of two modes in the plane (256 paths for densities, 1000 samples); scikit-learn digits, 1000 a way, against the 599 unseen; "
        f"{len(asked)} random pairs of {len(PROMPTS)} prompts",
        model="exact beliefs; two perceptrons taught in this run for 600 steps on 0-4 and on 5-9; emoji-latent, 16 steps, scale 3",
        notes=f"NFE are a step. Emoji, judge: {', '.join(f'{k} {v:.1f}' for k, v in mean.items())}; AND minus averaging {gain.mean():.2f} "
        f"± {1.96 * error:.2f}. Digits in features of a classifier fitted here: {', '.join(f'{k} {v:.1f}' for k, v in distance.items())}. "
        "Taking one of the two networks at random for each item needs no densities and is a trivial rival of OR when both weigh the same; where OR stays behind it the likely reason is that "
        "learned scores are no exact gradients, so that their log densities err before the two models part; exact models (the plane) show no such loss. "
        f"A temperature of {TEMPERATURE:g} for the digits, which decides between the models earlier, was chosen on seeds 100, 102 and 103; the published 1 was at 1.27 times one each on seed 0; training for 2000 steps at temperature 1 was tried first and dropped (0.83, 1.00 and 1.42 times one each on seeds 100 to 102).",
        picture=picture(flat, made, images, asked),
    )  # fmt: skip
