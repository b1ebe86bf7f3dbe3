"""Superposition against exact densities: the estimator, the mixture, and equal densities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato import grids, solvers
from sfumato.core import Context, InputError, Streams, sample
from sfumato.denoisers import parametrized
from sfumato.denoisers.mixtures import Mixture
from sfumato.denoisers.oracles import Gaussian, GaussianMixture
from sfumato.evaluation.metrics import sliced_wasserstein
from sfumato.guidance import also, cfg, log_densities, superpose, superposition
from sfumato.guidance.superposition import density_gain, equalising
from sfumato.processes import VP, Cosine, Flow

LEFT = GaussianMixture([[-1.5, 1.5], [-1.5, -1.5]], [0.4, 0.4])
RIGHT = GaussianMixture([[1.5, 1.5], [1.5, -1.5]], [0.4, 0.4])
STOP = 0.02


def context(n: int, seed: Any = 0, **fields: Any) -> Context:
    return Context.of(n, seed, dtype=torch.float64, **fields)


def run(denoiser: Any, ctx: Context, steps: int, solver: str = "ddpm", stop: float = STOP, **options: Any) -> Tensor:
    options = options or {"shape": (ctx.batch, 2)}
    return sample(denoiser, solvers.registry.make(solver), grids.get("arctan"), steps, ctx=ctx, stop=stop, **options)


def exact(law: GaussianMixture, x: Tensor, t: float, process: Any) -> Tensor:
    """log density of x_t."""
    c = process.coef(t)
    stds = (c.alpha**2 * law.variances + c.sigma**2).sqrt()
    return GaussianMixture(c.alpha * law.means, stds, law.weights).log_prob(x)


def pair(process: Any, **options: Any) -> Any:
    return superpose(LEFT.denoiser(process), RIGHT.denoiser(process), **options)


@pytest.mark.parametrize("process", [VP(), Flow(), Cosine()], ids=["vp", "flow", "cosine"])
@pytest.mark.parametrize("solver", ["ddpm", "euler-maruyama"])
def test_the_estimator_converges_to_the_exact_log_density(process: Any, solver: str) -> None:
    """Errors of the path's log density, from a start drawn exactly, fall with the step as its square root or faster."""
    start, law, errors = 0.8, LEFT, []
    c = process.coef(start)
    x = c.alpha * law.sample(128, 3) + c.sigma * Streams.of(4, 128).normal(torch.empty(128, 2, dtype=torch.float64))
    for steps in (25, 100, 400):
        ctx = context(128)
        end = run(superpose(law.denoiser(process)), ctx, steps, solver, x=x, start=start)
        truth = exact(law, end, STOP, process) - exact(law, x, start, process)
        errors.append(float((log_densities(ctx)[:, 0] - truth).abs().median()))
    assert errors[2] < 0.4 * errors[0]
    assert errors[2] < 0.5


def test_one_step_is_exact_for_a_point() -> None:
    """Data at one point has the kernel as its exact reverse law, so a single step of any size gives the density."""
    law, process = Gaussian([0.3, -0.2], 0.0), VP()
    x = Streams.of(0, 5).normal(torch.empty(5, 2, dtype=torch.float64))
    ctx = context(5)
    end = run(superpose(law.denoiser(process)), ctx, 1, x=x, start=0.9, stop=0.4)
    logs = []
    for y, t in ((x, 0.9), (end, 0.4)):
        c = process.coef(t)
        logs.append(-0.5 * ((y - c.alpha * law.mean) / c.sigma).square().sum(1) - 2 * torch.tensor(c.sigma).log())
    torch.testing.assert_close(log_densities(ctx)[:, 0], logs[1] - logs[0])


@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
def test_or_samples_the_mixture_and_averaging_does_not(process: Any) -> None:
    n = 400
    both = GaussianMixture(torch.cat([LEFT.means, RIGHT.means]), [0.4] * 4)
    truth, again = both.sample(n, 5), both.sample(n, 6)
    x = run(pair(process), context(n), 60, stop=0.0)
    between = run(pair(process, temperature=0.0), context(n), 60, stop=0.0)
    floor, ours, plain = (sliced_wasserstein(v, truth).value for v in (again, x, between))
    assert ours < 2 * floor and plain > 4 * floor
    assert abs(float((x[:, 0] > 0).double().mean()) - 0.5) < 0.09


def test_bias_shifts_or_towards_a_model() -> None:
    x = run(pair(VP(), bias=[3.0, 0.0]), context(100), 40)
    assert float((x[:, 0] < 0).double().mean()) > 0.85


@pytest.mark.parametrize("solver", ["ddpm", "euler-maruyama"])
def test_and_keeps_exact_densities_equal(solver: str) -> None:
    process, gaps = VP(), {}
    for name, options in {"and": {"mode": "and"}, "averaging": {"temperature": 0.0}}.items():
        x = run(pair(process, **options), context(200), 100, solver)
        gaps[name] = float((exact(LEFT, x, STOP, process) - exact(RIGHT, x, STOP, process)).abs().median())
    assert gaps["and"] < 0.05 * gaps["averaging"]


def test_and_of_three_and_its_bias() -> None:
    """The system's own log densities come out equal to round-off under the kernel it solves for, or apart by the bias."""
    laws = [Gaussian(m, [0.3, 0.5]) for m in ([1.0, 0.0], [-1.0, 0.2], [0.0, 1.0])]
    for bias in (None, [0.4, 0.0, -0.2]):
        ctx = context(16)
        three = superpose(*(law.denoiser(VP()) for law in laws), mode="and", bias=bias)
        run(three, ctx, 40)
        found = log_densities(ctx) - torch.tensor(bias or [0.0] * 3, dtype=torch.float64)
        torch.testing.assert_close(found, found[:, :1].expand(-1, 3), atol=1e-6, rtol=0)


