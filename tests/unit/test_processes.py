"""Noising laws: coefficients and their derivatives, their inverse, the marginals of every way to make noise, the kernel."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sfumato.core import Context, InputError, Posterior
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow, Normal, Table

PROCESSES = {
    "vp": VP(),
    "vp-wide": VP(0.2, 35.0),
    "ve": VE(),
    "edm": EDM(),
    "edm-rho-1": EDM(0.01, 5.0, 1.0),
    "flow": Flow(),
    "flow-shift-3": Flow(3.0),
    "flow-shift-0.16": Flow(0.16118131101606623),
    "cosine": Cosine(),
    "ddpm-linear": DDPM("linear"),
    "ddpm-scaled-linear": DDPM("scaled_linear"),
    "ddpm-cosine": DDPM("cosine"),
    "ddpm-own": DDPM(torch.linspace(0.01, 0.4, 20)),
}
SMOOTH = {k: v for k, v in PROCESSES.items() if not isinstance(v, Table)}
every_process = pytest.mark.parametrize("name", list(PROCESSES))
times = st.floats(0.001, 1.0)


@every_process
@given(t=st.floats(0.001, 0.9999))
def test_derivatives_are_derivatives(name: str, t: float) -> None:
    """Against automatic differentiation of the law in torch."""
    process = PROCESSES[name]
    at = torch.tensor([t], dtype=torch.float64, requires_grad=True)
    alpha, sigma, _, _ = process.law(at, torch)
    zero = (0.0 * at).sum()
    c = process.coef(t)
    for value, declared in ((alpha, c.dalpha), (sigma, c.dsigma)):
        (slope,) = torch.autograd.grad(value.sum() + zero, at, retain_graph=True)
        assert declared == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


@every_process
@given(ts=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5))
def test_floats_and_tensors_agree(name: str, ts: list[float]) -> None:
    process = PROCESSES[name]
    rows = process.coef(torch.tensor([0.0, 1.0, *ts], dtype=torch.float64))
    for i, t in enumerate([0.0, 1.0, *ts]):
        one = process.coef(t)
        for a, b in zip(rows, one, strict=True):
            assert a.dtype == torch.float64 and float(a[i]) == pytest.approx(b, rel=1e-12, abs=1e-15)


@every_process
@given(t=st.floats(0.0, 1.0), s=st.floats(0.0, 1.0))
def test_signal_falls_and_noise_rises(name: str, t: float, s: float) -> None:
    process = PROCESSES[name]
    assume(s < t)
    a, b = process.coef(s), process.coef(t)
    assert b.alpha <= a.alpha <= 1 and 0 <= a.sigma <= b.sigma
    assert b.lam <= a.lam and a.angle <= b.angle
    assume(t - s > 1e-6 and b.sigma > 1e-100)
    assert b.lam < a.lam


@every_process
def test_the_ends_of_time(name: str) -> None:
    """Clean data at 0, exactly; alpha = 0 exactly where it is declared, so that a start from noise is exact."""
    process = PROCESSES[name]
    zero, one = process.coef(0.0), process.coef(1.0)
    assert (zero.alpha, zero.sigma) == (1.0, 0.0)
    if name.startswith(("flow", "cosine")):
        assert (one.alpha, one.sigma) == (0.0, 1.0)
    if name.startswith("edm"):
        assert one.sigma == process.sigma_max
    for t in (-1e-9, 1 + 1e-9, math.nan, math.inf):
        with pytest.raises(InputError, match=r"times are in \[0, 1\]"):
            process.coef(t)


@given(st.floats(0.01, 100))
def test_every_shift_of_the_flow_ends_at_pure_noise(shift: float) -> None:
    process = Flow(shift)
    assert (process.coef(1.0).alpha, process.coef(1.0).sigma) == (0.0, 1.0)
    assert process.time(-math.inf) == 1.0 and process.time(math.inf) == 0.0


@every_process
@given(t=st.floats(0.0, 1.0))
def test_time_is_the_inverse_of_lambda(name: str, t: float) -> None:
    process = PROCESSES[name]
    lam = process.coef(t).lam
    back = process.time(lam)
    assert back == pytest.approx(t, abs=1e-9)
    if 1e-6 < t < 0.999:
        assert process.coef(back).lam == pytest.approx(lam, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "name", ["vp", "vp-wide", "cosine", "ddpm-linear", "ddpm-scaled-linear", "ddpm-cosine", "ddpm-own"]
)
@given(t=st.floats(0.0, 1.0))
def test_variance_is_preserved(name: str, t: float) -> None:
    c = PROCESSES[name].coef(t)
    assert c.alpha**2 + c.sigma**2 == pytest.approx(1, abs=1e-14)


@given(t=times)
def test_named_schedules_are_what_their_papers_say(t: float) -> None:
    from scipy.integrate import quad

    exponent = quad(lambda u: 0.1 + u * 19.9, 0, t)[0]
    assert VP().coef(t).alpha == pytest.approx(math.exp(-0.5 * exponent), rel=1e-9)
    assert EDM().coef(t).sigma == pytest.approx(80 * t**7, rel=1e-12)
    assert Flow().coef(t).sigma == pytest.approx(t, rel=1e-12) and Flow().coef(t).alpha == pytest.approx(
        1 - t, abs=1e-15
    )
    u = 3 * t / (1 + 2 * t)
    assert Flow(3.0).coef(t).sigma == pytest.approx(u, rel=1e-12)
    ratio = 5000.0
    variance = quad(lambda u: (0.01 * ratio**u) ** 2 * 2 * math.log(ratio), 0, t, epsrel=1e-10)[0]
    assert VE().coef(t).sigma ** 2 == pytest.approx(variance, rel=1e-7)
    if t > 0.3:
        assert VE().coef(t).sigma == pytest.approx(0.01 * ratio**t, rel=1e-2)
    assert Cosine().coef(t).angle == pytest.approx(math.pi / 2 * t, rel=1e-9)


def test_tables_are_the_published_betas() -> None:
    """Against products written out, index by index."""
    linear = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    scaled = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]

    def bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    cosine = [min(1 - bar((i + 1) / 1000) / bar(i / 1000), 0.999) for i in range(1000)]
    for name, betas in (("linear", linear), ("scaled_linear", scaled), ("cosine", cosine)):
        process, product = DDPM(name), 1.0
        for i, beta in enumerate(betas):
            product *= 1 - beta
            c = process.coef((i + 1) / 1000)
            assert c.alpha == pytest.approx(math.sqrt(product), rel=1e-9, abs=1e-13)
            assert process.label((i + 1) / 1000) == pytest.approx(i, abs=1e-9)
    assert DDPM("linear", steps=500).steps == 500
    zero = DDPM(torch.tensor([0.1, 0.5, 1.0]))
    assert zero.coef(1.0).alpha == 0 and zero.coef(1.0).sigma == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: VP(0.0, 1.0),
        lambda: VP(2.0, 1.0),
        lambda: VE(0.0, 1.0),
        lambda: VE(3.0, 2.0),
        lambda: EDM(sigma_min=-1.0),
        lambda: EDM(rho=0.5),
        lambda: EDM(sigma_max=math.nan),
        lambda: Flow(0.0),
        lambda: Flow(math.nan),
        lambda: DDPM("quadratic"),
        lambda: DDPM(steps=0),
        lambda: DDPM(steps=5),
        lambda: DDPM(torch.tensor([0.1, 0.0])),
        lambda: DDPM(torch.tensor([0.1, 1.2])),
        lambda: DDPM(torch.tensor([0.1, math.nan])),
        lambda: DDPM(torch.tensor([])),
        lambda: Table.of(torch.tensor([0.9, 0.9])),
        lambda: Table.of(torch.tensor([0.5, 0.9])),
        lambda: Table.of(torch.tensor([1.0, 0.9])),
        lambda: Table.of(torch.tensor([0.9, -0.1])),
        lambda: Table.of(torch.tensor([0.9, math.nan])),
        lambda: Table.of(torch.tensor([])),
    ],
)
def test_impossible_schedules_are_refused(make: Any) -> None:
    with pytest.raises(InputError):
        make()


@every_process
@given(data=st.data())
def test_noise_in_two_stages_is_noise_in_one(name: str, data: st.DataObject) -> None:
    """corrupt to s, renoise from s to t: the same mean and variance as corrupting to t, and since= says the same."""
    process = PROCESSES[name]
    s = data.draw(st.floats(0.01, 0.99))
    t = data.draw(st.floats(s, 1.0))
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    ctx = Context.of(1, None)

    def parts(z1: torch.Tensor, z2: torch.Tensor, x0: torch.Tensor) -> float:
        first, _ = process.corrupt(x0, s, ctx, noise=z1)
        again, _ = process.corrupt(first, t, ctx, noise=z2, since=s)
        assert torch.equal(again, process.renoise(first, s, t, z2))
        return float(again)

    c = process.coef(t)
    assert parts(zero, zero, one) == pytest.approx(c.alpha, rel=1e-9, abs=1e-12)
    variance = parts(one, zero, zero) ** 2 + parts(zero, one, zero) ** 2
    assert variance == pytest.approx(c.sigma**2, rel=1e-9)
    with pytest.raises(InputError, match="noise is added from t"):
        process.renoise(one, t, s - 0.005, one)


@every_process
@given(data=st.data(), eta=st.floats(0, 1))
def test_the_kernel_keeps_the_marginal_for_every_eta(name: str, data: st.DataObject, eta: float) -> None:
    """With the true x0, q(x_s | x_t, x0) averaged over q(x_t | x0) is q(x_s | x0)."""
    process = PROCESSES[name]
    t = data.draw(st.floats(0.01, 1.0))
    s = data.draw(st.floats(0.0, 0.99)) * t
    a, b = process.coef(t), process.coef(s)
    assume(a.sigma > 1e-8)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    def mean(x0: torch.Tensor, eps: torch.Tensor) -> Normal:
        x = a.alpha * x0 + a.sigma * eps
        return process.kernel(x, Posterior(-a.sigma * x0 + a.alpha * eps, "v", x, a), t, s, eta)

    k = mean(zero, one)
    assert float(mean(one, zero).mean) == pytest.approx(b.alpha, rel=1e-7, abs=1e-9)
    assert float(k.mean) ** 2 + k.std**2 == pytest.approx(b.sigma**2, rel=1e-6, abs=1e-12)
    bayes = (b.sigma**2 * (1 - (a.alpha / b.alpha * b.sigma / a.sigma) ** 2)) if b.alpha else 0.0
    assert k.std**2 == pytest.approx(eta**2 * max(bayes, 0.0), rel=1e-6, abs=1e-12)


def test_a_region_may_get_more_noise_than_another() -> None:
    process, x = VP(), torch.randn(2, 3, dtype=torch.float64)
    post = Posterior(x, "v", x, process.coef(0.6))
    eta = torch.tensor([[0.0, 0.5, 1.0]]).double()
    kernel, z = process.kernel(x, post, 0.6, 0.3, eta), torch.randn(2, 3, dtype=torch.float64)
    for i in range(3):
        single = process.kernel(x, post, 0.6, 0.3, float(eta[0, i])).draw(z)
        assert torch.allclose(kernel.draw(z)[:, i], single[:, i])


@every_process
def test_a_kernel_remembers_the_noise_it_was_given(name: str) -> None:
    process, x = PROCESSES[name], torch.randn(2, 3, dtype=torch.float64)
    kernel = process.kernel(x, Posterior(x, "v", x, process.coef(0.6)), 0.6, 0.3)
    z = torch.randn(2, 3, dtype=torch.float64)
    assert torch.allclose(kernel.noise(kernel.draw(z)), z)
    last = process.kernel(x, Posterior(x, "v", x, process.coef(0.6)), 0.6, 0.0)
    assert last.std == 0 and torch.equal(last.draw(z), last.mean)
    with pytest.raises(InputError, match="no noise to recover"):
        last.noise(x)
    assert torch.equal(last.draw(None), last.mean)


@every_process
def test_targets_are_what_a_network_of_each_kind_should_say(name: str) -> None:
    """From the target alone, read as that kind, the belief is (x0, noise) again."""
    process = PROCESSES[name]
    x0, t = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.1, 0.4, 0.7, 0.95]).double()
    x, noise = process.corrupt(x0, t, Context.of(4, 3, dtype=torch.float64))
    for kind in ("x0", "eps", "v", "flow", "score"):
        post = Posterior(process.target(kind, x0, noise, t), kind, x, process.coef(t))
        assert torch.allclose(post.mean, x0, rtol=1e-6, atol=1e-6)
        assert torch.allclose(post.view("eps"), noise, rtol=1e-6, atol=1e-6)


def test_corruption_draws_from_the_context() -> None:
    x0 = torch.randn(3, 2)
    one, noise = VP().corrupt(x0, 0.4, Context.of(3, 5))
    two, _ = VP().corrupt(x0, 0.4, Context.of(3, 5))
    c = VP().coef(0.4)
    assert torch.equal(one, two) and torch.allclose(one, c.alpha * x0 + c.sigma * noise)
    assert VP().corrupt(x0, 0.0, Context.of(3, 5))[0].equal(x0)


def test_laws_are_values() -> None:
    """Equal numbers are equal laws; all can be pickled, and a table is told apart by identity, so it is never hashed whole."""
    assert VP() == VP(0.1, 20.0) and hash(Flow(3.0)) == hash(Flow(3.0)) and VP() != VP(0.2, 20.0)
    for process in PROCESSES.values():
        assert pickle.loads(pickle.dumps(process)).coef(0.3) == process.coef(0.3)
    table = DDPM()
    assert table != DDPM() and hash(table) == object.__hash__(table)


@every_process
def test_no_process_has_an_anchor_by_default(name: str) -> None:
    assert PROCESSES[name].anchor(0.5, {}) is None and PROCESSES[name].anchor(0.5, {}, derivative=True) is None
