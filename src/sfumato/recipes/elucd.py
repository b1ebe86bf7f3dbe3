"""EluCD: a clean classifier guides a weak conditional model of digits, as it is and calibrated for the purpose."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato import core, grids, solvers
from sfumato.core import Context, mix
from sfumato.denoisers import parametrized
from sfumato.evaluation.metrics import frechet_distance, precision_recall
from sfumato.evaluation.metrics.calibration import expected_calibration_error
from sfumato.guidance import classifier, half_sine, smooth_activations
from sfumato.networks import MLP
from sfumato.objectives import Denoising
from sfumato.processes import VP
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._small import Judge, digits, learn, pictures

N, STEPS, SCALES = 500, 50, (0.06, 0.1, 0.15, 0.25, 0.4)
NAIVE, FULL = "reads x_t", "reads x0, calibrated"
CITATION = """@inproceedings{ma2024elucidating,
  title = {Elucidating The Design Space of Classifier-Guided Diffusion Generation},
  author = {Ma, Jiajun and Hu, Tianyang and Wang, Wenjia and Sun, Jiacheng},
  booktitle = {ICLR}, year = {2024}
}"""


def off_the_shelf(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """A ReLU classifier that has seen clean digits only."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    with torch.enable_grad():
        for _ in range(300):
            rows = torch.randint(len(x), (128,))
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def weak(x: Tensor, y: Tensor, seed: int) -> Any:
    """A conditional model that was told the class half of the time, for 600 steps."""
    torch.manual_seed(seed)
    net = MLP(64, width=192, embeddings={"y": 10})
    denoiser = parametrized(net, VP(), null={"y": 10})
    return learn(Denoising(denoiser, dropout=0.5), {"x": x, "y": y}, seed, steps=600, cond=["y"]).eval()


def picture(sweeps: dict[str, Sweep], plain: float, errors: dict[str, list[float]], sheets: dict[str, Tensor]) -> Any:
    """Distances over the scales, calibration errors over the steps, and the digits of the best scales."""
    curves = {name: sweep.distances for name, sweep in sweeps.items()}
    with plots.style():
        made = plots.figure(11.5, 4.4)
        left, right = made.subfigures(1, 2, width_ratios=(1.7, 1))
        one, two = left.subplots(1, 2)
        colours = (plots.INK, plots.SECOND, plots.ACCENT)
        for (name, values), colour in zip(curves.items(), colours, strict=True):
            one.plot(SCALES, values, "o-", color=colour, ms=4, label=name)
        one.axhline(plain, color="#97a3ad", ls="--", lw=1)
        one.text(SCALES[0], plain, "unguided", va="bottom", color="#6b7780", fontsize=8)
        one.set(xscale="log", yscale="log", xlabel="scale", xticks=SCALES, xticklabels=SCALES)
        one.set_title("Fréchet distance to unseen digits")
        one.minorticks_off()
        ticks = [v for v in (3, 5, 7, 10, 15, 20, 30, 50, 100) if min(map(min, curves.values())) * 0.9 < v < plain * 3]
        one.set_yticks(ticks, [str(v) for v in ticks])
        one.legend(loc="best", fontsize=8)
        for (name, values), colour in zip(errors.items(), (plots.INK, plots.ACCENT), strict=True):
            two.plot(torch.linspace(0, 1, len(values)), values, color=colour, lw=1.8, label=f"reads {name}")
        two.set(xlabel="share of the steps taken", ylim=(0, None))
        two.set_title("calibration error of the classifier")
        two.legend(loc="upper right", fontsize=8)
        for axis, (name, x) in zip(right.subplots(len(sheets)), sheets.items(), strict=True):
            plots.show(axis, 255 - pictures(x[:56]), 14, 1)
            axis.set_title(name, fontsize=9, loc="left")
        return plots.image(made)


@torch.no_grad()
def calibration_errors(denoiser: Any, readers: dict[str, Any], labels: Tensor, seed: int) -> dict[str, list[float]]:
    """Expected calibration error of a reader of x_t and of one of x0, at every second step of an unguided run."""
    errors: dict[str, list[float]] = {name: [] for name in readers}
    told = Context.of(N, mix(seed, 3), cond={"y": labels})
    run = core.trajectory(denoiser, solvers.get("ddpm"), grids.get("arctan"), STEPS, shape=(N, 64), ctx=told)
    for st in run:
        if st.t and st.index % 2 == 0:
            states = {"x_t": st.x, "x0": denoiser(st.x, st.t, told.fork(look=True)).mean}
            for name, reader in readers.items():
                errors[name].append(expected_calibration_error(reader(states[name]), labels).value)
    return errors


