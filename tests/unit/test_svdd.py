"""Soft value decoding against tilted laws in closed form, continuous and discrete."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato import core, grids, oracles, solvers
from sfumato.core import Context, Denoiser, InputError, Streams
from sfumato.guidance import loss
from sfumato.processes import VP, Flow, Normal
from sfumato.steering import follow, svdd
from sfumato.steering.exact import LinearTilt

STD, TILT = 0.8, torch.tensor([1.0, -0.5], dtype=torch.float64)
ORACLE = oracles.Gaussian([0.3, -0.2], STD**2)


def linear_reward(x0: Tensor, cond: Any) -> Tensor:
    return x0 @ TILT.to(x0)


def run(solver: Any, n: int, steps: int = 20, process: Any = None, seed: Any = 0, **options: Any) -> Tensor:
    denoiser = ORACLE.denoiser(process or VP())
    options = {"shape": (n, 2), "dtype": torch.float64, "seed": seed, **options}
    return core.sample(denoiser, solver, grids.get("logsnr"), steps, **options)


class Exact(VP):
    """The exact reverse kernel of the Gaussian: DDPM's with the spread of x0 given x_t, so that few steps sample the law."""

    def kernel(self, x: Tensor, post: Any, t: float, s: float, eta: float = 1.0) -> Normal:
        plain, (a, b) = super().kernel(x, post, t, s), (self.coef(t), self.coef(s))
        share = b.alpha * plain.std**2 / b.sigma**2  # of x0 in the mean
        spread = 1 / (1 / STD**2 + (a.alpha / a.sigma) ** 2)
        return Normal(plain.mean, math.sqrt(plain.std**2 + share**2 * spread))


def errors(*candidates: int, steps: int = 6, n: int = 3000, **options: Any) -> list[float]:
    """How far from the law N(mean, std^2) samples of the steered exact kernel are, with noise drawn for all at once."""
    mean, std = options.pop("mean"), options.pop("std")
    found = []
    for m in candidates:
        generator, ctx = torch.Generator().manual_seed(m), Context.of(n, m, dtype=torch.float64)
        ctx.source = lambda ctx, fresh, g=generator: torch.randn(n, 2, generator=g, dtype=torch.float64)
        solver = svdd(candidates=m, **options)(solvers.get("ddpm"))
        denoiser, grid = ORACLE.denoiser(Exact()), grids.get("logsnr")
        x = core.sample(denoiser, solver, grid, steps, shape=(n, 2), ctx=ctx, stop=0.01, dtype=torch.float64)
        found.append(distance(x, mean, std))
    return found


def distance(x: Tensor, mean: Tensor, std: Tensor) -> float:
    """The larger of the errors of mean and standard deviation, in standard deviations."""
    return float(torch.cat([(x.mean(0) - mean) / std, (x.std(0) - std) / std]).abs().max())


@pytest.mark.parametrize("name", ["ddpm", "dpm-solver++sde", "sa-solver", "dpm-solver++2s-ancestral"])
@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
def test_one_candidate_is_the_solver_itself(name, process):
    solver = solvers.get(name)
    steered = svdd(linear_reward, candidates=1)(solver)
    assert torch.equal(run(steered, 4, 8, process), run(solver, 4, 8, process))
    assert steered.nfe == solver.nfe


def test_a_linear_reward_samples_the_tilted_gaussian_more_exactly_with_more_candidates():
    """The value of a linear reward is its posterior mean up to a constant, so only the number of candidates errs."""
    alpha = 1.0
    assert errors(1, reward=linear_reward, mean=ORACLE.mean, std=torch.full((2,), STD).double())[0] < 0.08
    mean, std = ORACLE.mean + STD**2 * TILT / alpha, torch.full((2,), STD, dtype=torch.float64)
    few, more, many = errors(2, 6, 24, reward=linear_reward, alpha=alpha, mean=mean, std=std)
    assert many < 0.12 and many < 0.5 * few and more < few


def test_an_exact_value_samples_the_law_tilted_by_a_quadratic_reward():
    """r = - k |x0 - c|^2 / 2: precision 1 / std^2 + k / alpha; V follows from x0 | x_s being normal."""
    k, alpha, centre, process = 2.0, 1.0, torch.tensor([1.0, 0.5], dtype=torch.float64), VP()

    def value(x: Tensor, s: float, denoiser: Denoiser, ctx: Context) -> Tensor:
        c = process.coef(s)
        mu = ORACLE.belief(x, c)[0]
        v = 1 / (1 / STD**2 + (c.alpha / c.sigma) ** 2)
        return -0.5 * k * ((mu - centre) ** 2).sum(1) / (1 + v * k / alpha)

    precision = 1 / STD**2 + k / alpha
    mean = (ORACLE.mean / STD**2 + centre * k / alpha) / precision
    std = torch.full((2,), precision**-0.5, dtype=torch.float64)
    few, many = errors(2, 24, value=value, alpha=alpha, mean=mean, std=std)
    assert many < 0.12 and many < 0.5 * few


