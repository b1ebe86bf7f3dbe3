"""Guidance by a loss against beliefs of tilted Gaussians, which are known exactly, and against measurement guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato import core, grids, oracles, solvers
from sfumato.core import Context, InputError
from sfumato.denoisers import parametrized
from sfumato.guidance import cfg, loss, measurement
from sfumato.operators import Identity, Mask
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow

LAWS = {"vp": VP(), "ve": VE(), "edm": EDM(), "flow": Flow(), "cosine": Cosine(), "ddpm": DDPM("linear")}
COV = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, -0.2], [0.0, -0.2, 0.3]], dtype=torch.float64)
MEAN = torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64)
TILT = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)
STD = 0.7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_cost(x0: Tensor, cond: Any, *more: Any) -> Tensor:
    return -(x0 * TILT.to(x0)).sum(1)


def times(process: Any) -> list[Any]:
    inside = [process.time(lam) for lam in (3.0, 1.0, -1.0)]
    return [*inside, 1.0, torch.linspace(0.5, 1.0, 6, dtype=torch.float64)]


def close(ours: Any, theirs: Any, **options: float) -> None:
    for kind in ("x0", "eps"):
        torch.testing.assert_close(ours.view(kind), theirs.view(kind), **{"rtol": 1e-6, "atol": 1e-6, **options})


def scaled(x: Tensor, process: Any, t: Any) -> Tensor:
    sigma = process.coef(t).sigma
    return x * (sigma[:, None] if isinstance(sigma, Tensor) else sigma)


@pytest.mark.parametrize("law", LAWS)
def test_a_linear_cost_gives_the_belief_of_the_tilted_gaussian(law):
    """N(m, C) exp(a x0) is N(m + C a, C); through the network its covariance is known, at alpha = 0 it is not."""
    process = LAWS[law]
    guided = loss(linear_cost)(oracles.Gaussian(MEAN, COV).denoiser(process))
    tilted = oracles.Gaussian(MEAN + COV @ TILT, COV).denoiser(process)
    for t in times(process)[:3]:
        x = scaled(normal(6, 3, seed=1), process, t)
        ours = guided(x, t, Context.of(6))
        close(ours, tilted(x, t, Context.of(6)))
        assert not ours.mean.requires_grad and not ours.x.requires_grad


@pytest.mark.parametrize("through", ["network", "belief"])
@pytest.mark.parametrize("law", LAWS)
def test_for_isotropic_data_skipping_the_network_is_exact_too(law, through):
    process = LAWS[law]
    guided = loss(linear_cost, through=through, data_std=STD)(oracles.Gaussian(MEAN, STD**2).denoiser(process))
    tilted = oracles.Gaussian(MEAN + STD**2 * TILT, STD**2).denoiser(process)
    for t in times(process):
        x = scaled(normal(6, 3, seed=1), process, t)
        close(guided(x, t, Context.of(6)), tilted(x, t, Context.of(6)))


@pytest.mark.parametrize("law", LAWS)
def test_of_the_state_it_is_bayes_rule(law):
    """The state's own likelihood under a linear tilt, log E[exp(a x0) | x_t], is linear in x_t: a E[x0 | x_t]."""
    process, oracle = LAWS[law], oracles.Gaussian(MEAN, COV)

    def cost(x: Tensor, cond: Any, t: Any) -> Tensor:
        return linear_cost(oracle.belief(x, process.coef(t))[0], cond)

    guided = loss(cost, through="state")(oracle.denoiser(process))
    tilted = oracles.Gaussian(MEAN + COV @ TILT, COV).denoiser(process)
    for t in times(process)[:3]:
        x = scaled(normal(6, 3, seed=1), process, t)
        close(guided(x, t, Context.of(6)), tilted(x, t, Context.of(6)))


@pytest.mark.parametrize("law", LAWS)
def test_measurement_guidance_is_the_loss_of_the_residual(law):
    process, operator = LAWS[law], Mask(torch.tensor([True, False, True]), noise=0.4)
    y, oracle = normal(1, 3, seed=2) * torch.tensor([1, 0, 1]), oracles.Gaussian(MEAN, COV)
    ours = loss(lambda x0, cond: operator.residual(x0, y), data_std=0.5)(oracle.denoiser(process))
    theirs = measurement(operator, y, data_std=0, jacobian=True)(oracle.denoiser(process))
    for t in times(process)[:3]:
        x = scaled(normal(6, 3, seed=1), process, t)
        close(ours(x, t, Context.of(6)), theirs(x, t, Context.of(6)))


