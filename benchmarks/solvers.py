"""Our solvers and diffusers' schedulers in one process, on the same exact denoisers and the same bundled networks.

Error is the distance of an item to the end of its probability flow (:mod:`benchmarks.solvers_cases`), its median with a
95 % interval and its rms; also sliced Wasserstein distance to those ends, and of every solver the microseconds a step costs
outside the network (:mod:`benchmarks.step_cost`) and the memory a run needs. Nothing is tuned, and two ratios are taken over
whichever peer is best at that case and number of calls: of ``arc`` on its own grid, one setting against all of theirs, and of
the best of :data:`SETTINGS`, no more settings than theirs. k-diffusion and azula need torchvision and so an environment of
their own, where all three are run: ``benchmarks/solvers_k_diffusion.py``.

    python -m benchmarks.solvers [--quick] [--tuned] [--json docs/samplers.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sfumato as sf
from benchmarks import solvers_peers as peers
from benchmarks import step_cost
from benchmarks.diffusers_pipelines import megabytes
from benchmarks.solvers_cases import EXACT, SEED, TRAINED, Case, exact, trained
from sfumato.core import mix
from sfumato.evaluation.metrics import sliced_wasserstein

Sampler = tuple[str, str]  # who, and its name there
OURS = ("arc", "dpm-solver++", "dpm-solver++(order=3)", "unipc", "deis", "ddim", "pndm", "dpm-solver++2s", "heun")
BEST, CALLS, TUNED = "arc", (5, 8, 10, 15, 20), (5, 8, 10)
FORMULA = "dpm-solver++(order={}, form='{}', variable='{}', corrector=True{})"
ENDS = f"lam_max={math.log(100):.12g}"  # the cleanest level of diffusers' table but the last
# "best of ours": fixed settings, of which there are as many as the peers have where they have fewest
SETTINGS = {
    "arc": ("arc", "arc"),
    "noise 3, logsnr": ("dpm-solver++(order=3, form='noise')", f"logsnr({ENDS})"),
    "noise 3, karras": ("dpm-solver++(order=3, form='noise')", f"karras({ENDS})"),
    "noise 2, logsnr": ("dpm-solver++(order=2, form='noise')", f"logsnr({ENDS})"),
    "line 3, logsnr": ("dpm-solver++(order=3, form='line', variable='fraction')", f"logsnr({ENDS})"),
    "data 2 in soft": (FORMULA.format(2, "data", "soft", ", last=2"), "arc"),
    "v 2 in lambda": (FORMULA.format(2, "v", "lambda", ""), "arc"),
    "v 3 in the angle": (FORMULA.format(3, "v", "angle", ", last=2"), "arc"),
    "line 3 in the angle": (FORMULA.format(3, "line", "angle", ", last=2"), "arc"),
}
# what the polynomial is of and in, all else being the same: order 3, corrected, last step of order 2, grid arctan
ABLATION = {
    f"{form}, {variable}": FORMULA.format(3, form, variable, ", last=2")
    for form in ("data", "v")
    for variable in ("lambda", "angle", "soft")
}
ABLATED = 10
QUICK = ("16 peaks", "Gaussian, spectrum", "digits")
BUDGET = {"geometric mean": 0.35, "worst": 1.0, "tuned": 0.2, "tuned, trained": 0.5}
COSTS = {
    "DDIM": "DDIMScheduler",
    "PNDM": "PNDMScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "DPM++ 2S": "DPMSolverSinglestepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "DEIS": "DEISMultistepScheduler",
    "Heun": "HeunDiscreteScheduler",
}


def cases(quick: bool = False) -> Iterator[Case]:
    """The cases, made as they are needed."""
    for name in EXACT:
        if not quick or name in QUICK:
            yield exact(name, n=32 if quick else 64)
    for name, (n, steps) in TRAINED.items():
        if not quick or name in QUICK:
            yield trained(name, n, steps)


def rows(case: Case, calls: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row a sampler and budget; a solver that refuses says why."""
    for spec in OURS:
        for n in calls:
            yield {"case": case.name, "who": "sfumato", "sampler": spec, "budget": n, **ours(case, spec, n)}
    yield from settings(case, calls)
    yield from rivals(case, calls)


