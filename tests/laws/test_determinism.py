"""Item i never depends on the batch, a seed is a result, a Step is a whole resume, threads never meet."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from sweep import (
    PROCESSES,
    STOCHASTIC,
    ClassMixture,
    every_solver,
    keeps_grid,
    make,
    mixture,
    network,
    normal,
    run,
    three_processes,
)
from torch import Tensor

from sfumato import grids
from sfumato.core import Context, Grid, Solver, Step, Streams, trajectory
from sfumato.guidance import cfg

GRID, STEPS = grids.get("logsnr"), 5


def grid_of(solver: Solver) -> Grid:
    return grids.get(solver.grid or "logsnr")


def draw(name: str, law: str, n: int, seed: Any = 5, **options: Any) -> Tensor:
    denoiser = mixture().denoiser(PROCESSES[law])
    return run(denoiser, make(name), GRID, STEPS, shape=(n, 2), seed=seed, dtype=torch.float64, **options)


@three_processes
@every_solver
def test_an_item_never_depends_on_the_batch(name: str, law: str) -> None:
    seven = draw(name, law, 7)
    for n in (1, 4):
        assert torch.allclose(draw(name, law, n), seven[:n], rtol=1e-12, atol=1e-12)


@three_processes
@every_solver
def test_one_seed_an_item_goes_wherever_the_item_goes(name: str, law: str) -> None:
    seeds = [11, -3, 2**40, 7]
    four = draw(name, law, 4, seed=seeds)
    assert torch.allclose(draw(name, law, 2, seed=[seeds[2], seeds[1]]), four[[2, 1]], rtol=1e-12, atol=1e-12)
    assert torch.allclose(draw(name, law, 3, seed=11)[0], four[0], rtol=1e-12, atol=1e-12)


@every_solver
def test_selected_streams_continue_the_items_they_were_selected_for(name: str) -> None:
    denoiser, full = mixture().denoiser(PROCESSES["vp"]), normal(5, 2)
    run_of = [Context.of(5, 9, dtype=torch.float64), Context.of(2, None, dtype=torch.float64)]
    run_of[1].rng = Streams.of(9, 5).select([3, 1])
    all_items = run(denoiser, make(name), GRID, STEPS, x=full, start=0.8, ctx=run_of[0])
    chosen = run(denoiser, make(name), GRID, STEPS, x=full[[3, 1]], start=0.8, ctx=run_of[1])
    assert torch.allclose(chosen, all_items[[3, 1]], rtol=1e-12, atol=1e-12)


@every_solver
def test_same_seed_same_result_and_another_seed_another(name: str) -> None:
    again = draw(name, "vp", 3)
    assert torch.equal(draw(name, "vp", 3), again)
    assert not torch.isclose(draw(name, "vp", 3, seed=6), again).any()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_use_their_seed_and_draw_anew_each_step(name: str) -> None:
    """From one given state two seeds differ, and no noise of a run is drawn twice."""
    denoiser, x = mixture().denoiser(PROCESSES["vp"]), normal(3, 2)
    ctx, seen = Context.of(3, 1, dtype=torch.float64), []
    for st in trajectory(denoiser, make(name), grid_of(make(name)), STEPS, x=x, ctx=ctx):
        seen += ctx.run.noise if st.index else []
    drawn = torch.cat([z.flatten() for z in seen])
    assert len(drawn) >= 6 and drawn.unique().numel() == len(drawn)
    other = run(denoiser, make(name), GRID, STEPS, x=x, seed=2)
    assert not torch.isclose(st.x, other).any()


@three_processes
@every_solver
def test_a_pickled_step_resumes_bit_for_bit(name: str, law: str) -> None:
    denoiser, solver = mixture().denoiser(PROCESSES[law]), make(name)
    options: dict[str, Any] = {"seed": [4, -1, 2**70], "dtype": torch.float64}
    steps = list(trajectory(denoiser, solver, grid_of(solver), 6, shape=(3, 2), **options))
    for saved in steps:
        again = pickle.loads(pickle.dumps(saved))
        *_, last = trajectory(denoiser, solver, grid_of(solver), 6, x=again, seed=options["seed"])
        assert isinstance(last, Step) and last.index == steps[-1].index and last.t == steps[-1].t
        assert torch.equal(last.x, steps[-1].x)
        assert torch.equal(solver.read(last), solver.read(steps[-1]))


@every_solver
def test_stepping_never_changes_the_step_it_began_from(name: str) -> None:
    """A Step is immutable in its tensors too: branches of one Step never meet."""
    denoiser, solver = mixture().denoiser(PROCESSES["flow"]), make(name)
    kept = []
    for st in trajectory(denoiser, solver, grid_of(solver), STEPS, shape=(2, 2), seed=3):
        kept.append((st, pickle.loads(pickle.dumps(st))))
    for st, copy in kept:
        leaves, originals = tensors((st.x, st.carry)), tensors((copy.x, copy.carry))
        assert all(torch.equal(x, y) for x, y in zip(leaves, originals, strict=True))


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [x for part in tree for x in tensors(part)] if isinstance(tree, (list, tuple)) else []


@every_solver
def test_two_threads_share_a_solver_a_denoiser_and_taps(name: str) -> None:
    """Each thread reads and edits the same submodule in its own way; both get what they get alone."""
    solver = make(name)
    if not keeps_grid(solver):
        pytest.skip("it chooses its own times")
    denoiser = cfg(2.0)(network(PROCESSES["flow"]))
    barrier = threading.Barrier(2)

    def work(k: int, together: bool) -> tuple[Tensor, list[int]]:
        read: list[int] = []

        def tap(ctx: Context, call: Any, h: Tensor) -> Tensor:
            if together:
                barrier.wait(timeout=30)
            read.append(len(h))
            return call(h) * (1 + 0.1 * k)

        cond = {"vector": normal(2 + k, 3, seed=k, dtype=torch.float32)}
        ctx = Context.of(2 + k, k, cond=cond, taps=(("second", tap),))
        return run(denoiser, solver, GRID, STEPS, shape=(2 + k, 4), ctx=ctx), read

    alone = [work(k, together=False) for k in range(2)]
    both: list[Any] = [None, None]

    def store(k: int) -> None:
        both[k] = work(k, together=True)

    threads = [threading.Thread(target=store, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for k in range(2):
        assert both[k] is not None, "the thread failed"
        assert torch.equal(both[k][0], alone[k][0])
        assert both[k][1] == alone[k][1] and set(alone[k][1]) == {2 * (2 + k)}


@every_solver
def test_an_item_under_guidance_never_depends_on_the_batch(name: str) -> None:
    denoiser = cfg(3.0)(ClassMixture(PROCESSES["vp"]))
    label = torch.tensor([0, 2, 1, 1])
    four = run(denoiser, make(name), GRID, STEPS, shape=(4, 2), seed=8, cond={"label": label}, dtype=torch.float64)
    two = run(denoiser, make(name), GRID, STEPS, shape=(2, 2), seed=8, cond={"label": label[:2]}, dtype=torch.float64)
    assert torch.allclose(two, four[:2], rtol=1e-12, atol=1e-12)
