"""Starts: semi-discrete transport against exact maps and plans, boundary conditions against a Gaussian's closed form."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sfumato as sf
from sfumato import core
from sfumato.core import Context, Denoiser, InputError, Posterior, linear
from sfumato.processes import VP, Anchored, MeanReverting, Residual
from sfumato.tuning import boundary, semidiscrete
from sfumato.tuning.boundary import BoundaryCondition
from sfumato.tuning.semidiscrete import NotConverged, SemiDiscrete, TransportStart, solve

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- semi-discrete transport


@pytest.mark.parametrize("source", ["normal", "uniform"])
@pytest.mark.parametrize("masses", [None, torch.tensor([1.0, 3.0, 0.5, 2.0, 1.5])])
def test_on_the_line_walls_are_the_quantiles_of_the_source(source, masses):
    y = normal(5, 1, seed=3).sort(0).values + 40
    found = solve(y, masses=masses, source=source, tolerance=0.01, batch=2000)
    walls = -found.heights.diff() / y.flatten().diff()
    share = (torch.ones(5) if masses is None else masses).double().cumsum(0)
    share = (share / share[-1])[:-1]
    exact = torch.special.ndtri(share) if source == "normal" else share
    assert (walls - exact).abs().max() < 0.02


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 30), st.floats(0.15, 0.85), st.floats(0.01, 100), st.integers(0, 9))
def test_two_targets_are_parted_by_the_plane_that_gives_each_its_mass(d, mass, scale, seed):
    y = scale * normal(2, d, seed=seed)
    found = solve(y, masses=torch.tensor([mass, 1 - mass]), tolerance=0.02, batch=2000, seed=seed)
    wall = (found.heights[1] - found.heights[0]) / (y[0] - y[1]).norm()
    assert abs(torch.special.ndtr(-wall) - mass) < 0.03


def test_the_value_and_the_map_are_those_of_pots_exact_plan():
    ot = pytest.importorskip("ot")
    x, y = normal(600, 3, seed=1), normal(12, 3, seed=2) * torch.tensor([2.0, 1.0, 0.5], dtype=F64) + 1
    found = solve(y, source=x, tolerance=0.02, batch=1200)
    plan, log = ot.emd(torch.full((600,), 1 / 600, dtype=F64), found.masses, torch.cdist(x, y) ** 2, log=True)
    exact = float(log["cost"])
    potential = ((x @ y.T) + found.heights).amax(1).mean() - (found.masses * found.heights).sum()
    dual = float(x.square().sum(1).mean() + (found.masses * y.square().sum(1)).sum() - 2 * potential)
    assert exact - 2e-3 * exact < dual <= exact * (1 + 1e-9)  # weak duality, and nearly tight
    assert (plan.argmax(1) == found.cells(x)).double().mean() > 0.97
    assert abs(found.cost(x) - exact) < 0.03 * exact


def test_targets_on_a_circle_have_equal_heights_and_margins_vanish_at_walls():
    angle = torch.arange(6, dtype=F64) / 6 * 2 * torch.pi
    y = torch.stack([angle.cos(), angle.sin()], 1)
    found = solve(y, tolerance=0.02, batch=2000)
    assert (found.heights - found.heights.mean()).abs().max() < 0.05
    even = SemiDiscrete(y, torch.zeros(6, dtype=F64), torch.full((6,), 1 / 6, dtype=F64))
    wall = (y[:1] + y[1:2]) * 1.7
    assert even.margins(wall)[1].abs().max() < 1e-12 and int(even.cells(y[4:5])) == 4


def test_the_stated_tolerance_is_met_on_points_no_step_has_seen():
    y = normal(60, 10, seed=5).float()
    found = solve(y, tolerance=0.1, seed=7)
    w = found.shares(torch.randn(400_000, 10, generator=torch.Generator().manual_seed(99)))
    error = float(((w - 1 / 60).square() * 60).sum().sqrt())
    assert error < 0.15 and found.progress[-1].error <= 0.1
    nearest = torch.bincount(torch.cdist(torch.randn(4000, 10), y).argmin(1), minlength=60) / 4000
    assert error < 0.3 * float(((nearest - 1 / 60).square() * 60).sum().sqrt())


def test_the_map_moves_with_its_targets():
    y, x = normal(20, 4, seed=1), normal(500, 4, seed=2)
    here, there = (solve(y + shift, tolerance=0.2, seed=3) for shift in (0.0, 1000.0))
    assert (here.cells(x) == there.cells(x)).double().mean() > 0.99
    assert torch.equal(here(x), y[here.cells(x)])


def test_what_cannot_be_solved_is_said():
    y = normal(40, 2)
    with pytest.raises(NotConverged, match="tolerance is 0.02"):
        solve(y, tolerance=0.02, rounds=1, first=2)
    for bad in (
        {"targets": y.long()},
        {"targets": y[:0]},
        {"targets": y * torch.inf},
        {"targets": y, "masses": torch.zeros(40)},
        {"targets": y, "source": "cauchy"},
        {"targets": y, "source": normal(10, 3)},
        {"targets": y, "tolerance": 0.0},
    ):
        with pytest.raises(InputError):
            solve(**bad)
    with pytest.raises(InputError, match="points"):
        solve(y, tolerance=0.5)(normal(3, 5))
    with pytest.raises(InputError, match="masses"):
        SemiDiscrete(y, torch.zeros(3), torch.zeros(40))


def transport_start(law, t: float, source: str = "normal") -> tuple[TransportStart, sf.oracles.GaussianMixture]:
    data = sf.oracles.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], [0.1, 0.1])
    latents, _ = law.corrupt(data.sample(64, seed=1), t, Context.of(64, 2, dtype=F64))
    return TransportStart(solve(latents, source=source, tolerance=0.1), t, source, {"items": 64}), data


@pytest.mark.parametrize("source", ["normal", "uniform"])
def test_a_run_from_a_transport_start_reaches_the_data_and_each_item_is_its_own(source):
    law = VP()
    start, data = transport_start(law, law.time(0.5), source)
    x = start(law, (40, 2), Context.of(40, 5, dtype=F64))
    assert torch.equal(x[7], start(law, (9, 2), Context.of(9, 5, dtype=F64))[7])
    assert all(any(torch.equal(row, y) for y in start.map.targets) for row in x)
    out = sf.sample(data.denoiser(law), solver="ddim", steps=30, x=x, start=start.time)
    assert (out[:, 0].abs() - 2).abs().max() < 0.6
    assert 0.2 < (out[:, 0] > 0).double().mean() < 0.8


def test_starts_survive_a_card():
    law = VP()
    start, _ = transport_start(law, 0.5)
    bc = BoundaryCondition(normal(2).float(), {"seed": 3})
    for one, kind in ((start, TransportStart), (bc, BoundaryCondition)):
        again = kind.of({k: v.clone() for k, v in one.tensors().items()}, json.loads(json.dumps(one.config())))
        a, b = (s(law, (6, 2), Context.of(6, 1)) for s in (one, again))
        assert torch.equal(a, b) and again.config() == one.config() and again.time == one.time


def test_an_anchored_start_is_raw():
    law = Anchored(VP())
    start, _ = transport_start(VP(), 0.5)
    anchor = normal(6, 2, seed=4)
    plain = start(VP(), (6, 2), Context.of(6, 1, dtype=F64))
    raw = start(law, (6, 2), Context.of(6, 1, cond={"anchor": anchor}, dtype=F64))
    assert torch.allclose(raw - plain, (1 - law.coef(0.5).alpha) * anchor)


def test_impossible_starts_are_refused():
    start, _ = transport_start(VP(), 0.5)
    for time, source in ((0.0, "normal"), (1.5, "normal"), (0.5, "cauchy")):
        with pytest.raises(InputError):
            TransportStart(start.map, time, source)
    with pytest.raises(InputError, match="may not draw"):
        start(VP(), (2, 2), Context.of(2, None))


# ---------------------------------------------------------------------- boundary conditions


class Restoring(Denoiser):
    """The exact belief of N(m(y), P), with m(y) = cond['mean'] and P free of y."""

    def __init__(self, spread: Tensor, process) -> None:
        super().__init__()
        self.centred, self.process = sf.oracles.Gaussian(torch.zeros(len(spread)), spread), process

    def forward(self, x, t, ctx):
        c, m = self.process.coef(t), ctx.cond["mean"]
        x0, eps = self.centred.belief(linear(1.0, x, -c.alpha, m), c)
        return Posterior(linear(-c.sigma, x0 + m, c.alpha, eps), "v", x, c)


def problem(law, n: int = 12) -> tuple[Restoring, Tensor, dict[str, Tensor]]:
    """x ~ N(0, C) in 4-D, two noisy sums of it observed; the anchor is the posterior mean."""
    root = normal(4, 4, seed=1)
    prior, a, noise = root @ root.T, normal(2, 4, seed=2), 0.3
    x = normal(n, 4, seed=3) @ root.T
    y = x @ a.T + noise * normal(n, 2, seed=4)
    gain = prior @ a.T @ torch.linalg.inv(a @ prior @ a.T + noise**2 * torch.eye(2, dtype=F64))
    mean = y @ gain.T
    return Restoring(prior - gain @ a @ prior, law), x, {"anchor": mean, "mean": mean}


def squared(restored: Tensor, truth: Tensor) -> Tensor:
    return (restored - truth).square().sum(1)


@pytest.mark.parametrize(
    "law", [Anchored(VP()), MeanReverting(std=1.0), Residual()], ids=["vp", "mean-reverting", "residual"]
)
def test_scores_on_a_gaussian_restoration_are_the_closed_form(law):
    denoiser, x, cond = problem(law)
    run = {"solver": sf.solvers.get("dpm-solver++", order=3), "grid": sf.grids.get("logsnr", lam_max=7.0), "steps": 120}
    found, search = boundary.optimal_boundary(denoiser, x, cond, squared, n=30, seed=2, **run, batch=100)
    exact = denoiser.centred.transport(law.coef(1.0).sigma * search.noises.double(), law.coef(1.0), law.coef(0.0))
    closed = (cond["mean"] + exact[:, None] - x).square().sum(-1)
    assert (search.scores / closed - 1).abs().max() < 0.02
    assert search.best == int(closed.mean(1).argmin()) == found.tuned_on["index"]
    assert torch.equal(found.noise, search.noises[search.best])
    # under squared error nothing beats the posterior mean, whose noise is 0
    zero = boundary.scores(denoiser, torch.zeros(1, 4), x, cond, squared, **run)
    assert torch.allclose(zero[0], squared(cond["mean"], x), rtol=1e-3)
    # a population's ranking, z' P z, is the same for all conditions; the best of these has nearly the least
    spread = exact.square().sum(1)
    assert int((spread < spread[search.best]).sum()) <= 4
    assert search.margin()[1] > 0


def test_a_candidate_is_what_a_run_with_its_seed_begins_with():
    law = MeanReverting()
    denoiser, _, cond = problem(law)
    noises = boundary.candidates((4,), 12, seed=9).double()
    (begin, *_) = core.trajectory(
        denoiser, sf.solvers.get("ddim"), sf.grids.get("uniform"), 2, shape=(12, 4), cond=cond, seed=9, dtype=F64
    )
    raw = boundary.raw_start(law, noises, Context(cond=cond, dtype=F64, batch=12))
    assert torch.allclose(raw, begin.x + law.anchor(1.0, cond))
    shared = BoundaryCondition(noises[3])(law, (12, 4), Context(cond=cond, dtype=F64, batch=12))
    assert torch.allclose(shared[3], raw[3]) and torch.allclose(
        shared - cond["anchor"], (shared - cond["anchor"])[:1].expand(12, 4)
    )


def test_boundary_refusals():
    denoiser, x, cond = problem(Anchored(VP()))
    grid = sf.grids.get("uniform")
    with pytest.raises(InputError, match="deterministic"):
        boundary.scores(denoiser, x[:2], x, cond, squared, solver=sf.solvers.get("ddpm"), grid=grid, steps=2)
    with pytest.raises(InputError, match="one number an item"):
        boundary.scores(denoiser, x[:2], x, cond, lambda a, b: a - b, solver=sf.solvers.get("ddim"), grid=grid, steps=2)
    with pytest.raises(InputError, match="tuned for"):
        BoundaryCondition(x[0])(VP(), (3, 5), Context.of(3))


def test_blocks_do_not_change_a_map(monkeypatch):
    start, _ = transport_start(VP(), 0.5)
    x = normal(50, 2, seed=8)
    cells, margins = start.map.margins(x)
    monkeypatch.setattr(semidiscrete, "BLOCK", 200)
    again = start.map.margins(x)
    assert torch.equal(cells, again[0]) and torch.allclose(margins, again[1])


def tiny_pipeline():
    """Pixels 8 x 8 without conditions."""
    torch.manual_seed(0)
    net = sf.networks.UNet(3, width=8, multipliers=(1, 2), blocks=1, attention=False)
    for parameter in net.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    from sfumato.denoisers import parametrized

    return sf.Pipeline(parametrized(net.eval(), VP(), "v"), sf.codecs.Identity(), size=(8, 8), steps=4)


def starting_card(pipe, start, **fields):
    from sfumato.tuning.card import fingerprint

    facts = {"made_by": "dpm-ot", "description": {"spec": "ddim"}, "steps": 4, "nfe": 4.0, "grid_spec": "uniform"}
    return sf.SamplerCard(**facts | {"fingerprint": fingerprint(pipe.denoiser)} | fields).starting(start)


@pytest.mark.parametrize("kind", ["transport", "boundary"])
def test_a_pipeline_begins_where_its_card_says(kind, tmp_path):
    """The same pictures from the card, from its file, and by hand; item by item and in any batch."""
    pipe = tiny_pipeline()
    latents = pipe.process.corrupt(normal(5, 3, 8, 8).float(), 0.6, Context.of(5, 2))[0]
    made = {
        "transport": lambda: TransportStart(solve(latents, tolerance=0.5), 0.6, "normal", {"items": 5}),
        "boundary": lambda: BoundaryCondition(normal(3, 8, 8).float(), {"seed": 3}),
    }
    start = made[kind]()
    card = starting_card(pipe, start)
    assert (card.start, card.begin().name) == (start.time, kind)
    images = pipe.generate(4, sampler=card, seed=7, batch=3)
    x = start(pipe.process, (4, 3, 8, 8), Context.of(4, 7))
    by_hand = sf.sample(pipe.denoiser, solver="ddim", grid="uniform", steps=4, x=x, start=start.time, seed=7)
    assert (images.int() - pipe.codec.images(by_hand).int()).abs().max() <= 1
    assert torch.equal(pipe.generate(4, sampler=card.save(tmp_path / "card.json"), seed=7, batch=3), images)
    again = sf.SamplerCard.load(tmp_path / "card.json")
    assert again.begin().config() == start.config() and again.tensors.keys() == card.tensors.keys()
    if kind == "boundary":  # one noise for all, whatever the seed
        assert torch.equal(images[:1].expand_as(images), images)
        assert torch.equal(pipe.generate(4, sampler=card, seed=8), images)
    rows = sf.compare(pipe, solvers=("ddim",), nfe=(2,), samplers=(card,), n=8, fine=4)
    assert any("states of its own" in row.get("refused", "") for row in rows)


def test_cards_that_cannot_begin_say_so():
    pipe = tiny_pipeline()
    start = BoundaryCondition(normal(3, 8, 8).float())
    with pytest.raises(InputError, match="begin at t = 0.5"):
        starting_card(pipe, start, grid_spec=None, times=(0.5, 0.3, 0.2, 0.1, 0.0))
    from dataclasses import replace

    with pytest.raises(InputError, match="runs from t = 0.5"):
        pipe.generate(1, sampler=replace(starting_card(pipe, start), start=0.5, begins=None))
    with pytest.raises(InputError, match="'elsewhere' start"):
        pipe.generate(1, sampler=replace(starting_card(pipe, start), begins={"name": "elsewhere"}))