def rivals(case: Case, calls: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row for each of diffusers' schedulers and budget."""
    for name in peers.names(case):
        for n in calls:
            ends, used = peers.run(name, case, n)
            yield {"case": case.name, "who": "diffusers", "sampler": name, "budget": n, **figures(case, ends, used)}


def settings(case: Case, calls: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row for each of :data:`SETTINGS` but "arc", and budget."""
    for name, (spec, grid) in SETTINGS.items():
        for n in calls if name != BEST else ():
            yield {"case": case.name, "who": "sfumato", "sampler": name, "budget": n, **ours(case, spec, n, grid)}


def ours(case: Case, spec: str, calls: int, spaced: str | None = None) -> dict[str, Any]:
    """The figures of one of our solvers, or why it refuses; on its own grid unless another is given."""
    try:
        solver = sf.solvers.registry.make(spec)
        grid = sf.grids.registry.make(spaced or solver.grid or "arctan")
        steps = sf.solvers.steps_within(solver, case.denoiser.process, grid, calls)
        ctx = case.context()
        ends = sf.sample(case.denoiser, solver=solver, grid=grid, steps=steps, x=case.x, ctx=ctx)
    except sf.core.InputError as error:
        return {"refused": str(error)}
    return figures(case, ends, round(ctx.run.nfe))


def figures(case: Case, ends: Tensor, calls: int) -> dict[str, Any]:
    """Median error with its interval, rms, and sliced Wasserstein distance."""
    errors = case.errors(ends).clamp(max=1e3)
    low, middle, high = median(errors)
    sets, groups = (ends.double().flatten(1), case.ends.flatten(1)), min(10, len(errors) // 2)
    distance = sliced_wasserstein(*sets, groups=groups).value if float(errors.max()) < 1e3 else 1e3
    rms = float(errors.square().mean().sqrt())
    return {"calls": calls} | {
        k: _short(v) for k, v in {"median": middle, "low": low, "high": high, "rms": rms, "distance": distance}.items()
    }


def median(errors: Tensor) -> tuple[float, float, float]:
    """(low, median, high): order statistics that enclose the median with probability 0.95."""
    ordered, n = errors.sort().values, len(errors)
    half = 0.98 * math.sqrt(n)
    low, high = ordered[max(0, math.floor(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]
    return float(low), float(errors.quantile(0.5)), float(high)


def ratios(
    found: Sequence[dict[str, Any]], calls: Sequence[int], mine: Collection[str] = (BEST,)
) -> list[dict[str, Any]]:
    """For each case and number of calls: the best of these of ours over the best of all peers, by median and by rms."""
    out = []
    for case in dict.fromkeys(row["case"] for row in found):
        for n in calls:
            here = [row for row in found if row["case"] == case and row["budget"] == n and "median" in row]
            own = [row for row in here if row["who"] == "sfumato" and row["sampler"] in mine]
            theirs = [row for row in here if row["who"] != "sfumato"]
            best, rival = (min(rows, key=lambda row: row["median"]) for rows in (own, theirs))
            out.append(
                {"case": case, "calls": n, "ours": best["median"], "sampler": best["sampler"]}
                | {"peer": rival["median"], "best peer": rival["sampler"]}
                | {"ratio": _short(best["median"] / rival["median"])}
                | {"rms ratio": _short(min(row["rms"] for row in own) / min(row["rms"] for row in theirs))}
            )
    return out


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and worst of the ratios, and of those by rms."""
    worst = max(found, key=lambda row: row["ratio"])
    return {
        "geometric mean": _short(statistics.geometric_mean(row["ratio"] for row in found)),
        "worst": worst["ratio"],
        "worst at": f"{worst['case']}, {worst['calls']} calls",
        "above 1": sum(row["ratio"] > 1 for row in found),
        "of": len(found),
        "geometric mean of rms": _short(statistics.geometric_mean(row["rms ratio"] for row in found)),
    }


def costs(rounds: int = 7, more: Mapping[Sampler, Callable[[], float]] | None = None) -> list[dict[str, Any]]:
    """Microseconds a step outside the network and peak kilobytes of a run, on a (4, 3, 32, 32) tensor; of ``more`` too."""
    import diffusers

    runs: dict[Sampler, Callable[[], float]] = {}
    for spec in OURS:
        runs["sfumato", spec] = step_cost.ours(spec)
    for name, kind in COSTS.items():
        options = {"clip_sample": False} if kind == "DDIMScheduler" else {}
        runs["diffusers", name] = step_cost._peer(getattr(diffusers, kind)(**options))
    runs |= more or {}
    times: dict[Sampler, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(run())
    return [
        {"who": who, "sampler": name, "microseconds": round(statistics.median(times[who, name]), 1)}
        | {"kilobytes": round(1000 * megabytes(run), 1)}
        for (who, name), run in runs.items()
    ]


def tuned(case: Case, found: Sequence[dict[str, Any]], calls: Sequence[int] = TUNED) -> Iterator[dict[str, Any]]:
    """``sf.tune`` on noise of its own, reported on the case's starts, against the best untuned peer on the same."""
    for n in calls:
        began = time.process_time()
        settings = {"rehearsals": 600, "items": 16, "unseen": 8, "budget": 40, "seed": mix(SEED, 2)}
        if case.kind == "trained":
            card = sf.tune(sf.load(case.name), n, guidance=1.0, **settings)
        else:
            card = sf.tune(case.denoiser, n, shape=case.x.shape[1:], **settings)
        ctx = case.context()
        ends = sf.sample(case.denoiser, solver=card.solver(), grid=card.grid(), steps=card.steps, x=case.x, ctx=ctx)
        seconds = round(time.process_time() - began, 1)
        own = figures(case, ends, round(ctx.run.nfe))
        here = [row for row in found if (row["case"], row["budget"], row["who"]) == (case.name, n, "diffusers")]
        rival = min(here, key=lambda row: row["median"])
        after = next(row for row in card.rows if row["chosen"])
        yield {"case": case.name, "kind": case.kind, "budget": n, "method": after["method"], "sampler": after["sampler"], **own} | {
            "peer": rival["median"], "best peer": rival["sampler"], "ratio": _short(own["median"] / rival["median"]),
            "rms ratio": _short(own["rms"] / min(row["rms"] for row in here)), "seconds": seconds,
        }  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def measure(quick: bool = False, tune: bool = False) -> dict[str, Any]:
    """All figures, as JSON values."""
    import diffusers

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    began, found, better = time.process_time(), list[dict[str, Any]](), list[dict[str, Any]]()
    about, parts = [], []
    for case in cases(quick):
        found += rows(case, CALLS)
        for name, spec in ABLATION.items():
            parts.append({"case": case.name, "polynomial": name, **ours(case, spec, ABLATED)})
        about.append({"case": case.name, "kind": case.kind, "items": len(case.x), "spread": _short(case.spread)})
        if tune:
            better += tuned(case, found)
    against, best = ratios(found, CALLS), ratios(found, CALLS, SETTINGS)
    return {
        "versions": {"torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__},
        "budget": BUDGET,
        "cases": about,
        "summary": summary(against),
        "best summary": summary(best),
        "settings": {name: f"{spec} on {grid}" for name, (spec, grid) in SETTINGS.items()},
        "tuned summary": {
            kind: summary([{**row, "calls": row["budget"]} for row in better if kind in ("all", row["kind"])])
            for kind in ("all", "exact", "trained")
        }
        if better
        else None,
        "ratios": against,
        "best ratios": best,
        "tuned": better,
        "ablated": ABLATED,
        "ablation": parts,
        "costs": costs(3 if quick else 7),
        "rows": found,
        "seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    """Measure and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases")
    parser.add_argument("--tuned", action="store_true", help="tune for every case too: some minutes more")
    parser.add_argument("--json", type=Path, help="write all figures here and print the summary only")
    given = parser.parse_args()
    found = measure(given.quick, given.tuned)
    if given.json is not None:
        given.json.write_text(dumped(found), "utf-8")
        found = {k: found[k] for k in ("summary", "best summary", "tuned summary", "seconds")}
    print(json.dumps(found, indent=1))


def dumped(found: dict[str, Any]) -> str:
    """JSON with one row a line."""
    parts = []
    for key, value in found.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in value)
            parts.append(f' "{key}": [\n{lines}\n ]')
        else:
            parts.append(f' "{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