def test_without_the_network_it_is_the_measurements_step_where_the_noise_is_large():
    """The proximal map is v / (v + noise^2) of the gap, a gradient step v / noise^2 of it."""
    process, operator, y = VP(), Identity(noise=100.0), normal(6, 3, seed=2)
    oracle = oracles.Gaussian(MEAN, COV).denoiser(process)
    ours = loss(lambda x0, cond: operator.residual(x0, y), through="belief", data_std=STD)(oracle)
    theirs = measurement(operator, y, data_std=STD)(oracle)
    x = normal(6, 3, seed=1)
    move = [d(x, 0.6, Context.of(6)).mean - oracle(x, 0.6, Context.of(6)).mean for d in (ours, theirs)]
    torch.testing.assert_close(*move, rtol=1e-4, atol=0)


@pytest.mark.parametrize("through", ["network", "belief", "state"])
@pytest.mark.parametrize("law", ["vp", "flow"])
def test_sampling_with_any_solver_ends_in_the_tilted_gaussian(law, through):
    """Every solver runs; the flow of the guided belief is that of the tilted law, to the solvers' accuracy."""
    process, oracle = LAWS[law], oracles.Gaussian(MEAN, STD**2)

    def cost(x: Tensor, cond: Any, *t: Any) -> Tensor:
        return linear_cost(oracle.belief(x, process.coef(t[0]))[0] if t else x, cond)

    guided = loss(cost, through=through, data_std=STD)(oracle.denoiser(process))
    tilted = oracles.Gaussian(MEAN + STD**2 * TILT, STD**2)
    x = process.coef(1.0).sigma * normal(4, 3, seed=1)
    start = 0.98 if through == "state" else 1.0  # at alpha = 0 a state says nothing of its likelihood
    exact = tilted.transport(x, process.coef(start), process.coef(0.0))
    for name, steps in (("ddim", 300), ("dpm-solver++", 60), ("heun", 60)):
        options = {"x": x, "start": start}
        out = core.sample(guided, solvers.get(name), grids.get("arctan"), steps, **options)
        torch.testing.assert_close(out, exact, rtol=0, atol=0.03)


def test_scale_and_interval_and_schedule():
    process = VP()
    oracle = oracles.Gaussian(MEAN, COV).denoiser(process)
    x = normal(4, 3)

    def move(t: Any = 0.5, **options: Any) -> Tensor:
        guided = loss(linear_cost, **options)(oracle)
        return guided(x, t, Context.of(4)).mean - oracle(x, t, Context.of(4)).mean

    torch.testing.assert_close(move(scale=3.0), 3 * move())
    torch.testing.assert_close(move(scale=lambda t: 6 * t), 3 * move())
    each = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(move(scale=each), each[:, None] * move())
    assert not move(scale=0.0).any() and not move(interval=(0.6, 1.0)).any()
    torch.testing.assert_close(move(interval=(0.5, 1.0)), move())
    clock = torch.tensor([0.1, 0.5, 0.6, 0.9], dtype=torch.float64)
    gated = move(clock, interval=(0.3, 0.7))
    torch.testing.assert_close(gated[1:3], move(clock)[1:3])
    assert not gated[[0, 3]].any()
    torch.testing.assert_close(
        move(normalise=True, weight="constant", scale=0.2).square().mean(1).sqrt(), 0.2 + 0 * each
    )
    free, held = move(scale=each), move(scale=each, limit=0.5)
    assert held.square().mean(1).max() <= 0.25 + 1e-12
    torch.testing.assert_close(held[:2], free[:2])  # below the limit nothing changes
    torch.testing.assert_close(torch.cosine_similarity(held[2:], free[2:]), torch.ones(2).double())


@pytest.mark.parametrize("law, keep", [("flow", "flow"), ("vp", "eps"), ("vp", "v"), ("flow", "x")])
def test_what_is_kept_stays_while_x0_moves(law, keep):
    process = LAWS[law]
    oracle = oracles.Gaussian(MEAN, COV).denoiser(process)
    guided = loss(linear_cost, 0.3, through="belief", weight="constant", keep=keep)(oracle)
    x, t = normal(4, 3), 0.6
    before, after = (d(x, t, Context.of(4)) for d in (oracle, guided))
    torch.testing.assert_close(after.mean, before.mean + 0.3 * TILT)
    if keep == "x":
        assert after.x is x
    else:
        torch.testing.assert_close(after.view(keep), before.view(keep))
        torch.testing.assert_close(after.x, after.at(after.coef.alpha, after.coef.sigma))


