"""``arc``, and the best of our settings, against diffusers, k-diffusion and azula on the cases of :mod:`benchmarks.solvers_cases`.

k-diffusion needs torchvision, which this project does not, so this has an environment of its own:

    python -m venv .venv-peers
    .venv-peers/bin/pip install -e '.[bench,science,text]' k-diffusion azula
    .venv-peers/bin/python -m benchmarks.solvers_k_diffusion [--quick] [--json FILE]

The last two are run on Karras' spacing, on equal steps in lambda and on equal steps in the time of the model's own process, with a
last step or a last reading of x0 at the cleanest level, within the same number of calls. The levels go from the noisiest that
has one (pure noise of a flow has none, so its state at t = 0.999 is handed over, as it is to diffusers) to sigma / alpha = 0.01.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sfumato as sf
from benchmarks import solvers, step_cost
from benchmarks.solvers_cases import TABLE, Case
from sfumato.core import Coef
from sfumato.denoisers.oracles import Gaussian

CLEANEST = math.log(0.01)  # of log(sigma / alpha), as in diffusers' linear schedule
NEAR_NOISE = 0.999
SPACINGS = ("karras", "logsnr", "time")
TWO_CALLS = ("heun", "dpm_2", "dpmpp_2s")
K = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m", "dpmpp_2s")
AZULA = ("zAB", "vAB", "zEAB", "xEAB", "REAB")


@dataclass(frozen=True)
class Spacing:
    """Levels log(sigma / alpha) between both ends of a case."""

    name: str
    case: Case

    @property
    def begin(self) -> float:
        """The time of the noisiest level."""
        return 1.0 if self.case.denoiser.process.coef(1.0).alpha > 0 else NEAR_NOISE

    @property
    def high(self) -> float:
        """The noisiest level."""
        return -self.case.denoiser.process.coef(self.begin).lam

    def __call__(self, share: float) -> float:
        """The level at a share of the way from the cleanest (0) to the noisiest (1)."""
        process = self.case.denoiser.process
        if self.name == "time":
            end = process.time(-CLEANEST)
            return -process.coef(end + share * (self.begin - end)).lam
        if self.name == "logsnr":
            return CLEANEST + share * (self.high - CLEANEST)
        low, high = math.exp(CLEANEST / 7), math.exp(self.high / 7)
        return 7 * math.log(low + share * (high - low))

    def sigmas(self, n: int) -> Tensor:
        """k-diffusion's n levels of sigma / alpha, falling, and 0; equal steps in time go to 0 themselves."""
        if self.name == "time":
            coef = self.case.denoiser.process.coef
            levels = [-coef(self.begin * (1 - i / n)).lam for i in range(n)]
        else:
            levels = [self(1 - i / max(n - 1, 1)) for i in range(n)]
        return torch.tensor([*map(math.exp, levels), 0.0])


def time_at(case: Case, level: float) -> float:
    """The time of a level, which rounding may have taken beyond 1."""
    return min(float(case.denoiser.process.time(-level)), 1.0)


def coef_at(case: Case, level: float) -> Coef:
    """alpha and sigma of the case's process at a level."""
    return case.denoiser.process.coef(time_at(case, level))  # type: ignore[no-any-return]


class Model:
    """A case's denoiser as both libraries ask it, at a host float; counts its calls."""

    def __init__(self, case: Case) -> None:
        self.case, self.ctx, self.calls = case, case.context(), 0

    def start(self, begin: float) -> Tensor:
        """The state at ``begin``: the case's own, or where a straight step from it leads."""
        x = self.case.x
        if begin == 1.0:
            return x
        return x + (begin - 1.0) * self.case.denoiser(x, 1.0, self.case.context()).view("flow")

    def x0(self, x: Tensor, level: float) -> Tensor:
        """E[x0 | x] of the process's own state."""
        self.calls += 1
        return self.case.denoiser(x.float(), time_at(self.case, level), self.ctx).view("x0")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """k-diffusion's: the state is x / alpha."""
        level = math.log(float(sigma[0]))
        return self.x0(x * self.scale(level), level)

    def scale(self, level: float) -> float:
        """alpha of the process at a level."""
        return float(coef_at(self.case, level).alpha)


def k_diffusion(case: Case, name: str, spacing: str, calls: int) -> tuple[Tensor, int]:
    """(ends, calls) of one of k-diffusion's samplers without noise."""
    sampling = importlib.import_module("k_diffusion.sampling")
    model, place = Model(case), Spacing(spacing, case)
    x = model.start(place.begin) / model.scale(place.high)
    if name == "dpm_fast":
        low, high = math.exp(CLEANEST), math.exp(place.high)
        ends = sampling.sample_dpm_fast(model, x, low, high, calls - 1, disable=True)
        return model(ends, torch.full((1,), low)), model.calls
    steps = (calls + 1) // 2 if name in TWO_CALLS else calls
    run = getattr(sampling, "sample_dpmpp_2s_ancestral" if name == "dpmpp_2s" else f"sample_{name}")
    options = {"eta": 0.0} if name == "dpmpp_2s" else {}
    return run(model, x, place.sigmas(steps), disable=True, **options), model.calls


