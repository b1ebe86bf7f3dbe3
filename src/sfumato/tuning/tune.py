"""``sf.tune``: the best sampler of a number of calls for one model, told apart on noise that no method was fitted to."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sfumato import grids, solvers
from sfumato.core import Denoiser, InputError, Solver, Wrap, mix
from sfumato.solvers.empirical import DPMSolverV3
from sfumato.tuning import scales, search, statistics, steps, subspace
from sfumato.tuning.card import SamplerCard, described, fingerprint
from sfumato.tuning.target import Target, aim

METHODS = ("auto", "untuned", "dpm-solver-v3", "usf", "olss", "subspace", "autodiffusion")
GRIDS = ("arctan", "arc", "logsnr", "uniform", "quadratic", "karras", "quadratic(power=1.5)", "quadratic(power=3.0)")
EXTRA = (
    "dpm-solver++(order=3)", "dpm-solver++(order=2, variable='angle', corrector=True)",
    "dpm-solver++(order=3, variable='angle', corrector=True)", "dpm-solver++(order=3, form='v', variable='angle')",
    "dpm-solver++(order=2, form='noise')", "dpm-solver++(order=3, form='noise')",
)  # fmt: skip
# fitted terms larger than this times their sum cancel on what was seen only, and such a fit is not offered
TRUSTED = 5.0
Told = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Entry:
    """One sampler in the comparison; ``solver_spec`` where a name makes it."""

    method: str
    name: str
    solver: Solver
    times: tuple[float, ...]
    skips: tuple[tuple[str, ...], ...] = ()
    solver_spec: str | None = None
    grid_spec: str | None = None
    scales: scales.Scales = ()

    def denoiser(self, target: Target) -> Denoiser:
        """The target's denoiser, with blocks left out and skip connections scaled where this says so."""
        return scales.scaled(steps.planned(target.denoiser, self.skips), self.scales)


def tune(
    pipeline: Any, nfe: int = 10, method: str = "auto", *, shape: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None, cond: Mapping[str, Any] | None = None, guidance: float | str | None = None,
    items: int = 24, unseen: int = 64, fine: int = 64, budget: int = 60, rehearsals: int = 1500,
    by: Callable[[Tensor, Tensor], float] | None = None, seed: int = 0, model: str = "", told: Told | None = None,
) -> SamplerCard:  # fmt: skip
    """The sampler of ``nfe`` calls whose ends are nearest to those of the same model's fine solution.

    pipeline   a Pipeline, or a Denoiser with ``shape`` = (*), the event's shape
    method     'untuned' (registered solvers on grids), 'dpm-solver-v3' (with measured statistics), 'usf' (a schedule of
               strategies, for a UNet with skip coefficients), 'olss' (optimal linear subspace, as published), 'subspace' (the
               same fitted to its own states, on evolved times), 'autodiffusion' (evolved times for the pipeline's solver), or
               'auto': all of them
    prompts    what the model is told meanwhile (default: its classes or its table of captions, in turn)
    cond       raw conditions of a pipeline, or the tensors (n, *) of a Denoiser, whose rows are repeated
    guidance   the scale, or a spec such as "apg(scale=4)" (default: the pipeline's); another one wants another card
    items      starts to fit on, and as many others to choose on; ``unseen`` further ones for the figures that are reported
    fine       calls of the fine solution
    budget     true evaluations of each search; ``rehearsals`` further ones on a replay, without the network
    by         what chooses among the searches' offers: (a sampler's ends, the fine ones) (n, *) -> a figure, less is better,
               such as a distance between distributions. None: the score below
    seed       fitting, choosing and reporting noise are streams of mix(seed, 1), mix(seed, 2) and mix(seed, 3)
    told       hears {'stage', 'done', 'total', 'best', 'rows'} as it goes

    The score is the mean over items of the root mean square error, an item counting no more than the data's own scale. A
    sampler of stochastic steps has no trajectory to compare, so none is considered. Deterministic by seed. Raises InputError
    for an unknown method, and for too few calls, items or evaluations.
    """
    _checked(method, nfe, fine, items, unseen, budget, rehearsals)
    began, denoiser, event = time.perf_counter(), _guided(pipeline, guidance), _event(pipeline, shape)
    seeds = {role: mix(seed, part) for part, role in enumerate(("fitting", "choosing", "reporting"), 1)}

    def target(role: str, n: int) -> Target:
        given = _conditions(pipeline, n, prompts, cond, seeds[role])
        return aim(denoiser, (n, *event), seed=seeds[role], cond=given, steps=fine)

    watch = _Watch(told)
    watch("the fine solution", 0, 2)
    fitting, choosing = target("fitting", items), target("choosing", items)
    found = _candidates(
        method, fitting, choosing, _own(pipeline, fitting, nfe), nfe, budget, rehearsals, seed, by, watch
    )
    allowed = (e for key, e in found.items() if method in ("auto", key) or key == "default")
    best = min(allowed, key=watch.scores.__getitem__)
    watch("figures on unseen noise", 0, 1)
    reporting = target("reporting", unseen)
    rows = [_row(key, e, e is best, reporting, by) for key, e in found.items()]
    watch.final(rows)
    return _card(pipeline, best, rows, guidance, seeds, model=model, seconds=round(time.perf_counter() - began, 2))


