"""The sampling loop: what it yields, what it refuses, and that it leaves the caller's gradient mode alone."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sfumato as sf
from sfumato import grids, oracles, solvers
from sfumato.core import Context, InputError, Solver, Step, Wrap, sample, trajectory
from sfumato.core.trees import column
from sfumato.processes import EDM, VP, Flow
from sfumato.solvers.exponential import Multistep

UNIFORM = grids.get("uniform")
GAUSSIAN = oracles.Gaussian([0.3, -0.5], [[0.8, 0.2], [0.2, 0.3]])


def denoiser(process: Any = None) -> oracles.Oracle:
    return GAUSSIAN.denoiser(process or VP())


def steps_of(solver: Any = "ddim", steps: Any = 4, **options: Any) -> list[Step]:
    options = {"shape": (2, 2)} | options
    if options.get("x") is not None:
        options.pop("shape")
    made = solvers.get(solver) if isinstance(solver, str) else solver
    return list(trajectory(options.pop("denoiser", denoiser()), made, options.pop("grid", UNIFORM), steps, **options))


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["ddim", "heun", "dpm-solver++"]))
def test_it_yields_the_start_and_every_step(n: int, start: float, stop: float, solver: str) -> None:
    if abs(start - stop) < 1e-6:
        return
    x = torch.ones(1, 2, dtype=torch.float64)
    steps = steps_of(solver, n, x=x, start=start, stop=stop)
    assert [s.index for s in steps] == list(range(n + 1))
    assert steps[0].x is x and (steps[0].t, steps[-1].t) == (start, stop)
    signs = {math.copysign(1, b.t - a.t) for a, b in zip(steps, steps[1:], strict=False)}
    assert signs == {math.copysign(1, stop - start)}
    assert all(isinstance(s.t, float) for s in steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps = 0: give a whole number, at least 1"),
        ({"steps": -3}, "at least 1"),
        ({"steps": 2.5}, "give a whole number"),
        ({"steps": "4"}, "give a whole number"),
        ({"start": 1.5}, r"start = 1.5, stop = 0.0: two different times in \[0, 1\]"),
        ({"stop": -0.1}, "two different times"),
        ({"start": 0.5, "stop": 0.5}, "two different times"),
        ({"start": math.nan}, "two different times"),
        ({"shape": None}, "not both or neither"),
        ({"shape": ()}, r"a tensor \(B, \*\) of at least one item"),
        ({"shape": 3}, "of at least one item"),
        ({"shape": (0, 2)}, "of at least one item"),
        ({"shape": (-1, 2)}, "of at least one item"),
        ({"shape": (2.0, 2)}, "of at least one item"),
        ({"x": torch.empty(0, 2)}, "of at least one item"),
        ({"x": torch.tensor(1.0)}, "of at least one item"),
        ({"x": [[1.0, 2.0]]}, "of at least one item"),
        ({"x": torch.ones(2, 3)}, r"lives on \(2,\), not on \(3,\)"),
        ({"x": torch.ones(2, 2, dtype=torch.int64)}, "floating point"),
        ({"seed": [1]}, "1 seeds for 2 items"),
        ({"seed": 1.5}, "one whole number"),
        ({"grid": lambda p, n, a, b: torch.tensor([a, 0.2, 0.6, b])}, "not strictly monotone"),
        ({"grid": lambda p, n, a, b: torch.tensor([a, 0.5, 0.5, b])}, "not strictly monotone"),
        ({"grid": grids.fixed([1.0, 0.5, 0.0])}, "a fixed grid of 2 steps from 1.0 to 0.0 cannot serve 4 steps"),
        ({"start": 0.0, "stop": 1.0, "solver": "ddpm"}, "draws noise and only runs towards data"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        steps_of(**options)


def test_a_start_is_drawn_or_given_never_both() -> None:
    with pytest.raises(InputError, match="not both or neither"):
        list(trajectory(denoiser(), solvers.get("ddim"), UNIFORM, 4, shape=(2, 2), x=torch.ones(2, 2)))


def test_the_prior_is_scaled_noise_in_the_dtype_asked_for() -> None:
    for process in (VP(), EDM(), Flow()):
        first = steps_of(denoiser=denoiser(process), shape=(4000, 2), dtype=torch.float64)[0]
        sigma = process.coef(1.0).sigma
        assert first.x.dtype == torch.float64
        assert torch.allclose(first.x.std(0), torch.full((2,), sigma).double(), rtol=0.06)
        plain = steps_of(denoiser=denoiser(process), shape=(4000, 2))[0]
        assert plain.x.dtype == torch.float32 and torch.allclose(plain.x.double(), first.x, rtol=1e-6)


def test_a_given_state_is_used_as_it_is() -> None:
    x = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    steps = steps_of(x=x, start=0.7)
    assert steps[0].x is x and torch.equal(x, kept) and steps[-1].x.dtype == torch.float64


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_gradient_mode_never_leaks(grad: bool, outside: bool) -> None:
    """Inside a step it is what was asked for; between steps, after errors and after an abandoned run it is the caller's."""
    inside: list[bool] = []

    class Watch(oracles.Oracle):
        def forward(self, x: Tensor, t: Any, ctx: Context) -> Any:
            inside.append(torch.is_grad_enabled())
            if len(inside) == 7:
                raise RuntimeError("broken")
            return super().forward(x, t, ctx)

    with torch.set_grad_enabled(outside):
        x = torch.ones(2, 2, requires_grad=True)
        for solver in ("ddim", "ddpm", "heun"):
            run = trajectory(
                Watch(GAUSSIAN, VP()), solvers.get(solver), UNIFORM, 3, x=x, start=0.8, stop=0.2, grad=grad
            )
            try:
                for st in run:
                    assert torch.is_grad_enabled() is outside
                    assert st.index == 0 or st.x.requires_grad is grad
            except RuntimeError:
                pass
            assert torch.is_grad_enabled() is outside
        assert set(inside) == {grad} and len(inside) == 7
        abandoned = trajectory(denoiser(), solvers.get("ddim"), UNIFORM, 3, x=x, grad=grad)
        next(abandoned), next(abandoned)
        abandoned.close()
        assert torch.is_grad_enabled() is outside


