"""Contexts: branches of memory, look-aheads, accepted steps, counted calls, replaced and forbidden draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato import grids, solvers
from sfumato.core import Context, Denoiser, InputError, Posterior, Wrapper, sample, trajectory
from sfumato.guidance import cfg
from sfumato.processes import VP, Euclidean, Flow


class Plain(Denoiser):
    """x0 = x / 2, whatever the time."""

    def __init__(self, process: Any = None) -> None:
        super().__init__()
        self.process, self.null = process or Flow(), {"label": 9}

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(x / 2, "x0", x, self.process.coef(t))


class Hook(Wrapper):
    """Does ``before(x, t, ctx)`` at each call."""

    def __init__(self, inner: Denoiser, before: Callable[..., Any]) -> None:
        super().__init__(inner)
        self.before = before

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Any:
        self.before(x, t, ctx)
        return self.inner(x, t, ctx)


def draw(denoiser: Denoiser, **options: Any) -> Tensor:
    options = {"shape": (2, 3)} | options
    solver = solvers.get(options.pop("solver", "ddim"))
    return sample(denoiser, solver, grids.get("uniform"), options.pop("steps", 4), **options)


def test_named_forks_are_branches_of_one_memory() -> None:
    ctx = Context.of(1)
    a, b = ctx.fork("a"), ctx.fork("b")
    a.memory["k"], b.memory["k"] = 1, 2
    a.fork("deeper").memory["k"] = 3
    assert ctx.memory == {"a": {"k": 1, "deeper": {"k": 3}}, "b": {"k": 2}}
    assert ctx.fork("a").memory is a.memory, "a second fork of a name is the same branch"
    assert ctx.fork().memory is ctx.memory, "without a name it is the same memory"
    assert a.run is ctx.run and a.rng is ctx.rng


def test_forks_change_conditions_taps_and_batch_and_nothing_else() -> None:
    ctx = Context.of(4, cond={"label": 1}, taps=(("a", print),))
    fork = ctx.fork(cond={"label": 2}, taps=[("b", repr)], batch=2)
    assert (fork.cond, fork.taps, fork.batch) == ({"label": 2}, (("a", print), ("b", repr)), 2)
    assert (ctx.cond, ctx.taps, ctx.batch) == ({"label": 1}, (("a", print),), 4)
    assert not fork.look


def test_a_look_ahead_leaves_no_trace_in_memory() -> None:
    """It sees what is remembered; what it writes, at any depth and in new branches, is scratch."""
    ctx = Context.of(1)
    ctx.memory.update(seen=1, branch={"deep": {"k": 1}})
    look = ctx.fork(look=True)
    assert look.memory == ctx.memory
    look.memory["seen"] = look.memory["branch"]["deep"]["k"] = 2
    look.fork("branch").memory["new"] = 3
    look.fork("other").memory["new"] = 4
    ctx.fork("third", look=True).memory["new"] = 5
    ctx.fork("branch", look=True).memory["deep"]["k"] = 6
    assert ctx.memory == {"seen": 1, "branch": {"deep": {"k": 1}}}
    assert look.fork("inside").look, "what a look-ahead calls is a look-ahead"


def test_accepted_steps_are_told_once_and_look_aheads_never() -> None:
    told: list[tuple[str, float, float]] = []

    def before(x: Tensor, t: float, ctx: Context) -> None:
        ctx.after(lambda x, s: told.append(("step", float(x[0, 0]), s)))
        ctx.fork(look=True).after(lambda x, s: told.append(("look", 0.0, s)))
        ctx.fork("inner").fork(look=True).fork("deeper").after(lambda x, s: told.append(("look", 0.0, s)))

    steps = list(trajectory(Hook(Plain(), before), solvers.get("heun"), grids.get("uniform"), 3, shape=(2, 3)))
    # Heun calls twice a step but on the last, which ends at sigma = 0: each call left a note, told when the step was taken.
    expected = [("step", float(st.x[0, 0]), st.t) for st in steps[1:] for _ in range(2 if st.t else 1)]
    assert told == expected


def test_what_is_asked_in_one_step_is_forgotten_in_the_next() -> None:
    """A request belongs to the step under way: it is not told again."""
    told: list[float] = []

    def before(x: Tensor, t: float, ctx: Context) -> None:
        if t == 1.0:
            ctx.after(lambda x, s: told.append(s))

    draw(Hook(Plain(), before))
    assert told == [0.75]


def test_calls_are_counted_in_rows_of_the_batch_by_the_innermost_denoiser() -> None:
    ctx = Context.of(2, cond={"label": torch.tensor([0, 1])})
    draw(cfg(3.0)(cfg(2.0)(Plain())), ctx=ctx)
    assert ctx.run.nfe == 4 * 4, "two guidances: four rows an item"
    ctx = Context.of(2)

    def look(x: Tensor, t: Any, ctx: Context) -> None:
        Plain()(x, t, ctx.fork(look=True))

    draw(Hook(Plain(), look), ctx=ctx)
    assert ctx.run.nfe == 8, "a look-ahead costs what it costs"


def test_the_run_tells_where_it_is() -> None:
    seen: list[Any] = []
    ctx = Context.of(2)
    draw(Hook(Plain(), lambda x, t, c: seen.append((c.run.step, c.run.total, c.run.t, c.run.s, t))), ctx=ctx)
    assert seen == [(0, 4, 1.0, 0.75, 1.0), (1, 4, 0.75, 0.5, 0.75), (2, 4, 0.5, 0.25, 0.5), (3, 4, 0.25, 0.0, 0.25)]


def test_noise_comes_first_and_wrappers_can_read_it() -> None:
    """At each call of the denoiser the noise of the step under way is already drawn."""
    seen: list[Tensor] = []
    ctx = Context.of(2)
    draw(Hook(Plain(), lambda x, t, c: seen.append(c.run.noise[-1])), solver="ddpm", ctx=ctx)
    assert len(seen) == 4 and torch.stack(seen).unique().numel() == 4 * 6


def test_a_source_replaces_or_records_every_draw() -> None:
    recorded: list[Tensor] = []

    def record(ctx: Context, fresh: Callable[[], Tensor]) -> Tensor:
        recorded.append(fresh())
        return recorded[-1]

    def replay(ctx: Context, fresh: Callable[[], Tensor]) -> Tensor:
        return next(again)

    first = draw(Plain(), solver="ddpm", ctx=Context.of(2, 5, source=record))
    assert torch.equal(first, draw(Plain(), solver="ddpm", seed=5)), "recording changes nothing"
    again = iter(recorded)
    assert torch.equal(first, draw(Plain(), solver="ddpm", ctx=Context.of(2, 77, source=replay)))
    assert len(recorded) == 5, "the prior and four steps"


def test_drawing_where_rows_are_stacked_is_refused() -> None:
    """Guidance doubles the rows; the streams are one an item."""

    def noisy(x: Tensor, t: Any, ctx: Context) -> None:
        ctx.draw(Euclidean(), x)

    cond = {"label": torch.tensor([0, 1])}
    with pytest.raises(InputError, match="4 rows from 2 streams.*never inside a denoiser that has stacked"):
        draw(cfg(2.0)(Hook(Plain(), noisy)), cond=cond)
    draw(cfg(2.0, batched=False)(Hook(Plain(), noisy)), cond=cond)


def test_a_context_without_seed_may_not_draw() -> None:
    ctx = Context.of(2, None)
    with pytest.raises(InputError, match="may not draw"):
        ctx.draw(Euclidean(), torch.ones(2, 3))
    with pytest.raises(InputError, match="may not draw"):
        draw(Plain(), ctx=Context.of(2, None))
    assert draw(Plain(), x=torch.ones(2, 3), shape=None, ctx=Context.of(2, None)).shape == (2, 3)


def test_a_euclidean_space_has_no_trees() -> None:
    with pytest.raises(InputError, match="Product"):
        Context.of(2).draw(Euclidean(), {"a": torch.ones(2, 3)})
    x, y = torch.ones(2), torch.full((2,), 3.0)
    assert torch.equal(Euclidean().exp(x, Euclidean().log(x, y)), y)


def test_memory_can_be_read_after_the_run_and_carried_into_the_next() -> None:
    def count(x: Tensor, t: Any, ctx: Context) -> None:
        ctx.memory["calls"] = ctx.memory.get("calls", 0) + 1

    ctx = Context.of(2)
    denoiser = Hook(Plain(VP()), count)
    draw(denoiser, ctx=ctx)
    assert ctx.memory == {"calls": 4} and ctx.run.nfe == 4
    draw(denoiser, ctx=ctx)
    assert ctx.memory == {"calls": 8} and ctx.run.nfe == 8