def _checked(method: str, nfe: Any, fine: int, items: int, unseen: int, budget: int, rehearsals: int) -> None:
    """InputError for what :func:`tune` cannot do."""
    if method not in METHODS:
        raise InputError(f"method = {method!r}: one of {', '.join(METHODS)}")
    if not (isinstance(nfe, int) and 1 <= nfe < fine):
        raise InputError(f"nfe = {nfe}: a whole number of calls, at least 1 and fewer than the fine solution's {fine}")
    if items < 2 or unseen < 2:
        raise InputError(f"items = {items} and unseen = {unseen}: at least two each")
    if budget < 1 or rehearsals < 0:
        raise InputError(
            f"budget = {budget} and rehearsals = {rehearsals}: at least one evaluation, and no fewer than 0"
        )


def _event(pipeline: Any, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one item's state."""
    if not isinstance(pipeline, Denoiser):
        return tuple(pipeline.codec.shape(*pipeline.size))
    if shape is None:
        raise InputError("to tune a Denoiser give the shape of one item, shape=(channels, height, width)")
    return tuple(shape)


def _candidates(
    method: str, fitting: Target, choosing: Target, own: Entry | None, nfe: int, budget: int, rehearsals: int, seed: int,
    by: Callable[[Tensor, Tensor], float] | None, watch: _Watch,
) -> dict[str, Entry]:  # fmt: skip
    """The best entry of each method on the choosing noise, and the pipeline's own as 'default'."""
    found = {"default": own} if own is not None else {}
    wanted = METHODS[1:] if method == "auto" else ("untuned", method) if method != "untuned" else (method,)
    for name in wanted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of collinear readings: the choice on other noise tells
            for entry in FINDERS[name](fitting, nfe, own, budget, rehearsals, seed, watch):
                figures = _figures(choosing, entry, by)
                watch.row(entry, figures)
                if name not in found or figures["score"] < watch.scores[found[name]]:
                    found[name] = entry
    if own is not None:
        watch.row(own, _figures(choosing, own, by))
    return found


def _row(key: str, entry: Entry, chosen: bool, reporting: Target, by: Any) -> dict[str, Any]:
    """What the card says of an entry, on the reporting noise."""
    facts = {"method": key, "sampler": entry.name, "nfe": _calls(reporting, entry), "chosen": chosen}
    return facts | _figures(reporting, entry, by)


def _card(
    pipeline: Any, best: Entry, rows: list[dict[str, Any]], guidance: Any, seeds: dict[str, int], model: str, seconds: float
) -> SamplerCard:  # fmt: skip
    """The chosen entry as a card."""
    after = next(r for r in rows if r["chosen"])
    before = next((r for r in rows if r["method"] == "default"), next(r for r in rows if r["method"] == "untuned"))
    bare = pipeline if isinstance(pipeline, Denoiser) else pipeline.denoiser
    scale = guidance if guidance is not None else getattr(pipeline, "guidance", None)
    description, tensors = described(best.solver_spec or best.solver)
    return SamplerCard(
        made_by=after["method"], description=description, steps=len(best.times) - 1, nfe=after["nfe"],
        times=None if best.grid_spec else best.times, grid_spec=best.grid_spec, skips=best.skips, scales=best.scales, tensors=tensors,
        model=model, fingerprint=fingerprint(bare), process=repr(bare.process),
        guidance=float(scale) if isinstance(scale, (int, float)) else scale if isinstance(scale, str) else None, seeds=seeds,
        seconds=seconds, before=before, after=after, rows=rows,
    )  # fmt: skip


class _Watch:
    """Keeps the scores on the choosing noise and tells a listener."""

    def __init__(self, told: Told | None) -> None:
        self.told, self.rows, self.scores = told, list[dict[str, Any]](), dict[Entry, float]()

    def __call__(self, stage: str, done: int, total: int, best: float | None = None) -> None:
        if self.told is not None:
            self.told({"stage": stage, "done": done, "total": total, "best": best, "rows": list(self.rows)})

    def row(self, entry: Entry, figures: Mapping[str, Any]) -> None:
        """Note an entry's figures on the choosing noise."""
        self.scores[entry] = figures["score"]
        self.rows.append({"method": entry.method, "sampler": entry.name, "choosing": figures["score"]})
        self(entry.method, 1, 1, figures["score"])

    def final(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tell the rows of the card."""
        self.rows = [dict(r) for r in rows]
        self("done", 1, 1)

    def stage(self, name: str) -> Callable[[int, int, float], None]:
        """Progress of one search."""
        return lambda done, total, best: self(name, done, total, best)


def _untuned(
    target: Target, nfe: int, own: Entry | None, budget: int, rehearsals: int, seed: int, watch: _Watch
) -> Iterator[Entry]:
    """Registered solvers on grids: ranked by the replay, the first dozen truly evaluated, the best three offered."""
    replay, ranked = target.replay(), []
    for spec in (*solvers.names(), *EXTRA):
        solver = solvers.registry.make(spec)
        inner = solver
        while isinstance(inner, Wrap) and type(inner).times is Wrap.times:
            inner = inner.inner
        if solver.stochastic or not math.isfinite(solver.nfe) or type(inner).times is not Solver.times:
            continue
        for grid in GRIDS:
            entry = _counted(target, spec, solver, grid, nfe)
            if entry is not None:
                ranked.append((replay.error(entry.solver, entry.times), entry))
    ranked.sort(key=lambda pair: pair[0])
    scored = []
    for i, (foretold, entry) in enumerate(ranked[:12]):
        if math.isfinite(foretold):
            scored.append((target.score(target.errors(entry.solver, entry.times)), i, entry))
            watch("untuned", i + 1, 12, min(scored)[0])
    yield from (entry for _, _, entry in sorted(scored, key=lambda s: s[:2])[:3])


def _counted(target: Target, spec: str, solver: Solver, grid: str, nfe: int) -> Entry | None:
    """A solver on a grid with as many steps as ``nfe`` calls allow, or None where it cannot run here."""
    made, ends = grids.registry.make(grid), (target.times[0], target.times[-1])
    try:
        count = solvers.steps_within(solver, target.process, made, nfe, *ends)
        times = tuple(made(target.process, count, *ends).tolist())
    except (InputError, ZeroDivisionError, OverflowError):
        return None
    return Entry("untuned", f"{spec} on {grid}", solver, times, (), spec, grid)


def _empirical(
    target: Target, nfe: int, own: Entry | None, budget: int, rehearsals: int, seed: int, watch: _Watch
) -> Iterator[Entry]:
    """DPM-Solver-v3 with statistics of the model on its own fine ends, noised again; the best of its orders and grids."""
    measured = statistics.estimate(
        target.denoiser, target.ends, levels=40, probes=1, cond=target.cond, seed=mix(seed, 4)
    )
    scored: list[tuple[float, Entry]] = []
    kinds = {
        "order 2": DPMSolverV3(measured, 2),
        "order 3": DPMSolverV3(measured, 3),
        "order 3, pseudo": DPMSolverV3(measured, 3, "same", pseudo=True, taper=True),
    }
    for name, solver in kinds.items():
        for grid in GRIDS[:4]:
            times = tuple(grids.get(grid)(target.process, nfe, target.times[0], target.times[-1]).tolist())
            entry = Entry("dpm-solver-v3", f"{name} on {grid}", solver, times)
            scored.append((target.score(target.errors(solver, times)), entry))
            watch("dpm-solver-v3", len(scored), 12, min(score for score, _ in scored))
    yield min(scored, key=lambda pair: pair[0])[1]


def _usf(
    target: Target, nfe: int, own: Entry | None, budget: int, rehearsals: int, seed: int, watch: _Watch
) -> Iterator[Entry]:
    """The best three schedules that the search for strategies found, and with skip coefficients for a UNet."""
    found = search.strategies(target, nfe, budget=budget, rehearsals=rehearsals, seed=seed, told=watch.stage("usf"))
    for one, value in found.ranked[:3]:
        if math.isfinite(value):
            yield Entry("usf", f"schedule of {len(one.moves)} strategies", one.solver, one.times)
    if scales.possible(target.denoiser):
        best, name = found.best, f"schedule of {len(found.best.moves)} strategies with skip coefficients"
        climb = scales.coefficients(
            target, best.solver, best.times, budget=max(budget // 2, 1), seed=seed, told=watch.stage("usf")
        )
        yield Entry("usf", name, best.solver, best.times, scales=climb.best)


def _olss(
    target: Target, nfe: int, own: Entry | None, budget: int, rehearsals: int, seed: int, watch: _Watch
) -> Iterator[Entry]:
    """Linear subspaces as published, for each kind of reading that the model can say."""
    for form in ("noise", "data", "v"):
        try:
            made = subspace.fit(target, nfe, form=form)
        except InputError:
            continue  # this model does not say this reading at the first time
        if made.largest <= TRUSTED:
            yield Entry("olss", f"linear subspace, {form!r} readings", made.solver, made.times)


def _subspace(
    target: Target, nfe: int, own: Entry | None, budget: int, rehearsals: int, seed: int, watch: _Watch
) -> Iterator[Entry]:
    """Linear subspaces fitted to their own states on evolved times, with and without a free first step."""
    for free in (False, True):
        found = subspace.evolved(target, nfe, free=free, budget=max(budget // 4, 1), rehearsals=rehearsals // 3, seed=seed,
                                 told=watch.stage("subspace"))  # fmt: skip
        if found.largest <= TRUSTED:
            name = "linear subspace on evolved times" + ", first step free" * free
            yield Entry("subspace", name, found.solver, found.times)


def _autodiffusion(
    target: Target, nfe: int, own: Entry | None, budget: int, rehearsals: int, seed: int, watch: _Watch
) -> Iterator[Entry]:
    """Evolved times for the pipeline's own solver where it makes one call a step, else for DPM-Solver++ 2M."""
    spec = own.solver_spec if own is not None and own.solver_spec else "ddim"
    solver = solvers.registry.make(spec)
    if solver.stochastic or solver.nfe != 1:
        spec, solver = "dpm-solver++", solvers.get("dpm-solver++")
    pool = steps.uniform_pool(target)
    found = steps.steps(target, solver, nfe, pool=pool, budget=max(budget // 2, 1), rehearsals=rehearsals // 2,
                        population=min(12, budget), seed=seed, nudges=True,
                        told=watch.stage("autodiffusion"))  # fmt: skip
    yield Entry("autodiffusion", f"{spec} on evolved times", solver, found.best.times(pool, target.times[-1]), (), spec)


FINDERS = {
    "untuned": _untuned,
    "dpm-solver-v3": _empirical,
    "usf": _usf,
    "olss": _olss,
    "subspace": _subspace,
    "autodiffusion": _autodiffusion,
}


def _own(pipeline: Any, target: Target, nfe: int) -> Entry | None:
    """The pipeline's own sampler at this number of calls, or None where it draws noise or is no pipeline's."""
    spec, grid = getattr(pipeline, "solver", None), getattr(pipeline, "grid", None)
    if not (isinstance(spec, str) and isinstance(grid, str)) or solvers.registry.make(spec).stochastic:
        return None
    entry = _counted(target, spec, solvers.registry.make(spec), grid, nfe)
    return None if entry is None else replace(entry, method="default")


def _figures(target: Target, entry: Entry, by: Callable[[Tensor, Tensor], float] | None) -> dict[str, Any]:
    """Score (or the figure that chooses), median with its 95% interval, and rms of the errors."""
    ends = target.run(entry.solver, entry.times, entry.denoiser(target))
    errors = target.distance(ends)
    low, high = median_interval(errors)
    finite = errors.clamp(max=1e6)
    return {
        "score": target.score(errors) if by is None else _judged(by, ends, target), "median": float(finite.median()), "interval": [low, high],
        "rms": float(finite.square().mean().sqrt()), "n": len(errors),
    }  # fmt: skip


def _judged(by: Callable[[Tensor, Tensor], float], ends: Tensor, target: Target) -> float:
    """The figure that chooses; infinite where a run diverged."""
    return float(by(ends, target.ends)) if bool(ends.isfinite().all()) else math.inf


def median_interval(values: Tensor) -> tuple[float, float]:
    """The order statistics that enclose the median with probability 0.95 (normal approximation of the binomial)."""
    ordered, n = values.clamp(max=1e6).sort().values, len(values)
    half = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    return float(ordered[low]), float(ordered[high])


def _calls(target: Target, entry: Entry) -> int:
    """Calls of the guided denoiser: counted where a name makes the solver, else what the solver says."""
    solver, n = entry.solver, len(entry.times) - 1
    if entry.solver_spec is not None:
        ends = (entry.times[0], entry.times[-1])
        return round(solvers.calls(solver, target.process, grids.fixed(entry.times), n, *ends))
    return int(solver.calls(n)) if hasattr(solver, "calls") else round(solver.nfe * n)


def _guided(pipeline: Any, guidance: float | str | None) -> Denoiser:
    """The denoiser under its guidance, ready to be called."""
    if isinstance(pipeline, Denoiser):
        if guidance is not None:
            raise InputError("wrap a Denoiser in its guidance before tuning it: sf.guidance.cfg(scale)(denoiser)")
        return pipeline.eval()
    pipeline.denoiser.eval()
    return pipeline.guided(guidance)  # type: ignore[no-any-return]


def _conditions(
    pipeline: Any, n: int, prompts: Sequence[str] | None, cond: Mapping[str, Any] | None, seed: int
) -> dict[str, Any]:
    """What n items are told: rows of a Denoiser's conditions in turn; a pipeline's prompts in an order drawn by the seed."""
    if isinstance(pipeline, Denoiser):
        turn = {k: [i % len(v) for i in range(n)] for k, v in (cond or {}).items() if isinstance(v, Tensor)}
        return {k: v[turn[k]] if k in turn else v for k, v in (cond or {}).items()}
    return pipeline.conditions(n, pipeline.conditioner.in_turn(n, seed, prompts), **(cond or {}))  # type: ignore[no-any-return]