def test_two_runs_can_be_stepped_in_turns() -> None:
    """A trajectory holds nothing outside itself."""
    alone = [steps_of("ddpm", seed=s)[-1].x for s in (1, 2)]
    runs = [trajectory(denoiser(), solvers.get("ddpm"), UNIFORM, 4, shape=(2, 2), seed=s) for s in (1, 2)]
    for _ in range(5):
        lasts = [next(run) for run in runs]
    assert all(torch.equal(st.x, x) for st, x in zip(lasts, alone, strict=True))


def test_a_step_resumes_only_where_it_was_left() -> None:
    steps = steps_of("dpm-solver++", 6)
    *_, last = trajectory(denoiser(), solvers.get("dpm-solver++"), UNIFORM, 6, x=steps[2])
    assert torch.equal(last.x, steps[-1].x)
    only = steps_of("dpm-solver++", 6, x=steps[-1])
    assert [st.index for st in only] == [6], "a finished run is finished"
    with pytest.raises(InputError, match=r"cannot resume here at t = .*start anew with Step.restart\(\)"):
        steps_of("dpm-solver++", 5, x=steps[2])  # another grid
    with pytest.raises(InputError, match="cannot resume here"):
        steps_of("dpm-solver++", 2, x=steps[4])  # beyond its end
    with pytest.raises(InputError, match="cannot resume here"):
        steps_of("dpm-solver++", 6, x=steps[-1], start=0.0, stop=1.0)  # the other way round without restart()


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver++"])
def test_an_inverted_step_restarts(solver: str) -> None:
    x0 = GAUSSIAN.sample(5, seed=1)
    last = steps_of(solver, 60, x=x0, start=0.0, stop=1.0)[-1]
    with pytest.raises(InputError, match="cannot resume"):
        steps_of(solver, 60, x=last)
    again = last.restart()
    assert again.index == 0 and again.x is last.x and again.t == 1.0
    back = steps_of(solver, 60, x=pickle.loads(pickle.dumps(again)))[-1]
    assert (back.x - x0).abs().median() < 0.1


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_restarted_history_never_holds_one_time_twice(order: int) -> None:
    """A multistep method that goes back over the times it came from."""
    x, solver = GAUSSIAN.sample(5, seed=1), Multistep(order=order)
    up = steps_of(solver, 60, x=x, start=0.05, stop=0.9)[-1]
    back = steps_of(solver, 60, x=up.restart(), start=0.9, stop=0.05)[-1]
    assert (back.x - x).abs().max() < 0.01


@dataclass(frozen=True)
class Twice(Wrap):
    """Every interval in two halves: what a steering looks like."""

    inner: Solver

    def step(self, st: Step, s: Any, denoiser: Any, ctx: Context) -> Step:
        middle = self.inner.step(st, (st.t + s) / 2, denoiser, ctx)
        return self.inner.step(middle, s, denoiser, ctx)


def test_a_wrap_is_its_inner_solver_but_for_what_it_overrides() -> None:
    inner = solvers.get("dpm-solver++", order=3)
    wrapped = Twice(inner)
    assert (wrapped.order, wrapped.nfe, wrapped.stochastic) == (3, 1.0, False)
    assert not wrapped.reversible, "to be undone a wrap must say how"
    with pytest.raises(InputError, match="no exact inverse"):
        wrapped.inverse()
    x = torch.ones(2, 2, dtype=torch.float64)
    fine = steps_of(inner, 8, x=x)[-1]
    assert torch.equal(steps_of(wrapped, 4, x=x)[-1].x, fine.x)