@pytest.mark.parametrize("name", ["ddpm", "dpm-solver++sde", "sa-solver", "dpm-solver++2s-ancestral"])
def test_every_stochastic_solver_can_be_steered_with_its_history(name):
    solver = solvers.get(name)
    plain, best = run(solver, 400), run(svdd(linear_reward, 6)(solver), 400)
    assert (best @ TILT).mean() > (plain @ TILT).mean() + 2.0


@pytest.mark.parametrize("name", ["ddpm", "sa-solver"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_items_never_meet(name, alpha):
    """Item i alone, with its own seed, is item i of the batch; groups of look-ahead calls change nothing."""
    solver, seeds = solvers.get(name), [5, 11, 7]
    whole = run(svdd(linear_reward, 4, alpha)(solver), 3, 8, seed=seeds)
    each = torch.cat([run(svdd(linear_reward, 4, alpha)(solver), 1, 8, seed=[i]) for i in seeds])
    torch.testing.assert_close(whole, each)
    torch.testing.assert_close(whole, run(svdd(linear_reward, 4, alpha, group=3)(solver), 3, 8, seed=seeds))


def test_conditions_are_regrouped_with_their_items_and_calls_are_counted():
    wanted = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)

    def reward(x0: Tensor, cond: Any) -> Tensor:
        return -((x0[:, 0] - cond["wanted"]) ** 2)

    ctx = Context.of(3, 0, cond={"wanted": wanted}, dtype=torch.float64)
    out = run(svdd(reward, 16)(solvers.get("ddpm")), 3, 30, ctx=ctx)
    assert (out[:, 0] - wanted).abs().max() < 1.0
    assert ctx.run.nfe == 30 + 16 * 29  # the last step is deterministic and chooses nothing
    ctx = Context.of(3, 0, cond={"wanted": wanted}, dtype=torch.float64)
    run(svdd(reward, 4, every=2, interval=(0.0, 0.5))(solvers.get("ddpm")), 3, 10, ctx=ctx)
    times = grids.get("logsnr")(VP(), 10, 1.0, 0.0).tolist()
    assert ctx.run.nfe == 10 + 4 * sum(i % 2 == 0 and t <= 0.5 for i, t in enumerate(times[:-2]))


def test_rewards_that_are_not_numbers_lose_and_are_refused_where_nothing_is_left():
    def lame(x0: Tensor, cond: Any) -> Tensor:
        return torch.where(torch.arange(len(x0)) % 4 == 0, x0[:, 0], math.nan)  # the first of four candidates

    first = run(svdd(lambda x0, cond: -(torch.arange(len(x0)) % 4).double(), 4)(solvers.get("ddpm")), 3, 6)
    assert torch.equal(run(svdd(lame, 4)(solvers.get("ddpm")), 3, 6), first)
    with pytest.raises(InputError, match="not a number"):
        run(svdd(lambda x0, cond: x0[:, 0] * math.nan, 2)(solvers.get("ddpm")), 2, 4)
    with pytest.raises(InputError, match="one number a row"):
        run(svdd(lambda x0, cond: x0, 2)(solvers.get("ddpm")), 2, 4)


def test_what_cannot_be_steered_is_refused():
    with pytest.raises(InputError, match="draws no noise"):
        svdd(linear_reward)(solvers.get("ddim"))
    for options, says in (
        ({"alpha": -1.0}, "alpha"),
        ({"candidates": 0}, "candidates"),
        ({"interval": (1, 0)}, "interval"),
    ):
        with pytest.raises(InputError, match=says):
            svdd(linear_reward, **options)(solvers.get("ddpm"))
    with pytest.raises(InputError, match="either reward= "):
        svdd()


MIXTURE = oracles.GaussianMixture(
    [[-1.5, 0.0], [1.5, 0.5], [0.0, 2.0]], [[0.4, 0.8], [0.6, 0.3], [0.5, 0.5]], [0.5, 0.2, 0.3]
)


@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
def test_the_tilted_mixture_and_its_value_are_exact(process):
    """The gradient of the value in x_t turns the mixture's belief into the tilted one's, at every time."""
    tilt = LinearTilt(MIXTURE, [0.8, -0.6])
    plain, tilted = MIXTURE.denoiser(process), tilt.law.denoiser(process)
    guided = loss(lambda x, cond, t: -tilt.value(x, t, plain, Context.of(5)), through="state")(plain)
    for t in (0.2, 0.5, torch.linspace(0.1, 0.9, 5, dtype=torch.float64)):
        x = MIXTURE.sample(5, seed=1)
        torch.testing.assert_close(guided(x, t, Context.of(5)).mean, tilted(x, t, Context.of(5)).mean)
    x = MIXTURE.sample(4, seed=2)
    torch.testing.assert_close(tilt.value(x, 0.0, plain, Context.of(4)), tilt.reward(x, {}))
    ratio = tilt.law.log_prob(x) - MIXTURE.log_prob(x) - tilt.reward(x, {})
    torch.testing.assert_close(ratio, ratio[:1].expand(4))
    assert tilt.error(tilt.law.sample(20000, seed=3)) < 0.05 < tilt.error(MIXTURE.sample(20000, seed=3))


# -- discrete states ---------------------------------------------------------------------------------------------------

MASK, SHARE = 2, torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)