def azula(case: Case, name: str, order: int, spacing: str, calls: int) -> tuple[Tensor, int]:
    """(ends, calls) of one of azula's multistep samplers."""
    sample, model, place = importlib.import_module("azula.sample"), Model(case), Spacing(spacing, case)

    class Denoiser(nn.Module):
        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            found = [coef_at(case, place(float(v))) for v in t.flatten()]
            alphas, sigmas = ([getattr(c, kind) for c in found] for kind in ("alpha", "sigma"))
            return tuple(torch.tensor(v, dtype=torch.float64).reshape(t.shape) for v in (alphas, sigmas))  # type: ignore[return-value]

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return importlib.import_module("azula.denoise").DiracPosterior(model.x0(x, place(float(t))))

    kind = getattr(sample, f"{name}Sampler")
    run = kind(Denoiser(), order=order, steps=calls - 1, silent=True, dtype=torch.float64)
    ends = run(model.start(place.begin).double())
    return model.x0(ends, place(0.0)), model.calls


def _runs() -> Iterator[tuple[str, str, Callable[[Case, int], tuple[Tensor, int]]]]:
    yield "k-diffusion", "dpm_fast logsnr", lambda c, n: k_diffusion(c, "dpm_fast", "logsnr", n)
    for spacing in SPACINGS:
        for name in K:
            yield "k-diffusion", f"{name} {spacing}", lambda c, n, a=(name, spacing): k_diffusion(c, *a, n)  # type: ignore[misc]
        for name in AZULA:
            for order in (2, 3):
                label = f"{name}{order} {spacing}"
                yield "azula", label, lambda c, n, a=(name, order, spacing): azula(c, *a, n)  # type: ignore[misc]


def stepping() -> dict[solvers.Sampler, Callable[[], float]]:
    """Microseconds a step of theirs as :mod:`benchmarks.step_cost` measures ours: the network returns its input."""
    sampling, sample = (importlib.import_module(name) for name in ("k_diffusion.sampling", "azula.sample"))
    noise, posterior = importlib.import_module("azula.noise"), importlib.import_module("azula.denoise").DiracPosterior
    x, sigmas = torch.randn(step_cost.SHAPE), sampling.get_sigmas_karras(step_cost.STEPS, 0.01, 100.0)

    class Denoiser(nn.Module):
        schedule = noise.VPSchedule()

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return posterior(x)

    runs: dict[solvers.Sampler, Callable[[], float]] = {}
    for name in ("euler", "heun", "dpmpp_2m"):
        one = torch.no_grad()(getattr(sampling, f"sample_{name}"))
        runs["k-diffusion", name] = step_cost.timed(
            lambda one=one: one(lambda x, sigma: x, x, sigmas, disable=True), step_cost.STEPS
        )  # type: ignore[misc]
    for name, options in (("DDIM", {}), ("Heun", {}), ("xEAB", {"order": 2}), ("zEAB", {"order": 3})):
        kind = getattr(sample, f"{name}Sampler")
        made = kind(Denoiser(), steps=step_cost.STEPS, silent=True, **options)
        runs["azula", f"{name}{options.get('order', '')}"] = step_cost.timed(lambda made=made: made(x), step_cost.STEPS)  # type: ignore[misc]
    return runs


def crossing(calls: int = 8) -> list[dict[str, float]]:
    """End minus exact end of x = 1 on N(0, std^2), by std, of azula's vAB3 and of ``arc``: where an error changes its sign."""
    rows, begin = [], TABLE.coef(1.0)
    for std in (0.5, 0.6, 0.68, 0.7, 0.72, 0.8, 0.9):
        end = std / math.hypot(begin.alpha * std, begin.sigma)
        denoiser = Gaussian(torch.zeros(4), std * std).denoiser(TABLE)
        case = Case("one Gaussian", "exact", denoiser, torch.ones(1, 4), {}, torch.full((1, 4), end))
        theirs, _ = azula(case, "vAB", 3, "logsnr", calls)
        ours = sf.sample(denoiser, solver="arc", steps=calls, x=case.x, ctx=case.context())
        rows.append(
            {"std": std, **{k: solvers._short(float(v[0, 0]) - end) for k, v in (("vAB3", theirs), ("arc", ours))}}
        )
    return rows


def measure(quick: bool = False) -> dict[str, Any]:
    """Ratios of ``arc``, and of the best of our settings, over the best of the three libraries, and every figure."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows, about = [], []
    for case in solvers.cases(quick):
        about.append({"case": case.name, "kind": case.kind, "items": len(case.x)})
        for calls in solvers.CALLS:
            row = {"case": case.name, "budget": calls}
            rows.append({**row, "who": "sfumato", "sampler": "arc", **solvers.ours(case, "arc", calls)})
            rows += [*solvers.settings(case, (calls,)), *solvers.rivals(case, (calls,))]
            for who, name, run in _runs():
                ends, used = run(case, calls)
                if used > calls:
                    raise RuntimeError(f"{who} {name} made {used} calls of {calls}")
                rows.append({**row, "who": who, "sampler": name, **solvers.figures(case, ends, used)})
    against, best = solvers.ratios(rows, solvers.CALLS), solvers.ratios(rows, solvers.CALLS, solvers.SETTINGS)
    return {
        "cases": about,
        "summary": solvers.summary(against),
        "best summary": solvers.summary(best),
        "ratios": against,
        "best ratios": best,
        "crossing": crossing(),
        "costs": solvers.costs(3 if quick else 7, stepping()),
        "rows": rows,
    }


def main() -> None:
    """Measure and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases")
    parser.add_argument("--json", type=Path, help="write all figures here and print the summary only")
    given = parser.parse_args()
    found = measure(given.quick)
    if given.json is not None:
        given.json.write_text(solvers.dumped(found), "utf-8")
        found = {k: found[k] for k in ("summary", "best summary")}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