class Features(nn.Module):
    """A network with an inside: prediction = last(tanh(first(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(3, 3).double() for _ in range(2))

    def forward(self, x: Tensor, label: Tensor, *, label_y: Tensor | None = None) -> Tensor:
        shift = 0.0 if label_y is None else label_y[:, None]
        return self.last(torch.tanh(self.first(x)) + shift)


def test_a_cost_of_the_networks_own_features():
    torch.manual_seed(0)
    net = Features()
    denoiser = parametrized(net, VP(), "eps", null={"label_y": 0.0})

    def cost(x0: Tensor, cond: Any, features: Any) -> Tensor:
        return features["first"].square().sum(1)

    x = normal(4, 3)
    ctx = Context.of(4, cond={"label_y": torch.ones(4, dtype=torch.float64)})
    guided = loss(cost, weight="constant", features=["first"])(denoiser)
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net.first(at).square().sum(), at)
    torch.testing.assert_close(guided(x, 0.5, ctx).mean, denoiser(x, 0.5, ctx).mean.detach() - slope)
    under = loss(lambda x0, cond, f: f["first"][:4].square().sum(1), weight="constant", features=["first"])
    both = under(cfg(2.0)(denoiser))(x, 0.5, ctx).mean  # the conditional rows come first
    torch.testing.assert_close(both, cfg(2.0)(denoiser)(x, 0.5, ctx).mean.detach() - slope)


@pytest.mark.parametrize("through", ["network", "belief", "state"])
def test_items_do_not_depend_on_their_batch(through):
    torch.manual_seed(0)
    denoiser = parametrized(Features(), VP(), "eps")
    guided = loss(lambda x, cond, *t: (x**4).sum(1), 0.2, through=through, normalise=True, limit=0.3)(denoiser)
    x = normal(5, 3)
    whole = guided(x, 0.5, Context.of(5)).mean
    each = torch.cat([guided(x[i : i + 1], 0.5, Context.of(1)).mean for i in range(5)])
    torch.testing.assert_close(whole, each)


def test_guidances_nest_and_stay_differentiable():
    """The sum of two costs is one inside the other only to first order; the gradient goes through both exactly."""
    process = VP()
    oracle = oracles.Gaussian(MEAN, COV).denoiser(process)
    for through in ("network", "belief", "state"):
        guided = loss(lambda x, cond, *t: (x**4).sum(1), 0.05, through=through)(oracle)
        fn = lambda x, g=guided: g(x, 0.4, Context.of(2)).mean  # noqa: E731
        assert torch.autograd.gradcheck(fn, normal(2, 3).requires_grad_())
    nested = loss(linear_cost)(loss(linear_cost, 2.0)(oracle))
    x = normal(2, 3)
    close(nested(x, 0.4, Context.of(2)), loss(linear_cost, 3.0)(oracle)(x, 0.4, Context.of(2)))


def test_a_decoded_cost_and_float32():
    class Twice(nn.Module):
        def decode(self, x: Tensor) -> Tensor:
            return 2 * x

    oracle = oracles.Gaussian(MEAN, COV).denoiser(VP())
    x = normal(2, 3)
    plain, decoded = loss(linear_cost, 2.0)(oracle), loss(linear_cost, codec=Twice())(oracle)
    close(plain(x, 0.4, Context.of(2)), decoded(x, 0.4, Context.of(2)))
    single = plain(x.float(), 0.4, Context.of(2)).mean
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), plain(x, 0.4, Context.of(2)).mean, rtol=1e-4, atol=1e-4)


def test_calls_are_counted_and_clean_states_stay():
    oracle = oracles.Gaussian(MEAN, COV).denoiser(VP())
    ctx, x = Context.of(3), normal(3, 3)
    guided = loss(linear_cost)(oracle)
    guided(x, 0.5, ctx)
    assert ctx.run.nfe == 1
    torch.testing.assert_close(guided(x, 0.0, ctx).mean, x)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"through": "decoder"}, "through"),
        ({"weight": "snr"}, "weight"),
        ({"keep": "score"}, "keep"),
        ({"interval": (0.6, 0.2)}, "interval"),
        ({"limit": 0.0}, "positive"),
        ({"data_std": 0.0}, "positive"),
        ({"features": ["first"], "through": "belief"}, "features"),
    ],
)
def test_numbers_that_say_nothing_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        loss(linear_cost, **options)(oracles.Gaussian(MEAN, COV).denoiser(VP()))


@pytest.mark.parametrize("through", ["network", "belief", "state"])
def test_costs_without_gradient_or_of_another_shape_are_refused(through):
    oracle, x = oracles.Gaussian(MEAN, COV).denoiser(VP()), normal(3, 3)
    for cost, says in (
        (lambda x0, *more: x0.detach().sum(1), "no gradient"),
        (lambda x0, *more: x0.sum(), "one number an item"),
        (lambda x0, *more: 1.0, "one number an item"),
    ):
        with pytest.raises(InputError, match=says):
            loss(cost, through=through)(oracle)(x, 0.5, Context.of(3))


def test_what_says_x0_itself_cannot_stay_while_x0_moves():
    denoiser = oracles.Gaussian([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]]).denoiser(Cosine())
    guided = loss(lambda x0, cond: x0.square().sum(1), keep="flow", through="belief")(denoiser)
    with pytest.raises(InputError, match="interval="):
        guided(torch.ones(2, 2), 1.0, Context.of(2))
    assert torch.isfinite(guided(torch.ones(2, 2), 0.9, Context.of(2)).mean).all()