def test_equalising_solves_its_equation() -> None:
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(6, 4, 9, generator=draw, dtype=torch.float64)
    noise, x = torch.randn(2, 6, 9, generator=draw, dtype=torch.float64)
    weights = equalising(means, 0.7, noise, torch.zeros(6, 4, dtype=torch.float64))
    y = (weights[..., None] * means).sum(1) + 0.7 * noise
    gains = density_gain(VP(), x, y, 0.5, 0.45, means, 0.7)
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(gains, gains[:, :1].expand(-1, 4))


def test_equal_models_get_equal_weights() -> None:
    means = torch.ones(2, 3, 5, dtype=torch.float64)
    noise = torch.ones(2, 5, dtype=torch.float64)
    weights = equalising(means, 0.1, noise, torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize("mode", ["or", "and"])
def test_two_copies_are_one(mode: str) -> None:
    one = LEFT.denoiser(VP())
    expected = run(one, context(8), 12)
    torch.testing.assert_close(run(superpose(one, one, mode=mode), context(8), 12), expected)


@pytest.mark.parametrize("mode", ["or", "and"])
def test_items_are_alone_and_seeds_repeat(mode: str) -> None:
    both = pair(VP(), mode=mode)
    whole = run(both, context(6), 15)
    torch.testing.assert_close(run(both, context(6), 15), whole, rtol=0, atol=0)
    part = context(6)
    part.rng, part.batch = Streams.of(0, 6).select([4, 2]), 2
    torch.testing.assert_close(run(both, part, 15, shape=(2, 2)), whole[[4, 2]])


def test_float32_follows_float64() -> None:
    both = pair(Flow(), mode="and")
    double = run(both, context(8), 15)
    ctx = Context.of(8, 0)
    single = run(both, ctx, 15)
    assert single.dtype == torch.float32 and log_densities(ctx).dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=2e-3, rtol=0)


def test_prompts_of_one_denoiser_are_two_denoisers() -> None:
    """Under two conditions, with classifier-free guidance inside, it is the superposition of the two guided models."""
    law = Mixture([Gaussian(m, [0.2, 0.3]) for m in ([1.0, 0.0], [-1.0, 0.5], [0.0, -1.0])])
    labelled = law.labelled(VP())
    tell = [{"label": torch.full((8,), k)} for k in (0, 2)]
    both = tell[0] | also(tell[1])
    ctx = context(8, cond=both)
    run(superposition("and")(cfg(2.0)(labelled)), ctx, 20)
    found = log_densities(ctx)
    torch.testing.assert_close(found[:, 0], found[:, 1], atol=1e-6, rtol=0)
    assert ctx.run.nfe == 20 * 2 * 2
    sided = superposition("or", bias=[0.0, 1e4])(labelled)
    expected = run(labelled, context(8, cond=tell[1]), 20)
    torch.testing.assert_close(run(sided, context(8, cond=both), 20), expected)
    with pytest.raises(InputError, match="also"):
        run(sided, context(8, cond=tell[0]), 20)
    with pytest.raises(InputError, match="2 biases for 3"):
        run(sided, context(8, cond=both | also(tell[1], tell[1])), 20)


def test_a_network_predicting_noise() -> None:
    def net(x: Tensor, label: Tensor) -> Tensor:
        return torch.tanh(x + label.mean())

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return net(x, label[:, None])

    parts = [parametrized(Net(), VP(), kind) for kind in ("eps", "v")]
    ctx = Context.of(4, 0)
    assert run(superpose(*parts), ctx, 8, stop=0.0).isfinite().all() and log_densities(ctx).isfinite().all()


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver++", "ddpm(eta=0.0)", "euler-maruyama(eta=0.1)"])
def test_solvers_without_the_noise_are_refused(solver: str) -> None:
    with pytest.raises(InputError, match="noise"):
        run(pair(VP()), context(16), 10, solver)


def test_a_stochastic_multistep_solver_samples_the_mixture() -> None:
    x = run(pair(VP()), context(200), 60, "dpm-solver++(order=2, eta=1.0)")
    assert abs(float((x[:, 0] > 0).double().mean()) - 0.5) < 0.12 and abs(float(x.abs().mean()) - 1.5) < 0.1


def test_bad_input_is_said() -> None:
    one = LEFT.denoiser(VP())
    for call, words in (
        (lambda: superpose(one, RIGHT.denoiser(Flow())), "different processes"),
        (lambda: superpose(one, mode="xor"), "or, and"),
        (lambda: superpose(), "at least one"),
        (lambda: superpose(one, one, bias=[1.0]), "1 biases for 2"),
        (lambda: superpose(one, temperature=-1.0), "temperature"),
        (lambda: log_densities(context(2)), "no superposition"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_a_resumed_run_needs_its_context() -> None:
    from sfumato.core import trajectory

    both, ctx = pair(VP()), context(4)
    args = both, solvers.get("ddpm"), grids.get("arctan"), 10
    steps = list(trajectory(*args, shape=(4, 2), ctx=ctx))
    with pytest.raises(InputError, match="log densities"):
        list(trajectory(*args, x=steps[5], ctx=context(4)))