def test_a_solver_must_arrive_where_it_was_sent() -> None:
    @dataclass(frozen=True)
    class Short(Solver):
        def step(self, st: Step, s: Any, denoiser: Any, ctx: Context) -> Step:
            return Step(st.x, (st.t + s) / 2)

    with pytest.raises(InputError, match="cannot resume"):
        steps_of(Short())
    with pytest.raises(NotImplementedError, match="Solver must say how it moves"):
        steps_of(Solver())


def test_solvers_may_choose_their_own_times() -> None:
    @dataclass(frozen=True)
    class Thirds(Wrap):
        inner: Solver = solvers.get("ddim")

        def times(self, process: Any, grid: Any, x: Any, ctx: Context) -> Any:
            yield from (2 / 3, 1 / 3, 0.0)

    steps = steps_of(Thirds(), 50)
    assert [s.t for s in steps] == [1.0, 2 / 3, 1 / 3, 0.0]
    assert torch.equal(steps_of(Thirds(), 50, x=steps[1])[-1].x, steps[-1].x)


@dataclass(frozen=True)
class Bridge(Flow):
    """x_t = (1 - t) x0 + t eps + sin(3 t) x1: an anchored law, 0 at clean data."""

    def anchor(self, t: Any, cond: Any, derivative: bool = False) -> Any:
        if "anchor" not in cond:
            return None
        m: Any = torch if isinstance(t, Tensor) else math
        return column(3 * m.cos(3 * t) if derivative else m.sin(3 * t), cond["anchor"]) * cond["anchor"]


def test_an_anchor_is_seen_by_the_network_the_start_and_the_result_only() -> None:
    """Solvers move x - beta x1: with raw states outside, a run is the unanchored one plus the anchor at its end."""
    from sfumato.denoisers import parametrized

    process, anchor = Bridge(), torch.tensor([[5.0, -4.0], [1.0, 2.0]]).double()
    seen: list[Tensor] = []

    class Raw(torch.nn.Module):
        """Exact on raw states: takes the anchor off by itself."""

        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            t = float(label[0])
            seen.append(x)
            out = oracles.Oracle(GAUSSIAN, Flow())(x - math.sin(3 * t) * anchor, t, Context.of(2, None)).view(self.kind)
            return out + 3 * math.cos(3 * t) * anchor if self.kind == "flow" else out

    for kind in ("x0", "flow", "v"):
        for name in solvers.names():
            solver, raw = solvers.get(name), torch.tensor([[0.4, 1.0], [-1.0, 0.3]]).double()
            start, stop = 0.8, 0.3
            options = {"start": start, "stop": stop, "seed": 3}
            plain = sample(denoiser(Flow()), solver, UNIFORM, 4, x=raw - math.sin(3 * start) * anchor, **options)
            y = sample(
                parametrized(Raw(kind), process, kind), solver, UNIFORM, 4, x=raw, cond={"anchor": anchor}, **options
            )
            assert torch.allclose(y, plain + math.sin(3 * stop) * anchor, rtol=1e-6, atol=1e-6), (kind, name)
            assert name != "ddim" or torch.allclose(seen[0], raw)
            seen.clear()


@pytest.mark.parametrize("batch", [1, 2, 5, 99])
def test_chunks_give_what_one_batch_gives(batch):
    denoiser = sf.oracles.GaussianMixture([[-2.0, 0.0], [2.0, 1.0]], [0.3, 0.5]).denoiser(sf.processes.VP())
    run = {"solver": "ddpm", "steps": 4, "seed": 3}
    whole = sf.sample(denoiser, shape=(5, 2), **run)
    assert torch.equal(sf.sample(denoiser, shape=(5, 2), batch=batch, **run), whole)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sf.sample(denoiser, x=x, batch=batch, **run), sf.sample(denoiser, x=x, **run))
    seeds = [4, 5, 6, 7, 8]
    options = {**run, "seed": seeds, "shape": (5, 2)}
    assert torch.equal(sf.sample(denoiser, batch=batch, **options), sf.sample(denoiser, **options))


def test_chunks_are_refused_where_they_mean_nothing():
    denoiser = sf.oracles.Gaussian([0.0], [[1.0]]).denoiser(sf.processes.VP())
    with pytest.raises(sf.SfumatoError, match="at least 1"):
        sf.sample(denoiser, shape=(2, 1), batch=0)
    with pytest.raises(sf.SfumatoError, match="leave out batch"):
        sf.sample(denoiser, x=sf.Step(torch.zeros(2, 1), 1.0), batch=1)
    with pytest.raises(sf.SfumatoError, match="not both or neither"):
        sf.sample(denoiser, batch=1)


def test_a_slice_of_streams_is_a_seed():
    from sfumato.core import Streams

    streams = Streams.of(7, 6)
    part = Streams.of(streams.select(slice(2, 5)), 3)
    like = torch.zeros(3, 4)
    assert torch.equal(part.normal(like), Streams.of(7, 6).normal(torch.zeros(6, 4))[2:5])
    with pytest.raises(sf.SfumatoError, match="3 seeds for 2 items"):
        Streams.of(streams.select(slice(0, 3)), 2)
