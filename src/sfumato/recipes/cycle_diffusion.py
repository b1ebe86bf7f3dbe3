"""CycleDiffusion: two models of related digits, taught apart, share the noise that draws them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import api, core
from sfumato.denoisers import parametrized
from sfumato.editing.latent_energy import drawn, langevin
from sfumato.editing.recorded import NoiseMaps, record
from sfumato.evaluation.measurement import bootstrap_interval
from sfumato.networks import MLP
from sfumato.objectives.denoising import Denoising
from sfumato.processes import Cosine
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._edits import strips
from sfumato.recipes._small import Judge, digits, learn, pictures
from sfumato.solvers.ancestral import DDIM

LEVELS, STEPS, N = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), 25, 150
ETAS = {"CycleDiffusion, eta 0.1": 0.1, "CycleDiffusion, eta 1": 1.0}
OPTIONS: dict[str, Any] = {"grid": "uniform", "steps": STEPS}
CITATION = """@inproceedings{wu2023unifying,
  title = {A Latent Space of Stochastic Diffusion Models for Zero-Shot Image Editing and Guidance},
  author = {Wu, Chen Henry and De la Torre, Fernando},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)}, year = {2023}
}"""


def bold(x: Tensor) -> Tensor:
    """Each stroke a pixel wider to the right: the other domain."""
    image = x.unflatten(-1, (8, 8))
    return torch.maximum(image, F.pad(image, (1, 0), value=-1.0)[..., :8]).flatten(-2)


def taught(x: Tensor, seed: int) -> Any:
    """A denoiser of these digits (N, 64)."""
    net = parametrized(MLP(64, width=192), Cosine(), "v")
    return learn(Denoising(net, dropout=0.0), {"x": x}, seed, steps=1000, size=128).eval()


def sdedit(target: Any, x: Tensor, level: float, seed: int) -> Tensor:
    ctx = core.Context.of(len(x), seed)
    noisy, _ = target.process.corrupt(x, level, ctx)
    return run(target, noisy, level, 0.0)


def run(denoiser: Any, x: Tensor, start: float, stop: float) -> Tensor:
    return api.sample(denoiser, solver=DDIM(), x=x, start=start, stop=stop, **OPTIONS)


def cycle(source: Any, target: Any, x: Tensor, level: float, eta: float, seed: int, fresh: bool = False) -> Tensor:
    """Encode with one model, decode with the other; ``fresh``: the maps of another run of that law in the place of z."""
    maps: NoiseMaps = record(source, x, solver=f"ddpm(eta={eta})", path="posterior", start=level, seed=seed, **OPTIONS)
    if fresh:
        maps = drawn(target, x.shape, solver=f"ddpm(eta={eta})", seed=core.mix(seed, 1), **OPTIONS)
    return maps.decode(target, keep_last=False)


def found(y: Tensor, truth: Tensor) -> Tensor:
    """Whether the nearest of all true counterparts is its own, (N,)."""
    return (torch.cdist(y, truth).argmin(1) == torch.arange(len(y))).double()


def guided(denoiser: Any, judge: Judge, seed: int, n: int = 64) -> tuple[float, float, float]:
    """(share of the next class before, after Langevin in z, largest deviation of |z|^2 in standard deviations of chi^2)."""
    maps = drawn(denoiser, (n, 64), solver="ddpm", grid="uniform", steps=8, seed=seed)
    target = torch.full((n,), seed % 10)

    def cost(x0: Tensor, cond: Any) -> Tensor:
        return F.cross_entropy(judge.head(judge.body(x0)), target, reduction="none")

    led = langevin(maps, denoiser, cost, weight=20.0, rate=0.05, iterations=60, seed=core.mix(seed, 2))
    shares = [
        float((judge.logits(m.decode(denoiser, keep_last=False)).argmax(1) == target).double().mean())
        for m in (maps, led)
    ]
    z = torch.stack([led.states[0], *led.noise[:-1]], 1).flatten(1).square().sum(1)
    d = led.states[0][0].numel() * len(led.noise)
    return shares[0], shares[1], float((z.mean() - d).abs() / (2 * d) ** 0.5)


def picture(curves: dict[str, Any], rows: dict[str, Tensor]) -> Any:
    """Content kept over domain reached, and the same digits by each method."""
    with plots.style():
        made = plots.figure(11.2, 4.6)
        left, right = made.subfigures(1, 2, width_ratios=(1, 1.35))
        ax = left.subplots()
        for name, points in curves.items():
            ax.plot(*zip(*points, strict=True), "o-", ms=4, label=name)
        ax.axvline(0.8, color=plots.PALE, lw=1, zorder=0)
        ax.set(
            title="unseen digits, all levels",
            xlabel="seen as bold",
            ylabel="own counterpart is nearest",
            ylim=(-0.03, 1.03),
        )
        ax.legend(fontsize=8)
        strips(right, {k: 255 - pictures(v) for k, v in rows.items()}, 9, "thin digits to bold ones")
        return plots.image(made)


@recipe(
    "cycle-diffusion",
    kind="editing",
    claim="Two diffusion models taught apart on related domains share a latent space: the noise that explains a picture to the one draws its "
    "counterpart with the other, 1.2 times as often recognised as SDEdit's at the same share seen as the target domain; the encoder is "
    "exact; an energy leads the same noise.",
    baseline="SDEdit and DDIM there and back (DDIB) with the same models, steps and levels; a copy; fresh noise",
    citation=CITATION,
)
@torch.no_grad()
def cycle_diffusion(seed: int) -> Findings:
    data = digits()
    known, unseen = (
        data.x[~data.unseen],
        data.x[data.unseen][torch.randperm(int(data.unseen.sum()), generator=torch.Generator().manual_seed(seed))[:N]],
    )
    choosing, truth = known[::2][:N], bold(unseen)
    with torch.enable_grad():
        thin, thick = (
            taught(known[::2], core.mix(seed, 1) % 2**31),
            taught(bold(known[1::2]), core.mix(seed, 2) % 2**31),
        )
        domain = Judge(torch.cat([known, bold(known)]), torch.arange(2 * len(known)) // len(known), seed)
        reader = Judge(bold(known), data.labels[~data.unseen], core.mix(seed, 3) % 2**31)

    def is_bold(y: Tensor) -> float:
        return float((domain.logits(y).argmax(1) == 1).double().mean())

    ways: dict[str, Any] = {
        "SDEdit": lambda x, level: sdedit(thick, x, level, seed),
        **{k: lambda x, level, eta=eta: cycle(thin, thick, x, level, eta, seed) for k, eta in ETAS.items()},
        "DDIB": lambda x, level: run(thick, run(thin, x, 0.0, level), level, 0.0),
    }  # fmt: skip

    def best(way: Any) -> float:
        """The level of the most counterparts among those seen as bold in 80 %, on digits that taught the first model."""
        tried = [
            (is_bold(y := way(choosing, level)) >= 0.8, found(y, bold(choosing)).mean().item(), level)
            for level in LEVELS
        ]
        return max(tried)[2]

    levels = {name: best(way) for name, way in ways.items()}
    results = {name: way(unseen, levels[name]) for name, way in ways.items()}
    hits = {name: found(y, truth) for name, y in results.items()}
    share = {name: float(hit.mean()) for name, hit in hits.items()}
    ours = max(ETAS, key=lambda name: found(ways[name](choosing, levels[name]), bold(choosing)).mean().item())
    double, wide = thin.double(), choosing[:8].double()
    exact = record(double, wide, solver="ddpm(eta=0.1)", path="posterior", seed=seed, **OPTIONS)
    error = float((exact.decode(double) - wide).square().mean())
    thin.float()
    margin = bootstrap_interval(lambda d: d.mean(), hits[ours] - 1.2 * hits["SDEdit"], resamples=1000, seed=seed)
    fresh = found(cycle(thin, thick, unseen, 1.0, 1.0, seed, fresh=True), truth).mean().item()
    before, after, far = guided(thick, reader, seed)
    curves = {
        k: [(is_bold(y := way(unseen, level)), found(y, truth).mean().item()) for level in LEVELS]
        for k, way in ways.items()
    }
    return Findings(
        [
            Check("squared error of encoding and decoding with one model, float64", error, None, "ours <= 1e-10"),
            Check("seen as bold", is_bold(results[ours]), None, "ours >= 0.8"),
            Check("a copy seen as bold", is_bold(unseen), None, "ours < 0.8"),
            Check("own counterpart nearest, ours - 1.2 SDEdit, lower end of 95 %", margin.low, None, "ours > 0"),
            Check("own counterpart nearest, against DDIB", share[ours], share["DDIB"], "ours > baseline"),
            Check("own counterpart nearest, fresh noise", fresh, None, "ours <= 0.05"),
            Check("share of the class asked for by Langevin in z, against before", after, before, "ours >= 3 * baseline"),
            Check("mean of |z|^2 from its own mean, in standard deviations of chi^2", far, None, "ours <= 3.3"),
        ],
        nfe=2 * STEPS,
        data=f"scikit-learn's digits, {len(known[::2])} thin ones and the bold form of {len(known[1::2])} others learned; {N} unseen ones whose bold "
        "form is known",
        model="two MLPs of 64 pixels taught apart in this run (1,000 steps each); classifiers of the domain and of the digit",
        notes="In the place of emoji of two vendors: no two bundled models were taught apart. Levels chosen on learned digits: "
        + ", ".join(f"{k} {v:g}" for k, v in levels.items())
        + ". Seen as bold and own counterpart nearest on the unseen ones: "
        + "; ".join(f"{k} {is_bold(y):.2f}, {share[k]:.2f}" for k, y in results.items())
        + f". Langevin: weight 20, rate 0.05, 60 iterations, runs of 8 steps; {before:.2f} to {after:.2f} of 64 digits.",
        picture=picture(curves, {"thin": unseen, "truth": truth, **results}),
    )  # fmt: skip
