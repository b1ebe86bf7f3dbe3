"""Frechet, kernel and sliced Wasserstein distances: independent references, closed forms, invariances, intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.evaluation import metrics as m


def normal(n: int, d: int, seed: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def skewed(n: int, d: int, seed: int) -> Tensor:
    """Correlated and far from Gaussian, with a mean far from zero."""
    mix = normal(d, d, 99) / math.sqrt(d)
    return normal(n, d, seed).exp() @ mix + 7


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, 5)).Q


class Identity(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("singular", [False, True])
def test_frechet_equals_torchmetrics_and_scipy(singular: bool) -> None:
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import FrechetInceptionDistance

    d, n, k = (40, 30, 35) if singular else (12, 300, 200)
    x, y = skewed(n, d, 0), skewed(k, d, 1) * 1.3
    ours = m.frechet_distance(x, y, singular=singular).value
    metric = FrechetInceptionDistance(feature=Identity(d)).set_dtype(torch.float64)
    metric.update(x, real=False)
    metric.update(y, real=True)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)
    if not singular:
        a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
        shift = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
        assert ours == pytest.approx(shift + np.trace(a + b - 2 * sqrtm(a @ b).real), rel=1e-9)


def test_frechet_of_gaussians_in_closed_form() -> None:
    """Commuting covariances: |m - m'|^2 + sum (s - s')^2; a zero variance is legal."""
    q = rotation(6)
    a, b = torch.tensor([0.0, 1e-8, 0.1, 1, 4, 100.0]).double(), torch.tensor([2.0, 0, 0.3, 1, 9, 1e4]).double()
    mean, other = normal(1, 6, 0)[0], normal(1, 6, 1)[0]
    exact = (mean - other).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = m.frechet_from_moments(mean, (q * a) @ q.T, other, (q * b) @ q.T)
    # The zero eigenvalue is only known to 1e-16 of the largest, its root to 1e-8.
    assert found == pytest.approx(exact.item(), rel=1e-9)
    # Without a common basis: in two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    a, b = torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double(), torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    product = a @ b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    assert m.frechet_from_moments(zero, a, zero, b) == pytest.approx(
        (a + b).trace().item() - 2 * root.item(), rel=1e-12
    )


def test_frechet_of_a_set_against_itself_is_zero_even_when_nearly_singular() -> None:
    x = skewed(60, 20, 0) * torch.logspace(0, -9, 20, dtype=torch.float64)
    assert abs(m.frechet_distance(x, x.flip(0)).value) < 1e-10 * x.var(0).sum().item()
    wide = skewed(20, 60, 0)
    assert abs(m.frechet_distance(wide, wide, singular=True).value) < 1e-10 * wide.var(0).sum().item()


def test_frechet_invariances() -> None:
    x, y = skewed(80, 7, 0), skewed(90, 7, 1) + 0.3
    base = m.frechet_distance(x, y).value
    q = rotation(7)
    assert m.frechet_distance(x @ q, y @ q).value == pytest.approx(base, rel=1e-10)
    assert m.frechet_distance(x + 100, y + 100).value == pytest.approx(base, rel=1e-8)
    assert m.frechet_distance(3 * x, 3 * y).value == pytest.approx(9 * base, rel=1e-10)
    assert m.frechet_distance(y, x).value == pytest.approx(base, rel=1e-10)
    shift = torch.full((7,), 2.0, dtype=torch.float64)
    assert m.frechet_distance(x, x + shift).value == pytest.approx(28, rel=1e-9)


def test_leaving_a_part_out_equals_computing_it_anew() -> None:
    """The downdated replicates against direct recomputation, by the bias and the interval they give."""
    from sfumato.evaluation.metrics.distances import _factor, _frechet_left_out, _moments, _parts

    x, y = skewed(50, 5, 0), skewed(60, 5, 1)
    mean, cov = _moments(y)
    found = _frechet_left_out(x, mean, _factor(cov), 7, seed=3)
    for part, replicate in zip(_parts(50, 7, 3, x.device), found, strict=True):
        rest = x[[i for i in range(50) if i not in part.tolist()]]
        assert replicate.item() == pytest.approx(m.frechet_from_moments(*_moments(rest), mean, cov), rel=1e-8)


def test_the_stated_bias_of_frechet_is_its_bias() -> None:
    """Mean over repetitions at equal laws: the plain figure is far above 0, the debiased one is not."""
    plain, free = [], []
    for seed in range(40):
        x, y = normal(150, 10, 2 * seed), normal(200, 10, 2 * seed + 1)
        plain.append(m.frechet_distance(x, y, seed=seed).value)
        free.append(m.frechet_distance(x, y, seed=seed, debiased=True).value)
    bias = torch.tensor(plain).mean().item()
    assert bias > 0.3
    assert abs(torch.tensor(free).mean().item()) < 0.05 * bias


def test_frechet_wants_enough_items() -> None:
    with pytest.raises(InputError, match="at least 11 are needed"):
        m.frechet_distance(normal(10, 10, 0), normal(50, 10, 1))
    with pytest.raises(InputError, match="20 reference"):
        m.frechet_distance(normal(50, 20, 0), normal(20, 20, 1))
    m.frechet_distance(normal(11, 10, 0), normal(11, 10, 1), groups=5)


def test_frechet_refuses_what_is_no_covariance() -> None:
    zero, one = torch.zeros(2), torch.eye(2)
    with pytest.raises(InputError, match="not a covariance"):
        m.frechet_from_moments(zero, torch.diag(torch.tensor([1.0, -0.5])), zero, one)
    with pytest.raises(InputError, match="covariances"):
        m.frechet_from_moments(zero, torch.ones(3, 3), zero, one)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
def test_kernel_distance_equals_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = skewed(120, 9, 0) / 5, skewed(120, 9, 1) / 5 + 0.2
    metric = KernelInceptionDistance(feature=Identity(9), subsets=1, subset_size=120)
    metric.update(x, real=False)
    metric.update(y, real=True)
    assert m.kernel_distance(x, y).value == pytest.approx(metric.compute()[0].item(), rel=1e-6)


def brute_mmd(kernel, x: Tensor, y: Tensor) -> float:
    n, k = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(k) for j in range(k) if i != j) / (k * (k - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * k)


def test_kernel_figures_and_their_jackknife_equal_the_definition() -> None:
    x, y = normal(9, 3, 0), normal(7, 3, 1) + 0.5
    h = m.median_distance(torch.cat([x, y]))

    def gauss(a: Tensor, b: Tensor) -> float:
        return math.exp(-(a - b).square().sum().item() / (2 * h * h))

    for kernel, figure in (
        (lambda a, b: (a @ b / 3 + 1).item() ** 3, m.kernel_distance),
        (gauss, lambda a, b: m.rbf_distance(a, b, bandwidth=h)),
    ):
        found = figure(x, y)
        assert found.value == pytest.approx(brute_mmd(kernel, x, y), rel=1e-10)
        left_x = torch.tensor([brute_mmd(kernel, torch.cat([x[:i], x[i + 1 :]]), y) for i in range(9)])
        left_y = torch.tensor([brute_mmd(kernel, x, torch.cat([y[:i], y[i + 1 :]])) for i in range(7)])
        variance = sum((len(z) - 1) ** 2 / len(z) * z.double().var().item() for z in (left_x, left_y))
        # 15 degrees of freedom at most and 6 at least bound Student's factor.
        half = (found.high - found.low) / 2 / math.sqrt(variance)
        assert 2.13 < half < 2.45
        assert (found.high + found.low) / 2 == pytest.approx(found.value)
    assert m.rbf_distance(x, y).value == m.rbf_distance(x, y, bandwidth=h).value


def test_kernel_figures_are_unbiased_under_equal_laws_and_large_under_different_ones() -> None:
    for figure in (m.kernel_distance, lambda a, b: m.rbf_distance(a, b, bandwidth=2.0)):
        values = torch.tensor([figure(normal(40, 4, 2 * s), normal(30, 4, 2 * s + 1)).value for s in range(150)])
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(150)
        assert figure(normal(40, 4, 0), normal(30, 4, 1) + 2).value > 10 * values.std()


@pytest.mark.parametrize(("n", "k"), [(30, 30), (30, 45), (17, 5), (1, 8), (2, 3)])
def test_one_dimensional_transport_is_exact(n: int, k: int) -> None:
    from scipy.stats import wasserstein_distance

    x, y = skewed(n, 4, 0)[:, :4], skewed(k, 4, 1)[:, :4]
    first = m.wasserstein_1d(x, y, p=1)
    for column in range(4):
        assert first[column].item() == pytest.approx(wasserstein_distance(x[:, column], y[:, column]), rel=1e-10)
    # W_2^2 as a linear programme between the two point sets.
    from scipy.optimize import linprog

    cost = (x[:, :1] - y[:, :1].T).square().numpy()
    rows = np.kron(np.eye(n), np.ones((1, k)))
    columns = np.kron(np.ones((1, n)), np.eye(k))
    marginals = np.concatenate([np.full(n, 1 / n), np.full(k, 1 / k)])
    plan = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals, method="highs")
    assert m.wasserstein_1d(x, y)[0].item() == pytest.approx(plan.fun, rel=1e-7)


def test_sliced_wasserstein_of_a_shift_and_of_itself() -> None:
    """For x and x + v every direction u gives |u.v|^2, whose mean over the sphere is |v|^2 / d."""
    x, v = skewed(80, 5, 0), normal(1, 5, 3)[0]
    found = m.sliced_wasserstein(x, x + v, projections=4000, groups=2)
    assert found.value == pytest.approx((v.norm() / math.sqrt(5)).item(), rel=0.03)
    assert m.sliced_wasserstein(x, x.flip(0)).value < 1e-12
    # Repeating every item changes the counts but not the distribution.
    assert m.sliced_wasserstein(x, x.repeat(3, 1)).value < 1e-12


@pytest.mark.parametrize("figure", [m.frechet_distance, m.kernel_distance, m.rbf_distance, m.sliced_wasserstein])
def test_distances_do_not_depend_on_order_or_dtype_and_are_functions_of_the_seed(figure) -> None:
    x, y = normal(60, 5, 0, dtype=torch.float32), normal(50, 5, 1, dtype=torch.float32) + 0.5
    base = figure(x, y)
    assert figure(x, y) == base
    assert figure(x.flip(0), y.roll(7, 0)).value == pytest.approx(base.value, rel=1e-8)
    assert figure(x.double(), y.double()) == base
    assert base.low <= base.value <= base.high
    assert (base.n, base.reference_n, base.higher_is_better) == (60, 50, False)
    half = x.bfloat16()
    assert figure(half, y).value == figure(half.double(), y).value


def test_blocks_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.evaluation.metrics import _tensors

    x, y = normal(70, 5, 0), normal(50, 5, 1) + 0.5
    figures = (
        m.kernel_distance,
        m.rbf_distance,
        lambda a, b: m.precision_recall(a, b)[0],
        lambda a, b: m.density_coverage(a, b)[0],
    )
    whole = [figure(x, y) for figure in figures]
    monkeypatch.setattr(_tensors, "BLOCK", 130)
    for figure, before in zip(figures, whole, strict=True):
        after = figure(x, y)
        assert (after.value, after.low, after.high) == pytest.approx((before.value, before.low, before.high), rel=1e-9)


def coverage(draw, exact: float, times: int) -> float:
    return sum(found.low <= exact <= found.high for found in (draw(seed) for seed in range(times))) / times


def test_intervals_cover_at_about_their_level() -> None:
    """95 % intervals over 200 repetitions: a true rate of 0.95 stays above 0.90 and below 0.99 but for 1 in 1,000."""
    cov = torch.tensor([[2.0, 0.5], [0.5, 0.5]], dtype=torch.float64)
    root = torch.linalg.cholesky(cov)
    shift = torch.tensor([1.0, -0.5], dtype=torch.float64)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        return normal(300, 2, 2 * seed) @ root.T + shift, normal(250, 2, 2 * seed + 1)

    zero, one = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    exact = m.frechet_from_moments(shift, cov, zero, one)
    assert 0.90 <= coverage(lambda s: m.frechet_distance(*draw(s), seed=s, debiased=True), exact, 200) <= 0.99

    # With E x x' = M, the kernel (x.y / 2 + 1)^2 gives |M_x - M_y|^2 / 4 + |E x - E y|^2.
    exact = ((cov + torch.outer(shift, shift) - one).square().sum() / 4 + shift.square().sum()).item()
    assert 0.90 <= coverage(lambda s: m.kernel_distance(*draw(s), degree=2), exact, 200) <= 0.99


BAD = st.sampled_from(
    ["list", "one axis", "three axes", "empty", "no width", "width", "nan", "inf", "complex", "one item"]
)


@settings(max_examples=60, deadline=None)
@given(
    bad=BAD,
    first=st.booleans(),
    figure=st.sampled_from(
        [m.frechet_distance, m.kernel_distance, m.rbf_distance, m.sliced_wasserstein, m.precision_recall,
         m.density_coverage, m.classifier_two_sample]
    ),
)  # fmt: skip
def test_bad_features_are_refused_by_name(bad: str, first: bool, figure) -> None:
    good = normal(40, 4, 0)
    wrong = {
        "list": good.tolist(), "one axis": good[:, 0], "three axes": good.view(40, 2, 2), "empty": good[:0],
        "no width": good[:, :0], "width": good[:, :3], "complex": good.to(torch.complex64), "one item": good[:1],
        "nan": good.clone().index_fill(0, torch.tensor([3]), torch.nan),
        "inf": good.clone().index_fill(0, torch.tensor([3]), torch.inf),
    }[bad]  # fmt: skip
    with pytest.raises(InputError) as caught:
        figure(wrong, good) if first else figure(good, wrong)
    if bad != "width":
        assert ("samples" if first else "reference") in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(3, 40), k=st.integers(3, 40), d=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
def test_every_shape_gives_finite_figures_with_ordered_bounds(n: int, k: int, d: int, scale: float) -> None:
    x, y = normal(n, d, 0) * scale, normal(k, d, 1) * scale
    for found in (
        m.kernel_distance(x, y),
        m.rbf_distance(x, y),
        m.sliced_wasserstein(x, y, projections=8, groups=2) if min(n, k) >= 4 else m.rbf_distance(x, y),
        m.frechet_distance(x, y, groups=2, singular=True) if min(n, k) >= 4 else m.rbf_distance(x, y),
        *m.precision_recall(x, y, k=2),
        *m.density_coverage(x, y, k=2),
    ):
        assert math.isfinite(found.value)
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9


def test_arguments_out_of_range_are_named() -> None:
    x, y = normal(20, 3, 0), normal(20, 3, 1)
    for call, words in (
        (lambda: m.frechet_distance(x, y, groups=1), "groups = 1"),
        (lambda: m.frechet_distance(x, y, groups=11), "groups = 11"),
        (lambda: m.kernel_distance(x, y, degree=0), "degree = 0"),
        (lambda: m.rbf_distance(x, y, bandwidth=0.0), "bandwidth 0"),
        (lambda: m.rbf_distance(torch.ones(5, 2), torch.ones(5, 2)), "bandwidth 0"),
        (lambda: m.sliced_wasserstein(x, y, projections=1), "projections = 1"),
        (lambda: m.precision_recall(x, y, k=20), "k = 20"),
        (lambda: m.density_coverage(x, y, k=True), "k = True"),
    ):
        with pytest.raises(InputError, match=words):
            call()