def seconds_over(one: Callable[[], Any], other: Callable[[], Any], rounds: int = 3) -> float:
    """CPU seconds of one over those of the other, each the least of a few interleaved runs."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for made, run in zip(spent, (one, other), strict=True):
            began = time.process_time()
            run()
            made.append(time.process_time() - began)
    return min(spent[0]) / min(spent[1])


@dataclass(frozen=True)
class Sweep:
    """What one way to guide draws at each scale, and how far that is from unseen digits."""

    samples: list[Tensor]
    distances: list[float]

    @property
    def best(self) -> int:
        """Which scale is."""
        return min(range(len(SCALES)), key=self.distances.__getitem__)

    @property
    def least(self) -> float:
        """The distance there."""
        return self.distances[self.best]

    @property
    def chosen(self) -> Tensor:
        """The samples there."""
        return self.samples[self.best]


def ways(net: nn.Module, smooth: nn.Module) -> dict[str, Any]:
    """scale -> guidance: the classifier as it is on x_t, on the belief about x0, and calibrated for that."""
    return {
        NAIVE: lambda s: classifier(lambda u, t: net(u), s, through="state"),
        "reads x0": lambda s: classifier(net, s, weight="tweedie"),
        FULL: lambda s: classifier(smooth, half_sine(s, 0.3), tau_marginal=0.5, weight="tweedie"),
    }


def drawn(denoiser: Any, labels: Tensor, seed: int) -> Tensor:
    """N digits of those labels, from the same noise for everyone."""
    ctx = Context.of(N, mix(seed, 3), cond={"y": labels})
    return core.sample(denoiser, solvers.get("ddpm"), grids.get("arctan"), STEPS, shape=(N, 64), ctx=ctx)


def rules(
    sweeps: dict[str, Sweep], plain: float, recalls: tuple[float, float], errors: dict[str, float], ratio: float
) -> list[Check]:
    """The clauses of the claim."""
    full, best = sweeps[FULL].least, "at the best scale,"
    return [
        Check(f"Fréchet distance {best} unguided", full, plain, "ours <= 0.95 * baseline"),
        Check(f"Fréchet distance {best} shown x_t", full, sweeps[NAIVE].least, "ours < baseline"),
        Check(f"recall {best} unguided", *recalls, "ours >= 0.7 * baseline"),
        Check("mean calibration error on the way, shown x_t", errors["x0"], errors["x_t"], "ours < 0.7 * baseline"),
        Check("seconds of a run over those unguided", ratio, None, "ours <= 1.5"),
    ]


@recipe(
    "elucd",
    kind="guidance",
    claim="A classifier of clean images guides better when it is calibrated for it: shown x0, its ReLUs smoothed, the joint "
    "likelihood weighed above the conditional one, more guidance in the middle; at little more than the unguided cost.",
    baseline="the same conditional model unguided; the same classifier shown x_t as it is; five scales for each",
    citation=CITATION,
)
def elucd(seed: int) -> Findings:
    """A weak model, a clean classifier and its calibration; each way to guide at five scales, against unseen digits."""
    x, y, unseen = digits()
    seen = (x[~unseen], y[~unseen])
    denoiser, net = weak(*seen, seed), off_the_shelf(*seen, mix(seed, 1) % 2**31)
    smooth, judge = smooth_activations(net, 3.0), Judge(*seen, mix(seed, 2) % 2**31)
    reference, labels = judge.features(pictures(x[unseen])), torch.arange(N) % 10
    arms = ways(net, smooth)

    def distance(samples: Tensor) -> float:
        return float(frechet_distance(judge.features(pictures(samples)), reference).value)

    def recall(samples: Tensor) -> float:
        return float(precision_recall(judge.features(pictures(samples)), reference)[1].value)

    def sweep(guided: Any) -> Sweep:
        samples = [drawn(guided(s)(denoiser), labels, seed) for s in SCALES]
        return Sweep(samples, [distance(v) for v in samples])

    plain = drawn(denoiser, labels, seed)
    sweeps = {name: sweep(guided) for name, guided in arms.items()}
    errors = calibration_errors(denoiser, {"x_t": net, "x0": smooth}, labels, seed)
    mean = {name: sum(values) / len(values) for name, values in errors.items()}
    ratio = seconds_over(lambda: drawn(arms[FULL](0.1)(denoiser), labels, seed), lambda: drawn(denoiser, labels, seed))
    accuracy = [float((f(x[unseen]).argmax(1) == y[unseen]).float().mean()) for f in (net, smooth)]
    sheets = {f"{name}, scale {SCALES[sweeps[name].best]:g}": sweeps[name].chosen for name in (NAIVE, FULL)}
    return Findings(
        rules(sweeps, distance(plain), (recall(sweeps[FULL].chosen), recall(plain)), mean, ratio),
        nfe=STEPS,
        data=f"scikit-learn digits: {len(seen[0])} learned, {int(unseen.sum())} unseen; {N} samples an arm, the ten classes in turn",
        model="conditional MLP of 0.3 million parameters under VP, made weak by 600 steps and a label dropout of 0.5 so that there is "
        "something to gain; a ReLU MLP of 17,000 that saw clean digits; the judge is another network with smooth activations. Taught in this run",
        notes=f"Accuracy of the classifier on unseen digits {accuracy[0]:.3f}, smoothed {accuracy[1]:.3f}. Without calibration, shown x0: "
        f"{sweeps['reads x0'].least:.2f} at best. The scales are in units of sigma^2 / alpha. They were chosen on seed 100 as 0.03 to "
        "0.25; on seed 0, where every clause held, the classifier shown x_t was at its best at the end of that range, so it was moved to "
        "0.06 to 0.4, in the baseline's favour. Best scales here: "
        + ", ".join(f"{name} {SCALES[s.best]:g}" for name, s in sweeps.items())
        + ". Smoothness 1 or 10, sines of 0 or 1, discounts of 0 or 0.25, the bump of the released code and x0 clipped to the data's range moved the best distance between 7.1 and 7.4 "
        "on seed 102 (shown x_t 7.6), so none of them widens the gap; differences of 0.1 come and go between them. Seconds are of the processor, the least of three. Distances in the judge's 32 features.",
        picture=picture(sweeps, distance(plain), errors, {"unguided": plain, **sheets}),
    )
