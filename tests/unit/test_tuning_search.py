"""Schedules, fits and searches on exact beliefs: what is claimed of a sampler holds on noise it never saw."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st

from sfumato import grids, networks, oracles, processes, solvers
from sfumato.core import Context, InputError, Streams, mix, sample, trajectory
from sfumato.denoisers import parametrized
from sfumato.solvers._integral import reading
from sfumato.solvers.exponential import Multistep
from sfumato.solvers.scheduled import Move, Scheduled, Subspace
from sfumato.tuning import search, steps, subspace
from sfumato.tuning.evolution import Evolution, Ranking
from sfumato.tuning.target import aim

LAWS = {"vp": processes.VP(), "edm": processes.EDM(), "flow": processes.Flow()}


def mixture(seed: int = 0, d: int = 6) -> oracles.GaussianMixture:
    draw = torch.Generator().manual_seed(seed)
    return oracles.GaussianMixture(torch.randn(5, d, generator=draw, dtype=torch.float64), [0.3, 0.2, 0.4, 0.25, 0.3])


def target(law: str = "vp", seed: int = 1, n: int = 24, **settings):
    return aim(mixture().denoiser(LAWS[law]), (n, 6), seed=seed, dtype=torch.float64, **settings)


moves = st.builds(
    Move,
    st.sampled_from(["data", "noise", "v", "flow"]),
    st.sampled_from(["lambda", "angle", "rho", "time"]),
    st.integers(1, 4),
    st.floats(0, 1.5),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2),
    st.booleans(),
)


@given(st.lists(moves, min_size=2, max_size=6), st.booleans(), st.sampled_from(list(LAWS)))
@options(max_examples=30)
def test_a_schedule_makes_the_calls_it_declares_and_stays_finite(chosen, free, law):
    """Away from alpha = 0, where the noise form cannot mend and saves the call."""
    solver, ctx = Scheduled(tuple(chosen), free), Context.of(3, 0, dtype=torch.float64)
    start = LAWS[law].coef(0.95).sigma * torch.ones(3, 6, dtype=torch.float64)
    x = sample(mixture().denoiser(LAWS[law]), solver, grids.get("uniform"), len(chosen), x=start, start=0.95, ctx=ctx)
    assert ctx.run.nfe == solver.calls(len(chosen)) == pytest.approx(solver.nfe * len(chosen))
    assert x.isfinite().all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("move", "named"),
    [
        (Move(order=1), "ddim"),
        (Move(), "dpm-solver++"),
        (Move(order=3), "dpm-solver++(order=3)"),
        (Move("noise", "time", 3), "deis"),
        (Move("data", "angle", 3, corrector=4), "dpm-solver++(order=3, variable='angle', corrector=True)"),
        (Move("v", "angle", 2), "dpm-solver++(order=2, form='v', variable='angle')"),
    ],
    ids=str,
)
def test_constant_moves_are_the_named_solvers(law, move, named):
    """On a grid that stops before sigma = 0, where Multistep lowers its order."""
    denoiser, x = mixture().denoiser(LAWS[law]), torch.randn(4, 6, dtype=torch.float64)
    at = {"x": x, "start": 0.9, "stop": 0.1}
    ours = sample(denoiser, Scheduled((move,)), grids.get("uniform"), 8, **at)
    theirs = sample(denoiser, solvers.registry.make(named), grids.get("uniform"), 8, **at)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_relaxation_goes_from_order_one_to_the_exact_integral():
    denoiser, x = mixture().denoiser(LAWS["vp"]), torch.randn(4, 6, dtype=torch.float64)
    at = {"x": x, "start": 0.9, "stop": 0.1}

    def run(move: Move) -> torch.Tensor:
        return sample(denoiser, Scheduled((move,)), grids.get("uniform"), 3, **at)

    assert torch.allclose(run(Move(order=3, relax=0.0)), run(Move(order=1)), atol=1e-12)
    assert not torch.allclose(run(Move(order=2, relax=0.5)), run(Move(order=2)), atol=1e-4)


def test_wrong_moves_and_steps_are_refused():
    for wrong in ({"form": "score"}, {"order": 6}, {"again": True}, {"variable": "sigma"}):
        with pytest.raises(InputError):
            Move(**wrong)
    with pytest.raises(InputError, match="at least one move"):
        Scheduled(())
    with pytest.raises(InputError, match="pure noise"):
        sample(
            mixture().denoiser(LAWS["vp"]),
            Scheduled(free=True),
            grids.get("uniform"),
            3,
            x=torch.zeros(1, 6),
            start=0.2,
        )
    made = Subspace((1.0, 0.5, 0.0), ((1.0, 0.0), (1.0, 0.0, 0.0)))
    with pytest.raises(InputError, match="fitted to the times"):
        sample(mixture().denoiser(LAWS["vp"]), made, grids.get("quadratic"), 2, shape=(1, 6))
    with pytest.raises(InputError, match="need rows"):
        Subspace((1.0, 0.0), ((1.0,),))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("closed", [False, True])
def test_a_fit_to_a_teacher_of_as_many_steps_is_the_teacher(law, closed):
    """OLSS contains DDIM: with the teacher's own steps as the path it finds DDIM's coefficients, and they are unique."""
    t = target(law, solver=solvers.get("ddim"), steps=6, grid=grids.get("quadratic"))
    made = subspace.fit(t, 6, path="uniform", form="v", closed=closed)
    new = target(law, seed=2, solver=solvers.get("ddim"), steps=6, grid=grids.get("quadratic"))
    assert float(new.errors(made.solver, made.times).max()) < 1e-7
    assert max(made.residual) < 1e-9


def test_least_squares_through_the_factor_is_numpys():
    t = target("vp", steps=20)
    path = subspace.shortest_path(t, 4, "data")
    made = subspace.fit(t, 4, path=path, form="data")
    recorded = [t.x]
    told = []
    for k in path:
        post = t.denoiser(t.states[k], t.times[k], Context.of(len(t.x)))
        told.append(post.view("x0"))
    columns = np.stack([v.flatten().numpy() for v in (*recorded, *told)], 1)
    found = np.linalg.lstsq(columns, t.ends.flatten().numpy(), rcond=None)[0]
    assert np.allclose(made.solver.rows[-1], found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", subspace.ROWS)
def test_every_reading_is_fitted_in_the_coordinates_of_the_record(form):
    """What the factor says of a reading is what the belief says of it: their inner products with the ends agree."""
    t = target("vp", steps=20)
    for k in (3, 11):
        post = t.denoiser(t.states[k], t.times[k], Context.of(len(t.x)))
        straight = float((reading(post, form).double() * t.ends.double()).sum())
        kept = float(subspace._reading(t, k, form) @ t.factor[:, -1])
        assert abs(kept - straight) < 1e-6 * max(1.0, abs(straight))
    assert subspace.fit(t, 4, form=form, path="uniform").solver.form == form


def test_a_reading_that_is_none_is_refused():
    with pytest.raises(InputError, match="one of noise, data, v, line, flow"):
        subspace.fit(target("vp", steps=6), 2, form="eps")


def test_the_even_grid_is_a_subset_of_its_size_and_evolution_starts_from_it():
    for pool in range(1, 30):
        for count in range(1, pool + 1):
            indices = steps.StepSpace(pool, count).even().indices
            assert indices[0] == 0 and len(set(indices)) == count and max(indices) < pool
    space = steps.StepSpace(40, 4)
    wanted = (0, 7, 22, 31)

    def fitness(one):
        return float(sum(abs(a - b) for a, b in zip(one.indices, wanted, strict=True)))

    found = steps.evolve(fitness, space, budget=300, population=20, nudges=True)
    assert found.tried[0][0] == space.even() and len(found.tried) <= 300
    assert found.progress[-1] <= 0.2 * fitness(space.even())


def test_the_searched_path_has_the_least_worst_fit_of_greedy_ones_and_obeys_its_budget():
    t = target("vp", steps=24)
    with pytest.raises(InputError, match="between 1 and 24"):
        subspace.fit(t, 25)
    with pytest.raises(InputError, match="goes up from 0"):
        subspace.fit(t, 3, path=[0, 4, 2])
    for count in (3, 5, 8):
        path = subspace.shortest_path(t, count)
        assert path[0] == 0 and len(path) <= count and path == sorted(set(path))


@pytest.mark.parametrize("law", LAWS)
def test_a_replay_foretells_the_error_of_solvers_on_gaussian_data(law):
    """For isotropic data the replay's linear reaction is the model's own: the foretold error is the true one."""
    data = oracles.Gaussian(torch.full((6,), 0.3), 0.5**2)
    t = aim(data.denoiser(LAWS[law]), (64, 6), seed=1, dtype=torch.float64)
    for solver in (solvers.get("ddim"), Multistep(2), Multistep(3, "v", "angle")):
        times = tuple(grids.get("arctan")(t.process, 8, 1.0, 0.0).tolist())
        true = float(t.errors(solver, times).square().mean().sqrt())
        assert t.replay().error(solver, times) == pytest.approx(true, rel=0.15)


def test_a_reference_is_fine_and_its_states_are_recorded():
    t, finer = target("vp", steps=64), target("vp", steps=256)
    assert float(finer.distance(t.ends).median()) < 2e-3
    assert len(t.states) == 65 and t.factor.shape[1] == 129
    with pytest.raises(InputError, match="cannot be the reference"):
        target(solver=solvers.get("ddpm"))


@pytest.mark.parametrize("law", LAWS)
def test_searched_samplers_improve_on_unseen_noise(law):
    fitting, unseen = target(law, seed=1, n=64), target(law, seed=2, n=128)

    def score(aimed, one) -> float:
        return aimed.score(aimed.errors(one.solver, one.times))

    known = search.StrategySpace(fitting.process, 6, free=False).starts()
    untuned = score(unseen, min(known, key=lambda one: score(fitting, one)))
    schedule = search.strategies(fitting, 6, budget=40, rehearsals=300, seed=0, free=False).best
    fit = subspace.evolved(fitting, 6, budget=12, rehearsals=100)
    assert schedule.calls == 6
    assert score(unseen, schedule) < 0.9 * untuned
    assert score(unseen, fit) < 0.9 * untuned
    assert fit.solver.nfe * (len(fit.times) - 1) == 6


def test_an_evolved_fit_throws_no_unseen_item_away():
    """Opposite coefficients of collinear readings fit the items seen, and ended 50 away from the data on an unseen one."""
    peaks = Streams.of(mix(20260, 10), 16).normal(torch.empty(16, 32, dtype=torch.float64))
    denoiser = oracles.GaussianMixture(peaks, 0.3).denoiser(processes.DDPM())
    fitting, unseen = aim(denoiser, (24, 32), seed=11), aim(denoiser, (512, 32), seed=12)
    fit = subspace.evolved(fitting, 5, budget=10, rehearsals=200, seed=1)
    known = unseen.errors(solvers.get("arc"), grids.get("arc")(unseen.process, 5, 1.0, 0.0).tolist())
    assert unseen.errors(fit.solver, fit.times).max() <= known.max()


def test_searches_are_deterministic_and_never_repeat_an_evaluation():
    t = target("vp", n=8, steps=24)
    one, two = (search.strategies(t, 5, budget=30, rehearsals=150, seed=3) for _ in range(2))
    assert one.tried == two.tried and len({c for c, _ in one.tried}) == len(one.tried) == 30
    assert one.progress == sorted(one.progress, reverse=True)
    first, again = (steps.steps(t, solvers.get("ddim"), 4, budget=30, population=10, seed=5) for _ in range(2))
    assert first.tried == again.tried
    assert first.progress[-1] < first.progress[0]
    assert all(c.indices[0] == 0 and len(set(c.indices)) == 4 for c, _ in first.tried)


def test_mutants_stay_in_the_space():
    space, draw = search.StrategySpace(LAWS["flow"], 5), random.Random(0)
    known = space.starts()
    for _ in range(300):
        child = space.mutate(draw.choice(known), draw) or space.cross(draw.choice(known), draw.choice(known), draw)
        if child is not None:
            assert child.calls == 5 and search.legal(space.process, child.times)
            assert len(child.times) == len(child.moves) + 1 and child.moves[-1].corrector == 0
            assert len(space.encode(child)) == len(space.encode(known[0]))


def test_evolution_climbs_and_the_ranking_saves_evaluations():
    """Strings of 24 bits, fitness the number of zeros: a ranking that sees the bits needs fewer evaluations."""

    def mutate(one, draw):
        i = draw.randrange(24)
        return (*one[:i], 1 - one[i], *one[i + 1 :])

    def cross(one, other, draw):
        return tuple(draw.choice(pair) for pair in zip(one, other, strict=True))

    def fresh(draw):
        return tuple(draw.randint(0, 1) for _ in range(24))

    evolution = Evolution(mutate, cross, fresh, population=12, parents=5, mutants=8, crossed=3)
    start = [fresh(random.Random(i)) for i in range(12)]
    plain, ranked = (
        sum(evolution.run(lambda c: 24 - sum(c), start, budget=72, seed=s, predictor=p).progress[-1] for s in range(4))
        for p in (None, Ranking(lambda c: [float(v) for v in c]))
    )
    assert ranked < plain < 4 * min(24 - sum(c) for c in start)
    broken = evolution.run(lambda c: float("nan"), start, budget=20)
    assert broken.tried[0][1] == float("inf")


def test_several_networks_rank_better_than_one():
    """Few noisy figures of a hidden order: the mean of four rankings agrees more with it than one does, over many draws."""
    weights = [math.sin(3 * i) for i in range(10)]

    def agreement(nets, seed):
        draw = random.Random(seed)

        def items(n):
            return [tuple(draw.randint(0, 1) for _ in range(10)) for _ in range(n)]

        def value(c):
            return math.exp(sum(w * bit for w, bit in zip(weights, c, strict=True)))

        tried = {c: value(c) * math.exp(draw.gauss(0, 0.7)) for c in items(40)}
        pool = items(200)
        found = Ranking(lambda c: [float(bit) for bit in c], nets=nets, seed=seed)(list(tried.items()), pool)
        known = torch.tensor([value(c) for c in pool]).argsort().argsort().double()
        ranks = torch.tensor(found).argsort().argsort().double()
        return float(torch.corrcoef(torch.stack([known, ranks]))[0, 1])

    one, four = (sum(agreement(n, seed) for seed in range(6)) / 6 for n in (1, 4))
    assert four > one > 0.3


def test_blocks_that_keep_their_shape_can_be_left_out_at_some_steps():
    torch.manual_seed(0)
    net = networks.UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=False)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    denoiser, x = parametrized(net.eval(), LAWS["vp"]), torch.randn(2, 1, 8, 8)
    blocks = steps.skippable(net, lambda: denoiser(x, 0.5, Context.of(2)))
    assert "level.down.stages.0.residual" in blocks
    plan = ((), (blocks[0],), tuple(blocks))
    with torch.no_grad():
        run = trajectory(steps.Skipping(denoiser, plan), solvers.get("ddim"), grids.get("uniform"), 3, x=x)
        ours = [s.x for s in run]
        plain = [s.x for s in trajectory(denoiser, solvers.get("ddim"), grids.get("uniform"), 3, x=x)]
    assert torch.equal(ours[1], plain[1]) and not torch.equal(ours[2], plain[2])
    assert steps.planned(denoiser, ((), ())) is denoiser
    with pytest.raises(InputError, match="keeps its input's shape"):
        steps.skippable(net, lambda: denoiser(x, 0.5, Context.of(2)), kinds=("Conv3d",))
    choice = steps.Choice((0, 5, 9), plan)
    assert choice.evaluations(len(blocks)) == 3 * len(blocks) - 1 - len(blocks)
    with pytest.raises(InputError, match="between 1 and 4"):
        steps.StepSpace(4, 5)


def test_the_second_stage_stays_within_its_block_evaluations():
    """Fitness on a made-up network whose block 'c' does nothing: it is what is left out."""

    def fitness(choice):
        return sum(abs(i - w) for i, w in zip(choice.indices, (0, 7, 15), strict=True)) + sum(
            10.0 * (name != "c") for names in choice.skips for name in names
        )

    found = steps.joint(fitness, 20, 3, ("a", "b", "c"), 6, budget=160, seed=0)
    assert all(choice.evaluations(3) <= 6 for choice, _ in found.tried)
    assert found.best.skips == (("c",),) * 3
    with pytest.raises(InputError, match="fewer than all"):
        steps.joint(fitness, 20, 3, ("a", "b", "c"), 9)
    with pytest.raises(InputError, match="tried alone"):
        steps.joint(fitness, 20, 3, ("a", "b", "c"), 6, budget=10)


def test_omissions_that_are_cheap_alone_and_dear_together_are_traded():
    """Made up: leaving out 'a' and 'b' at one step breaks it, so the cheapest omissions alone are not the best plan."""
    price = {"a": 1.0, "b": 1.1, "c": 1.5, "d": 9.0}

    def fitness(choice):
        broken = sum(50.0 for names in choice.skips if {"a", "b"} <= set(names))
        return broken + sum(price[name] for names in choice.skips for name in names)

    found = steps.joint(fitness, 8, 2, tuple("abcd"), 4, budget=120, seed=0)
    assert found.tried[0][0].skips == (("a", "b"),) * 2 and found.progress[0] > 100
    assert found.best.skips == (("a", "c"),) * 2


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 5))
def test_a_trade_keeps_times_and_block_evaluations(seed, count, out):
    draw, blocks = random.Random(seed), ("a", "b", "c")
    space = steps.StepSpace(30, count, blocks, 3)
    places = [(i, name) for i in range(count) for name in blocks]
    draw.shuffle(places)
    one = steps.Choice(space.even().indices, space.lists(places[:out]))
    other = space.trade(one, places, draw)
    assert other.indices == one.indices and other.evaluations(3) == one.evaluations(3) == 3 * count - out
    changed = {(i, n) for i, names in enumerate(one.skips) for n in names} ^ {
        (i, n) for i, names in enumerate(other.skips) for n in names
    }
    assert len(changed) == 2