class Sites:
    """One uniform a site."""

    def noise(self, like: Tensor, ctx: Context) -> Tensor:
        assert ctx.rng is not None
        return ctx.rng.uniform(like)


@dataclass(frozen=True)
class Unmasking:
    """A masked site opens with probability (t - s) / t and then draws its token."""

    x: Tensor
    mean: Tensor
    opens: float

    def draw(self, u: Tensor) -> Tensor:
        token = (u / self.opens >= self.mean[..., 0]).long()  # given that u < opens, u / opens is uniform
        return torch.where((self.x == MASK) & (u < self.opens), token, self.x)


class Absorbing:
    """x_t masks each site with probability t."""

    space = Sites()

    def kernel(self, x: Tensor, post: Any, t: float, s: float, eta: float = 1.0) -> Unmasking:
        return Unmasking(x, post.mean, (t - s) / t)

    def anchor(self, t: Any, cond: Any, derivative: bool = False) -> None:
        return None


class Independent(Denoiser):
    """The exact belief for independent sites: what is seen, and SHARE elsewhere."""

    process = Absorbing()

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Any:
        seen = torch.nn.functional.one_hot(x.clamp(max=1), 2).double()
        return SimpleNamespace(mean=torch.where((x == MASK)[..., None], SHARE.expand(len(x), -1, -1), seen))


def test_discrete_states_need_nothing_new():
    """Independent sites and a sum of tokens: every site is tilted alone, p exp(1 / alpha) for token 1."""
    alpha, n = 1.0, 4000
    gain = alpha * (SHARE[:, 0] + SHARE[:, 1] * math.exp(1 / alpha)).log()  # the value of a masked site

    def value(x: Tensor, s: float, denoiser: Denoiser, ctx: Context) -> Tensor:
        return torch.where(x == MASK, gain, x.double()).sum(1)

    start = torch.full((n, 4), MASK)
    generator = torch.Generator().manual_seed(3)
    grid = grids.get("uniform")

    def share(solver: Any) -> Tensor:
        ctx = Context.of(n, 3)
        ctx.source = lambda ctx, fresh: torch.rand(n, 4, generator=generator, dtype=torch.float64)
        out = core.sample(Independent(), solver, grid, 12, x=start, ctx=ctx)
        assert ((out == 0) | (out == 1)).all()
        return out.double().mean(0)

    tilted = SHARE[:, 1] * math.exp(1 / alpha) / (SHARE[:, 0] + SHARE[:, 1] * math.exp(1 / alpha))
    ddpm = solvers.get("ddpm")
    torch.testing.assert_close(share(ddpm), SHARE[:, 1], rtol=0, atol=0.03)
    torch.testing.assert_close(share(svdd(value=value, candidates=16, alpha=alpha)(ddpm)), tilted, rtol=0, atol=0.035)
    greedy = share(svdd(lambda x0, cond: x0[..., 1].sum(1), 16)(ddpm))  # the posterior mean, no value known
    assert (greedy > tilted).all()


def test_the_choice_is_drawn_from_the_items_own_stream():
    """Shares (1/4, 3/4) for each item: a stream picks the second in three of four."""
    from sfumato.steering.svdd import _draw

    ctx = Context(rng=Streams.of(0, 4000), batch=4000)
    index = _draw(torch.tensor([[0.25, 0.75]], dtype=torch.float64).expand(4000, 2), ctx)
    assert abs(float(index.double().mean()) - 0.75) < 0.03


# -- follow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++", "heun", "unipc", "ddpm"])
def test_following_an_unmoved_state_changes_nothing(name):
    solver = solvers.get(name)
    assert torch.equal(run(follow(solver), 3, 6), run(solver, 3, 6))


def test_a_solver_of_order_one_follows_a_moved_state_as_ddim_does():
    """dpm-solver++ of order 1 is DDIM, but takes its own x: only following it do moved states arrive."""
    guided = loss(lambda x0, cond: -linear_reward(x0, cond), 0.1, through="belief", weight="constant", keep="flow")
    denoiser = guided(ORACLE.denoiser(Flow()))
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def end(solver: Any) -> Tensor:
        return core.sample(denoiser, solver, grids.get("uniform"), 6, x=x)

    ddim, first = solvers.get("ddim"), solvers.get("dpm-solver++", order=1)
    torch.testing.assert_close(end(follow(first)), end(ddim))
    assert (end(first) - end(ddim)).abs().max() > 1e-2
