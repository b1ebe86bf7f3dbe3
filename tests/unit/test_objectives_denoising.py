"""Denoising: one loss in every kind, samplers of times and their weights, condition dropout, streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from sfumato.core import KINDS, Coef, Context, Denoiser, InputError, Posterior, Streams, mix, row
from sfumato.denoisers import parametrized
from sfumato.objectives import ByLoss, Denoising, LogitNormal, LogNormal, Uniform, drop, weights
from sfumato.objectives.times import unit
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow

PROCESSES = {
    "vp": VP(),
    "flow": Flow(),
    "shifted": Flow(3.0),
    "cosine": Cosine(),
    "ddpm": DDPM(),
    "edm": EDM(),
    "ve": VE(),
}
F64 = torch.float64


class Believer(Denoiser):
    """Believes x0 = 0.7 tanh(x) whatever it is asked to say, so that every kind expresses one belief."""

    def __init__(self, process, kind):
        super().__init__()
        self.process, self.kind = process, kind

    def forward(self, x, t, ctx):
        c = self.process.coef(t)
        return Posterior(Posterior(0.7 * torch.tanh(x), "x0", x, c).at(*row(self.kind, c)), self.kind, x, c)


def loss(objective, x, seed=0, **more):
    return objective({"x": x, **more}, Context.of(len(x), seed)).total


def data(n, *shape, seed=0):
    return torch.randn(n, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ one loss in every kind

NAMES = [n for n in weights.names() if n != "uniform"]


@pytest.mark.parametrize("weighting", NAMES)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_weighted_loss_is_one_number_in_every_kind(process, weighting):
    times = Uniform(0.05, 0.95)

    def edm(c):
        return (
            c.sigma / (0.5 * (c.sigma**2 + (0.5 * c.alpha) ** 2) ** 0.5),
            -0.5 * c.alpha / (c.sigma**2 + (0.5 * c.alpha) ** 2) ** 0.5,
        )  # noqa: E731

    class AsRow(Believer):
        def forward(self, x, t, ctx):
            c = self.process.coef(t)
            return Posterior(Posterior(0.7 * torch.tanh(x), "x0", x, c).at(*edm(c)), edm(c), x, c)

    law, x = PROCESSES[process], data(64, 3)
    believers = [Believer(law, kind) for kind in KINDS] + [AsRow(law, None)]
    values = [loss(Denoising(b, times=times, weighting=weighting), x).item() for b in believers]
    assert max(values) - min(values) < 1e-10 * max(values)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "score"])
def test_a_kinds_weighting_is_its_plain_squared_error(kind):
    law, x = VP(), data(64, 3)
    plain = loss(Denoising(Believer(law, kind), times=Uniform(0.05, 0.95)), x)
    for other in KINDS:
        torch.testing.assert_close(
            loss(Denoising(Believer(law, other), times=Uniform(0.05, 0.95), weighting=kind), x),
            plain,
            rtol=1e-10,
            atol=0,
        )


# What the papers print, as weights of |x0^ - x0|^2 with snr = alpha^2 / sigma^2, or of |eps^ - eps|^2 = snr |x0^ - x0|^2.
PUBLISHED = {
    "snr": lambda snr, s: snr,
    "min-snr": lambda snr, s: snr.clamp(max=5.0),
    "max-snr": lambda snr, s: snr.clamp(min=1.0),
    "p2": lambda snr, s: snr / (1 + snr),
    "edm": lambda snr, s: (s**2 + 0.25) / (0.5 * s) ** 2,
    "sigmoid": lambda snr, s: snr * torch.sigmoid(1.0 - snr.log()),
    "x0": lambda snr, s: torch.ones_like(snr),
    "eps": lambda snr, s: snr,
    "v": lambda snr, s: snr + 1,
}


@pytest.mark.parametrize("weighting", PUBLISHED)
def test_weights_are_the_published_ones(weighting):
    t = torch.linspace(0.02, 0.98, 200, dtype=F64)
    law = VE() if weighting == "edm" else VP()
    c = law.coef(t)
    mine = weights.weight(weighting, "x0", c)
    expected = PUBLISHED[weighting]((c.alpha / c.sigma) ** 2, c.sigma)
    torch.testing.assert_close(torch.as_tensor(mine, dtype=F64).expand_as(expected), expected, rtol=1e-9, atol=0)


def test_weights_take_numbers_and_functions():
    c = VP().coef(torch.linspace(0.1, 0.9, 9, dtype=F64))
    snr = (c.alpha / c.sigma) ** 2
    torch.testing.assert_close(weights.weight("min-snr", "x0", c, gamma=2.0), snr.clamp(max=2.0), rtol=1e-10, atol=0)
    torch.testing.assert_close(weights.weight("p2", "eps", c, k=2.0, gamma=0.5), (2 + snr) ** -0.5, rtol=1e-10, atol=0)
    torch.testing.assert_close(weights.weight(lambda c: c.alpha, "eps", c), c.alpha / snr, rtol=1e-10, atol=0)


@pytest.mark.parametrize("weighting", NAMES)
def test_weights_of_v_are_finite_at_both_ends_of_time(weighting):
    for law in (Flow(), Cosine()):
        c = law.coef(torch.tensor([0.0, 1.0], dtype=F64))
        value = torch.as_tensor(weights.weight(weighting, "v", c))
        assert torch.isfinite(value).all() and (value >= 0).all()


def test_the_edm_network_is_trained_on_a_unit_scale():
    """With the weight 'edm' the preconditioned network has weight 1: that is how Karras et al. chose it."""
    net = nn.Linear(2, 2)
    denoiser = parametrized(lambda_net(net), EDM(), "edm")
    c = EDM().coef(torch.linspace(0.1, 0.9, 9, dtype=F64))
    kind = denoiser(torch.zeros(9, 2), torch.linspace(0.1, 0.9, 9, dtype=F64), Context.of(9)).kind
    torch.testing.assert_close(weights.weight("edm", kind, c), torch.ones(9, dtype=F64), rtol=1e-10, atol=0)


def lambda_net(inner):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, label):
            return self.inner(x)

    return Net()


def test_the_loss_is_minimal_at_the_exact_posterior_mean():
    """For Gaussian data x0 ~ N(0, s^2) the best linear denoiser has gain alpha s^2 / (alpha^2 s^2 + sigma^2)."""
    x, s, law = 0.6 * data(20_000, 1), 0.6, VP()

    class Gain(Denoiser):
        process = law

        def __init__(self, change):
            super().__init__()
            self.change = nn.Parameter(torch.tensor(change, dtype=F64))

        def forward(self, x, t, ctx):
            c = law.coef(t)
            gain = c.alpha * s**2 / (c.alpha**2 * s**2 + c.sigma**2)
            return Posterior((gain * self.change)[:, None] * x, "x0", x, c)

    at = {g: loss(Denoising(Gain(g), weighting="min-snr"), x).item() for g in (0.9, 1.0, 1.1)}
    assert at[1.0] < min(at[0.9], at[1.1])
    best = Gain(1.0)
    loss(Denoising(best, weighting="min-snr"), x).backward()
    assert abs(best.change.grad.item()) < 0.02


# ------------------------------------------------------------------ times

SAMPLERS = {
    "uniform": Uniform(0.1, 0.9),
    "logit-normal": LogitNormal(-0.3, 1.2, 0.02, 0.98, unbiased=True),
    "log-normal": LogNormal(-0.5, 1.5, 0.1, 0.9, unbiased=True),
}


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_importance_weights_are_unbiased(name, stratified):
    """mean(weight f(t)) against the integral of f over uniform t, by quadrature."""
    import dataclasses

    sampler = dataclasses.replace(SAMPLERS[name], stratified=stratified)
    for law in (VP(), Flow(2.0), EDM(0.01, 20.0, 3.0)):
        t, w = sampler(law, Streams.of(3, 60_000))
        assert t.dtype == w.dtype == F64 and t.min() >= sampler.low and t.max() <= sampler.high
        grid = torch.linspace(sampler.low, sampler.high, 20_001, dtype=F64)
        for f in (torch.ones_like, lambda u: u, lambda u: torch.sin(6 * u) ** 2):
            samples = w * f(t)
            error = samples.std() / len(t) ** 0.5
            assert abs(samples.mean() - f(grid).mean()) < 4.5 * error + 2e-4


def test_densities_are_the_published_ones():
    """Kolmogorov-Smirnov against the analytic distribution functions of t and of ln sigma."""
    t, w = LogitNormal(0.4, 0.8, stratified=False)(Flow(), Streams.of(1, 4000))
    assert (w == 1).all()
    assert stats.kstest(torch.logit(t).numpy(), stats.norm(0.4, 0.8).cdf).pvalue > 1e-3
    t, _ = LogNormal(stratified=False)(EDM(), Streams.of(2, 4000))
    assert stats.kstest(EDM().coef(t).sigma.log().numpy(), stats.norm(-1.2, 1.2).cdf).pvalue > 1e-3
    low, high = (VP().coef(e).lam for e in (0.3, 0.6))
    t, _ = LogNormal(0.0, 2.0, 0.3, 0.6, stratified=False)(VP(), Streams.of(3, 4000))
    truncated = stats.truncnorm(-low / 2, -high / 2, 0, 2)
    assert stats.kstest(-VP().coef(t).lam.numpy(), truncated.cdf).pvalue > 1e-3


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40), n=st.integers(2, 300), first=st.integers(0, 100))
def test_stratified_times_fill_the_interval_and_each_is_uniform(seed, n, first):
    streams = Streams.of(seed, first + n).select(slice(first, first + n))
    u = unit(streams, True).sort().values
    gaps = torch.diff(torch.cat([u, u[:1] + 1]))
    assert u.min() >= 0 and u.max() < 1 and gaps.max() * n < 3.0  # independent numbers leave gaps of log(n) / n
    assert torch.equal(unit(Streams.of(seed, 5), True), unit(Streams.of(seed, 50), True)[:5])


def test_stratified_times_are_uniform_over_seeds():
    u = torch.stack([unit(Streams.of(mix(0, s), 3), True) for s in range(3000)])
    for item in u.T:
        assert stats.kstest(item.numpy(), "uniform").pvalue > 1e-3
    draws = Streams.of(0, 4)
    assert not torch.equal(unit(draws, True), unit(draws, True))  # the second draw is another one


def test_streams_of_other_draws_are_not_touched_by_the_shared_offset():
    a, b = Streams.of(9, 6), Streams.of(9, 6)
    unit(a, True), unit(b, False)
    like = torch.empty(6, 4)
    assert torch.equal(a.normal(like), b.normal(like))


def test_importance_by_loss_learns_the_root_mean_square_and_stays_unbiased():
    sampler = ByLoss(16, floor=0.02)
    f = lambda t: 0.05 + torch.exp(-((t - 0.2) ** 2) / 0.005)  # noqa: E731
    for it in range(60):
        t, w = sampler(VP(), Streams.of(it, 128))
        if it == 0:
            assert torch.equal(w, torch.ones_like(w))
        sampler.observe(t, f(t))
        sampler.fold()
    grid = torch.linspace(0, 1, 160_001, dtype=F64)[:-1]
    rms = f(grid).view(16, -1).square().mean(1).sqrt()
    torch.testing.assert_close(sampler.masses(), 0.98 * rms / rms.sum() + 0.02 / 16, rtol=0.2, atol=0.005)
    t, w = sampler(VP(), Streams.of(1000, 50_000))
    weighted, plain = w * f(t), f(Uniform(stratified=False)(VP(), Streams.of(1001, 50_000))[0])
    assert abs(weighted.mean() - f(grid).mean()) < 5e-3
    assert weighted.var() < 0.25 * plain.var()


def test_importance_by_loss_is_state():
    def observed(n):
        s = ByLoss(4)
        for it in range(n):
            s.observe(torch.rand(50, dtype=F64, generator=torch.Generator().manual_seed(it)), torch.arange(50.0))
            s.fold()
        return s

    one, other = observed(3), ByLoss(4)
    other.load_state_dict(one.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(one(VP(), Streams.of(0, 9)), other(VP(), Streams.of(0, 9)), strict=True)
    )


# ------------------------------------------------------------------ conditions


def test_condition_dropout_rates_joint_and_independent():
    n = 20_000
    cond = {"y": torch.arange(n) % 10, "text": {"a": torch.ones(n, 2), "b": torch.ones(n)}, "z": torch.ones(n, 3)}
    null = {"y": 10, "text": {"a": torch.tensor([-1.0, -2.0]), "b": -3.0}, "z": 0.0}

    def gone(rates):
        out = drop(cond, null, rates, Context.of(n, 1))
        assert torch.equal(out["text"]["a"][:, 1] == -2, out["text"]["b"] == -3)  # a tree goes as one
        return {"y": out["y"] == 10, "text": out["text"]["b"] == -3, "z": out["z"][:, 2] == 0}

    all_ = gone(0.3)
    assert torch.equal(all_["y"], all_["text"]) and torch.equal(all_["y"], all_["z"])
    assert all_["y"].double().mean() == pytest.approx(0.3, abs=0.015)
    some = gone({"y": 0.1, "text+z": 0.5})
    assert torch.equal(some["text"], some["z"])
    assert some["y"].double().mean() == pytest.approx(0.1, abs=0.01)
    assert (some["y"] & some["z"]).double().mean() == pytest.approx(0.05, abs=0.01)  # independent of each other


def test_dropout_needs_a_null():
    cond = {"y": torch.zeros(4)}
    for rates, null in ((0.1, {}), ({"y": 0.1}, {}), ({"w": 0.1}, {"w": 0}), ({"y+w": 0.1}, {"y": 0, "w": 0})):
        with pytest.raises(InputError, match="dropout of"):
            drop(cond, null, rates, Context.of(4))
    assert drop({}, {}, 0.1, Context.of(4)) == {} and drop(cond, {}, 0, Context.of(4)) == cond
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        Denoising(Believer(VP(), "v"), dropout=1.5)


def test_a_learned_null_receives_gradient():
    null = nn.Parameter(torch.zeros(2))
    out = drop({"y": torch.ones(8, 2)}, {"y": null}, 1.0, Context.of(8))
    out["y"].sum().backward()
    assert torch.equal(null.grad, torch.full((2,), 8.0))


def test_the_denoiser_sees_the_dropped_conditions():
    seen = []

    class Sees(Believer):
        null = {"y": -1}

        def forward(self, x, t, ctx):
            seen.append(ctx.cond["y"])
            return super().forward(x, t, ctx)

    Denoising(Sees(VP(), "v"), dropout=0.5)({"x": data(400, 2), "cond": {"y": torch.arange(400)}}, Context.of(400))
    assert 0.4 < (seen[0] == -1).double().mean() < 0.6


# ------------------------------------------------------------------ data, streams, refusals


def test_item_i_does_not_depend_on_the_batch():
    class Items(Believer):
        null = {"y": -1.0}

        def forward(self, x, t, ctx):
            self.saw = (x, t, ctx.cond["y"])
            return super().forward(x, t, ctx)

    saw = []
    for n in (3, 11):
        denoiser = Items(Flow(), "v")
        batch = {"x": data(11, 2)[:n], "std": torch.ones(n, 2), "cond": {"y": torch.ones(n)}}
        Denoising(denoiser, dropout=0.5, times=LogitNormal())(batch, Context.of(n, 4))
        saw.append(denoiser.saw)
    assert all(torch.equal(a, b[:3]) for a, b in zip(*saw, strict=True))


def test_pre_encoded_latents_are_drawn_from_the_encoders_posterior():
    n = 20_000

    class Keeps(Believer):
        def forward(self, x, t, ctx):
            self.x = x
            return super().forward(x, t, ctx)

    denoiser = Keeps(Flow(), "v")
    mean, std = torch.tensor([1.0, -2.0]).expand(n, 2), torch.tensor([0.5, 0.1]).expand(n, 2)
    Denoising(denoiser, times=lambda p, s: (torch.zeros(n, dtype=F64), torch.ones(n, dtype=F64)))(
        {"x": mean, "std": std}, Context.of(n)
    )
    np.testing.assert_allclose(denoiser.x.mean(0), mean[0], atol=0.02)
    np.testing.assert_allclose(denoiser.x.std(0), std[0], rtol=0.03)
    assert abs(np.corrcoef(denoiser.x.T.numpy())[0, 1]) < 0.03


def test_given_noise_and_codec_are_used():
    class Codec(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=F64))

        def encode(self, x, ctx):
            return self.scale * x

    class Keeps(Believer):
        def forward(self, x, t, ctx):
            self.x = x
            return super().forward(x, t, ctx)

    denoiser, x, noise = Keeps(Flow(), "v"), data(5, 2), data(5, 2, seed=1)
    half = lambda process, streams: (torch.full((5,), 0.25, dtype=F64), torch.ones(5, dtype=F64))  # noqa: E731
    objective = Denoising(denoiser, times=half, codec=Codec())
    objective({"x": x, "noise": noise}, Context.of(5))
    torch.testing.assert_close(denoiser.x, 0.75 * 2 * x + 0.25 * noise)
    assert "scale" not in str(list(objective.state_dict())) and not list(objective.parameters())


def test_float32_and_float64_runs_draw_the_same():
    class Wide(Believer):
        def forward(self, x, t, ctx):
            return super().forward(x, t, ctx)

    values = [loss(Denoising(Wide(VP(), "eps")), data(16, 4).to(d)).item() for d in (torch.float32, F64)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Denoising(Believer(VP(), "v"), weighting="snr+1"), "uniform, x0, eps"),
    (lambda: Uniform(0.5, 0.5), "low = 0.5, high = 0.5"),
    (lambda: LogitNormal(std=0.0), "std = 0.0"),
    (lambda: LogNormal(std=-1.0), "std = -1.0"),
    (lambda: ByLoss(0), "bins = 0"),
    (lambda: LogNormal(40.0, 0.1, 0.1, 0.9)(VP(), Streams.of(0, 2)), "no mass"),
    (lambda: Denoising(Believer(VP(), "v"))({"x": torch.zeros(2, 2)}, Context.of(2, None)), "Context.of"),
])  # fmt: skip
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_belief_that_is_not_gaussian_is_refused():
    class Other(Believer):
        def forward(self, x, t, ctx):
            return {"mean": x}

    with pytest.raises(InputError, match="one Gaussian prediction"):
        loss(Denoising(Other(VP(), "v")), data(2, 2))


def test_coefficients_are_what_callable_weights_see():
    seen = []
    loss(Denoising(Believer(VP(), "v"), weighting=lambda c: seen.append(c) or c.alpha), data(4, 2))
    assert all(isinstance(c, Coef) for c in seen) and seen[-1].alpha.shape == (4,) and not math.isnan(seen[-1].alpha[0])
