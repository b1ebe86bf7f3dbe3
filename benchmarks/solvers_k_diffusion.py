"""``arc``, and the best of our settings, against k-diffusion and azula on the exact cases of :mod:`benchmarks.solvers_cases`.

k-diffusion needs torchvision, which this project does not, so this has an environment of its own:

    python -m venv .venv-peers
    .venv-peers/bin/pip install -e '.[bench,science]' k-diffusion azula
    .venv-peers/bin/python -m benchmarks.solvers_k_diffusion [--json FILE]

Both are run on Karras' spacing and on equal steps in lambda between the ends of diffusers' linear schedule (sigma / alpha
from 157 to 0.01), with a last step or a last reading of x0 at the cleanest level, within the same number of calls.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sfumato as sf
from benchmarks import solvers
from benchmarks.solvers_cases import EXACT, TABLE, Case, exact
from sfumato.denoisers.oracles import Gaussian

LOW, HIGH = (-TABLE.coef(t).lam for t in (1 / TABLE.steps, 1.0))  # log(sigma / alpha) at the two ends
SPACINGS = ("karras", "logsnr")
TWO_CALLS = ("heun", "dpm_2", "dpmpp_2s")
K = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m", "dpmpp_2s", "dpm_fast")
AZULA = ("zAB", "vAB", "zEAB", "xEAB", "REAB")


class Model:
    """A case's denoiser as both libraries ask it, at a host float; counts its calls."""

    def __init__(self, case: Case) -> None:
        self.case, self.ctx, self.calls = case, case.context(), 0

    def x0(self, x: Tensor, lam: float) -> Tensor:
        """E[x0 | x] of the variance-preserving state."""
        self.calls += 1
        return self.case.denoiser(x, min(TABLE.time(lam), 1.0), self.ctx).view("x0")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """k-diffusion's: the state is x / alpha."""
        lam = -math.log(float(sigma[0]))
        return self.x0(x / math.hypot(1.0, float(sigma[0])), lam)


def k_diffusion(case: Case, name: str, spacing: str, calls: int) -> tuple[Tensor, int]:
    """(ends, calls) of one of k-diffusion's samplers without noise."""
    sampling = importlib.import_module("k_diffusion.sampling")
    model, low, high = Model(case), math.exp(LOW), math.exp(HIGH)
    x = case.x * math.hypot(1.0, high)
    if name == "dpm_fast":
        ends = sampling.sample_dpm_fast(model, x, low, high, calls - 1, disable=True)
        return model(ends, torch.full((1,), low)), model.calls
    steps = (calls + 1) // 2 if name in TWO_CALLS else calls
    make = sampling.get_sigmas_karras if spacing == "karras" else sampling.get_sigmas_exponential
    sigmas = make(steps, low, high)
    run = getattr(sampling, "sample_dpmpp_2s_ancestral" if name == "dpmpp_2s" else f"sample_{name}")
    options = {"eta": 0.0} if name == "dpmpp_2s" else {}
    return run(model, x, sigmas, disable=True, **options), model.calls


def azula(case: Case, name: str, order: int, spacing: str, calls: int) -> tuple[Tensor, int]:
    """(ends, calls) of one of azula's multistep samplers."""
    sample, model = importlib.import_module("azula.sample"), Model(case)
    place = _karras if spacing == "karras" else _logsnr

    class Denoiser(nn.Module):
        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            lam = torch.tensor([place(float(v)) for v in t.flatten()], dtype=torch.float64).reshape(t.shape)
            return torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return importlib.import_module("azula.denoise").DiracPosterior(model.x0(x.float(), place(float(t))))

    kind = getattr(sample, f"{name}Sampler")
    run = kind(Denoiser(), order=order, steps=calls - 1, silent=True, dtype=torch.float64)
    ends = run(case.x.double())
    return model.x0(ends.float(), place(0.0)), model.calls


def _logsnr(t: float) -> float:
    return -(LOW + t * (HIGH - LOW))


def _karras(t: float) -> float:
    low, high = math.exp(LOW / 7), math.exp(HIGH / 7)
    return -7 * math.log(low + t * (high - low))


def _runs() -> Iterator[tuple[str, str, Callable[[Case, int], tuple[Tensor, int]]]]:
    for spacing in SPACINGS:
        for name in K:
            yield "k-diffusion", f"{name} {spacing}", lambda c, n, a=(name, spacing): k_diffusion(c, *a, n)  # type: ignore[misc]
        for name in AZULA:
            for order in (2, 3):
                label = f"{name}{order} {spacing}"
                yield "azula", label, lambda c, n, a=(name, order, spacing): azula(c, *a, n)  # type: ignore[misc]


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


def measure(n: int = 64) -> dict[str, Any]:
    """Ratios of ``arc``, and of the best of our settings, over the best of both libraries, and every figure."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for case_name in EXACT:
        case = exact(case_name, n)
        for calls in solvers.CALLS:
            row = {"case": case.name, "budget": calls}
            rows.append({**row, "who": "sfumato", "sampler": "arc", **solvers.ours(case, "arc", calls)})
            rows += solvers.settings(case, (calls,))
            for who, name, run in _runs():
                ends, used = run(case, calls)
                if used > calls:
                    raise RuntimeError(f"{who} {name} made {used} calls of {calls}")
                rows.append({**row, "who": who, "sampler": name, **solvers.figures(case, ends, used)})
    against, best = solvers.ratios(rows, solvers.CALLS), solvers.ratios(rows, solvers.CALLS, solvers.SETTINGS)
    return {
        "summary": solvers.summary(against),
        "best summary": solvers.summary(best),
        "ratios": against,
        "best ratios": best,
        "crossing": crossing(),
        "rows": rows,
    }


def main() -> None:
    """Measure and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write all figures here and print the summary only")
    given = parser.parse_args()
    found = measure(given.items)
    if given.json is not None:
        given.json.write_text(solvers.dumped(found), "utf-8")
        found = {k: found[k] for k in ("summary", "best summary")}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
