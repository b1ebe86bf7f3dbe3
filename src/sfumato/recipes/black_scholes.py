"""Black-Scholes blending of two prompts: what the pricing decides, and whether choosing prompts by feedback blends better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sfumato import grids, load, solvers
from sfumato.core import Context, sample
from sfumato.guidance import alternating, cfg, interpolated, selected, selections
from sfumato.guidance.prompts import Belief
from sfumato.guidance.rules import BlackScholes, Cosine, gaussian_price
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._emoji import Judge
from sfumato.recipes._pairs import interval, pairs, told
from sfumato.zoo.encoders import load_encoder

N, STEPS = 96, 10
CITATION = """@article{kothandaraman2024financial,
  title = {Financial Models in Generative Art: Black-Scholes-Inspired Concept Blending in Text-to-Image Diffusion},
  author = {Kothandaraman, Divya and Lin, Ming and Manocha, Dinesh},
  journal = {arXiv:2405.13685}, year = {2024}
}"""


class Kept:
    """A scorer that remembers what it said."""

    def __init__(self, scorer: Any) -> None:
        self.scorer, self.said = scorer, []  # type: ignore[var-annotated]

    def __call__(self, x0: Tensor) -> Tensor:
        self.said.append(self.scorer(x0).double())
        return self.said[-1]


def lower(judge: Judge, images: Tensor, texts: Tensor) -> Tensor:
    """100 times the lower of the judge's cosines of each picture (n,) to its two texts (n, 2, d)."""
    return 100 * (texts @ judge(images)[:, :, None]).squeeze(-1).amin(1).double()


def said(span: tuple[float, float]) -> str:
    """An interval as text."""
    return f"{span[0]:.2f} to {span[1]:.2f}"


def picture(images: dict[str, Tensor], asked: list[tuple[str, str]], blend: dict[str, Tensor], choices: Tensor) -> Any:
    """A row of pictures a way, and which prompt conditioned each step."""
    with plots.style():
        fig = plots.figure(10, 4.4)
        axes = fig.subplots(len(images) + 1, 1, height_ratios=[1] * len(images) + [0.22])
        for ax, (name, u) in zip(axes, images.items(), strict=False):
            plots.show(ax, u[:10], 10, 6)
            ax.set_ylabel(f"{name}\nlower cosine {blend[name].mean():.1f}", rotation=0, ha="right", va="center")
        bars = torch.nn.functional.pad(choices[:, :10].double(), (0, 0, 0, 1), value=torch.nan).T.reshape(1, -1)
        axes[-1].imshow(bars, cmap="coolwarm", vmin=-0.4, vmax=1.4, aspect="auto", interpolation="nearest")
        axes[-1].set(yticks=[], xticks=[(STEPS + 1) * (i + 0.5) - 1 for i in range(10)])
        axes[-1].set_xticklabels([f"{a}\n{b}" for a, b in asked[:10]], fontsize=7)
        axes[-1].spines[:].set_visible(False)
        axes[-1].tick_params(length=0)
        axes[-1].set_ylabel("blue: first\nred: second", rotation=0, ha="right", va="center")
        return plots.image(fig)


@recipe(
    "black-scholes",
    kind="guidance",
    claim="Conditioning each step on the prompt that its option price says is behind blends two prompts better than interpolating "
    "their features and than alternating; the price itself decides as the lower score does, and the published kernel by rounding.",
    baseline="interpolated features and alternating prompts, the same noise, network, scale and steps",
    citation=CITATION,
)
@torch.no_grad()
def black_scholes(seed: int) -> Findings:
    """Blends of two prompts by the option price, beside interpolated features and alternating prompts."""
    pipeline, judge, asked = load("emoji-latent"), Judge(), pairs(N, seed)
    encoder: Any = load_encoder("emoji-encoder")
    cond, vectors = told(pipeline, asked)
    ours, theirs = (net.text(vectors.flatten(0, 1)).unflatten(0, (N, 2)) for net in (encoder, judge.encoder))
    scorer = Kept(Cosine(pipeline.codec.decode, lambda u: encoder.image(avg_pool2d(u, 2)), ours, 50.0, 1.0))
    rule = BlackScholes(scorer)
    ways = {"Black-Scholes": selected(rule), "features between": interpolated(), "alternating": alternating()}
    images, blend, choices = {}, {}, torch.empty(0)
    for name, way in ways.items():
        ctx = Context.of(N, seed, cond=cond)
        args = way(cfg(3.0)(pipeline.denoiser)), solvers.get("ddim"), grids.get("uniform"), STEPS
        images[name] = pipeline.codec.images(sample(*args, shape=(N, *pipeline.codec.shape(64, 64)), ctx=ctx))
        blend[name] = lower(judge, images[name], theirs)
        choices = selections(ctx) if name == "Black-Scholes" else choices
    lowest, prices, agreed = [], [], []
    for i, scores in enumerate(scorer.said):
        volatility = rule.volatility(Belief(scores, 1 - i / STEPS, pipeline.process))
        prices.append(gaussian_price(scores, 100.0, 1 / STEPS, volatility, STEPS - i))
        lowest.append(scores.argmin(1))
        agreed.append(BlackScholes(scorer, kernel="pdf").choose(scores, STEPS, i, volatility) == lowest[-1])
    spans = {k: interval(blend["Black-Scholes"] - v, seed) for k, v in blend.items()}
    same = float((choices[1:] == torch.stack(lowest)).double().mean())
    return Findings(
        [
            Check("share of steps at which the price chooses the lower score", same, None, "ours >= 1"),
            Check("largest price of the published kernel over the strike", float(torch.stack(prices).abs().max()) / 100, None, "ours <= 1e-10"),
            Check("lower cosine over features between: low end of the 95 % interval", spans["features between"][0], None, "ours > 0"),
            Check("lower cosine over alternating: low end of the 95 % interval", spans["alternating"][0], None, "ours > 0"),
        ],
        nfe={"one prompt a step, guided": 2},
        data=f"{N} random pairs of 20 prompts, paired noise",
        model=f"emoji-latent, DDIM, {STEPS} steps, scale 3; scores by emoji-encoder, 50 (1 + cos); judged by emoji-judge",
        notes="The lower of the judge's two cosines x 100: "
        + ", ".join(f"{k} {v.mean():.2f}" for k, v in blend.items())
        + f"; Black-Scholes minus features between {said(spans['features between'])}, minus alternating {said(spans['alternating'])} (95 % bootstrap, "
        f"paired). The published kernel agrees with the lower score at {float(torch.stack(agreed).double().mean()):.0%} of the steps. The pricing adds nothing to "
        "choosing the lower score at equal strikes, since the price grows with the score: what is tested beyond that is feedback. Left out for the budget: "
        "choosing by chance, switching, composite prompts, and the Fréchet distance.",
        picture=picture(images, asked, blend, choices),
    )  # fmt: skip
