"""Classifier guidance against mixtures whose class posterior and conditional beliefs are known exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato import core, grids, oracles, solvers
from sfumato.core import Context, InputError
from sfumato.guidance import cfg, classifier, half_sine, loss, smooth_activations
from sfumato.guidance.classifier import ClassCost
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow

LAWS = {"vp": VP(), "ve": VE(), "edm": EDM(), "flow": Flow(), "cosine": Cosine(), "ddpm": DDPM("linear")}
MIXTURE = oracles.GaussianMixture(
    [[-2.0, 0.0], [2.0, 0.5], [0.0, 3.0]], [[0.5, 0.8], [0.7, 0.3], [0.4, 0.6]], [0.5, 0.3, 0.2]
)
LABEL = torch.tensor([0, 1, 2, 1, 0, 2])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_classes(process: Any) -> Any:
    """log p(component | x_t), which knows the time."""
    return lambda x, t: MIXTURE.classify(x, process.coef(t))


def component(k: int) -> oracles.Gaussian:
    return oracles.Gaussian(MIXTURE.means[k], MIXTURE.variances[k])


@pytest.mark.parametrize("law", LAWS)
def test_the_exact_class_posterior_gives_exactly_the_conditional_denoiser(law):
    process = LAWS[law]
    guided = classifier(exact_classes(process), label=LABEL, through="state")(MIXTURE.denoiser(process))
    inside = [process.time(lam) for lam in (3.0, 1.0, 0.0, -1.0)]
    for t in (*inside, torch.linspace(0.4, 0.9, 6, dtype=torch.float64)):
        coef = process.coef(t)
        a, s = (v[:, None] if isinstance(v, Tensor) else v for v in coef[:2])
        x = a * MIXTURE.sample(6, seed=1) + s * normal(6, 2, seed=2)
        ours = guided(x, t, Context.of(6))
        for i, k in enumerate(LABEL.tolist()):
            clock = t[i : i + 1] if isinstance(t, Tensor) else t
            theirs = component(k).denoiser(process)(x[i : i + 1], clock, Context.of(1))
            for kind in ("x0", "eps"):
                torch.testing.assert_close(ours.view(kind)[i : i + 1], theirs.view(kind), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", ["vp", "edm", "flow"])
def test_samples_of_the_guided_denoiser_are_the_component(law):
    process, n = LAWS[law], 600
    guided = classifier(exact_classes(process), label="class", through="state")(MIXTURE.denoiser(process))
    ctx = Context.of(n, 1, cond={"class": torch.ones(n, dtype=torch.long)}, dtype=torch.float64)
    start = 1.0 if process.coef(1.0).alpha else 0.995
    x = process.coef(start).alpha * MIXTURE.means[1] + process.coef(start).sigma * normal(n, 2, seed=3)
    out = core.sample(guided, solvers.get("dpm-solver++"), grids.get("arctan"), 40, x=x, start=start, ctx=ctx)
    torch.testing.assert_close(out.mean(0), MIXTURE.means[1], rtol=0, atol=0.12)
    torch.testing.assert_close(out.std(0), MIXTURE.variances[1].sqrt(), rtol=0.12, atol=0.02)


def test_a_move_at_the_next_times_weight_is_the_released_ddpm_update():
    """With sigma_s^2 / alpha_s the mean of a DDPM step moves by its variance times the gradient."""
    process, t, s = VP(), 0.6, 0.5
    b = process.coef(s)
    net = lambda x: MIXTURE.classify(x, process.coef(0.0))  # noqa: E731
    plain = MIXTURE.denoiser(process)
    guided = classifier(net, label=LABEL, weight=lambda coef: b.sigma**2 / b.alpha)(plain)
    x = normal(6, 2)
    kernels = [process.kernel(x, d(x, t, Context.of(6)), t, s) for d in (plain, guided)]
    x0 = plain(x, t, Context.of(6)).mean.requires_grad_()
    (slope,) = torch.autograd.grad(net(x0).gather(1, LABEL[:, None]).sum(), x0)
    torch.testing.assert_close(kernels[1].mean - kernels[0].mean, kernels[0].std ** 2 * slope)


def test_temperatures_mix_the_joint_and_the_conditional():
    net = nn.Linear(2, 3).double().eval()
    x, y = normal(4, 2), torch.tensor([0, 2, 1, 0])
    conditional = ClassCost(net, y)(x, {})
    torch.testing.assert_close(conditional, -net(x).log_softmax(1).gather(1, y[:, None])[:, 0])
    torch.testing.assert_close(
        ClassCost(net, y, 2.0, 2.0)(x, {}), nn.functional.cross_entropy(2 * net(x), y, reduction="none")
    )
    at = x.requires_grad_()
    (joint,) = torch.autograd.grad(ClassCost(net, y, 1.0, 0.0)(at, {}).sum(), at)
    torch.testing.assert_close(joint, -net.weight[y].detach())  # the partition is a constant
    named = ClassCost(net, "class")(x, {"class": y})
    torch.testing.assert_close(named, conditional)
    torch.testing.assert_close(ClassCost(net, 2)(x, {})[1], conditional[1])


def test_smooth_activations_share_tensors_and_tend_to_relu():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 3)
    ).eval()
    x = torch.randn(8, 4)
    smooth = smooth_activations(net, 3.0)
    assert not any(isinstance(m, nn.ReLU) for m in smooth.modules()) and isinstance(net[1], nn.ReLU)
    assert smooth[0].weight is net[0].weight and not smooth.training
    torch.testing.assert_close(smooth_activations(net, 1e4)(x), net(x), rtol=1e-3, atol=1e-3)
    assert (smooth(x) - net(x)).abs().max() > 1e-2
    with pytest.raises(InputError, match="no nn.ReLU"):
        smooth_activations(nn.Linear(2, 2))
    with pytest.raises(InputError, match="beta"):
        smooth_activations(net, 0.0)


def test_half_sine_is_the_scale_at_both_ends():
    weight = half_sine(2.0, 0.3)
    assert weight(0.0) == 2.0 and abs(weight(1.0) - 2.0) < 1e-12 and math.isclose(weight(0.5), 2.6)
    torch.testing.assert_close(weight(torch.tensor([0.0, 0.5])), torch.tensor([2.0, 2.6]))
    released = half_sine(1.0, 0.3, VP())
    beta = 0.1 + 19.9 * 0.25
    assert math.isclose(released(0.25), 1 + 0.3 * 20.0 / beta * math.sin(math.pi / 4))
    with pytest.raises(InputError, match="alpha"):
        half_sine(1.0, 0.3, Flow())


def test_it_is_the_loss_of_the_negative_log_likelihood_and_composes_with_cfg():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()

    class Conditional(nn.Module):
        def forward(self, x: Tensor, label: Tensor, *, shift: Tensor) -> Tensor:
            return 0.3 * x + shift[:, None]

    from sfumato.denoisers import parametrized

    denoiser = cfg(2.0)(parametrized(Conditional(), VP(), null={"shift": 0.0}))
    ctx = Context.of(4, cond={"shift": torch.ones(4, dtype=torch.float64)})
    y, x = torch.tensor([0, 1, 2, 0]), normal(4, 2)
    cost = lambda x0, cond: nn.functional.cross_entropy(net(x0), y, reduction="none")  # noqa: E731
    for through in ("belief", "network"):
        ours = classifier(net, 0.7, label=y, through=through)(denoiser)(x, 0.5, ctx).mean
        torch.testing.assert_close(ours, loss(cost, 0.7, through=through)(denoiser)(x, 0.5, ctx).mean)


@pytest.mark.parametrize(
    "net, label, says",
    [
        (lambda x: x.softmax(1), 0, "probabilities"),
        (lambda x: x, 2, "classes"),
        (lambda x: x, torch.tensor([0.0, 1.0]), "integers"),
        (lambda x: x, torch.tensor([0, 1, 0]), "integers"),
        (lambda x: x, "class", "no condition"),
        (lambda x: x.sum(), 0, "logits"),
    ],
    ids=["probabilities", "outside", "float", "count", "absent", "shape"],
)
def test_what_cannot_be_a_class_is_refused(net, label, says):
    oracle = oracles.Gaussian([0.0, 0.0], 1.0).denoiser(VP())
    with pytest.raises(InputError, match=says):
        classifier(net, label=label)(oracle)(normal(2, 2), 0.5, Context.of(2))


def test_a_classifier_in_training_mode_is_refused():
    with pytest.raises(InputError, match="eval"):
        classifier(nn.Linear(2, 2), label=0)
    with pytest.raises(InputError, match="tau"):
        classifier(nn.Linear(2, 2).eval(), label=0, tau_marginal=-1.0)
