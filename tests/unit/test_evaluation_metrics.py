"""Nearest-neighbour figures, the two-sample test, accuracies, PSNR and SSIM: references and laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.core.errors import InputError, MissingExtra
from sfumato.evaluation import metrics as m
from sfumato.evaluation.metrics import detail_error, radial_power
from sfumato.evaluation.metrics._tensors import nearest


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(n: int, seed: int, size: int = 24, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator).to(torch.uint8)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 30), k=st.integers(2, 30), d=st.integers(1, 5), far=st.floats(0, 1e4))
def test_nearest_equals_scikit_learn_and_copies_are_at_exactly_zero(n: int, k: int, d: int, far: float) -> None:
    from sklearn.neighbors import NearestNeighbors

    keys, queries = normal(k, d, 0) + far, normal(n, d, 1) + far
    queries[0] = keys[1]
    most = min(3, k)
    found, index = nearest(queries, keys, most)
    exact, _ = NearestNeighbors(n_neighbors=most, algorithm="brute").fit(keys - far).kneighbors(queries - far)
    assert found.numpy() == pytest.approx(exact, rel=1e-6, abs=1e-6)
    assert found[0, 0] == 0 and index[0, 0] == 1
    assert (found.diff(dim=1) >= 0).all()


def brute_manifold(x: Tensor, y: Tensor, k: int) -> tuple[float, float, float, float]:
    """precision, recall, density, coverage by full distance matrices."""

    def radii(z: Tensor) -> Tensor:
        return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, k]

    between = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    in_y, in_x = between <= radii(y), between <= radii(x)[:, None]
    return (
        in_y.any(1).double().mean().item(), in_x.any(0).double().mean().item(),
        in_y.sum().item() / (k * len(x)), in_y.any(0).double().mean().item(),
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(n=st.integers(6, 40), k=st.integers(6, 40), near=st.integers(1, 5), shift=st.floats(0, 2))
def test_manifold_figures_equal_their_definition(n: int, k: int, near: int, shift: float) -> None:
    x, y = normal(n, 3, 0) + shift, normal(k, 3, 1)
    found = [f.value for f in (*m.precision_recall(x, y, k=near), *m.density_coverage(x, y, k=near))]
    assert found == pytest.approx(brute_manifold(x, y, near))


def test_manifold_figures_on_identical_and_disjoint_sets() -> None:
    x = normal(50, 4, 0)
    assert [f.value for f in (*m.precision_recall(x, x.flip(0)), *m.density_coverage(x, x.flip(0)))][:2] == [1, 1]
    assert m.density_coverage(x, x)[1].value == 1
    apart = [f.value for f in (*m.precision_recall(x, x + 1000), *m.density_coverage(x, x + 1000))]
    assert apart == [0, 0, 0, 0]
    # Mode dropping costs recall and coverage, not precision; a wide spread costs precision, not recall.
    two = torch.cat([x - 20, x + 20])
    precision, recall = m.precision_recall(normal(50, 4, 1) - 20, two)
    assert precision.value > 0.7 and recall.value < 0.5
    precision, recall = m.precision_recall(torch.cat([normal(50, 4, 1) - 20, normal(50, 4, 2) + 20]), x - 20)
    assert precision.value < 0.5 and recall.value > 0.7
    # Repeated items have balls of radius zero, and still hold their copies.
    same = x[:5].repeat_interleave(8, 0)
    assert m.precision_recall(same + 3, same + 3)[0].value == 1
    assert m.density_coverage(same, same)[1].value == 1


def test_one_outlier_inflates_precision_but_not_coverage() -> None:
    """The case that density was made for: one far reference item has a ball over everything."""
    y = torch.cat([normal(100, 2, 0), torch.tensor([[60.0, 0.0]]).double()])
    x = normal(100, 2, 1) + torch.tensor([30.0, 0.0])
    assert m.precision_recall(x, y)[0].value > 0.9
    density, coverage = m.density_coverage(x, y)
    assert density.value < 0.3 and coverage.value < 0.05


def test_density_and_coverage_of_equal_laws_have_their_expectations() -> None:
    found = [m.density_coverage(normal(60, 3, 2 * s), normal(45, 3, 2 * s + 1), k=4) for s in range(200)]
    for which, exact in ((0, 1.0), (1, m.expected_coverage(60, 45, 4))):
        values = torch.tensor([pair[which].value for pair in found])
        assert abs(values.mean().item() - exact) < 4 * values.std().item() / math.sqrt(200)


def test_manifold_figures_do_not_see_rotation_shift_or_scale() -> None:
    x, y = normal(60, 5, 0) * 1.5, normal(70, 5, 1)
    q = torch.linalg.qr(normal(5, 5, 2)).Q
    base = [f.value for f in (*m.precision_recall(x, y), *m.density_coverage(x, y))]
    x, y = (7 * z @ q + 1000 for z in (x, y))
    assert [f.value for f in (*m.precision_recall(x, y), *m.density_coverage(x, y))] == base


def test_memorisation_of_copies_of_fresh_data_and_of_a_mixture() -> None:
    training, held_out, fresh = normal(800, 6, 0), normal(600, 6, 1), normal(2000, 6, 2)
    assert m.memorisation_rate(training[:300], training, held_out).value == 1
    for alpha in (0.05, 0.2):
        found = m.memorisation_rate(fresh, training, held_out, alpha=alpha)
        assert found.value == pytest.approx(alpha, abs=4 * math.sqrt(alpha * (1 - alpha) * (1 / 600 + 1 / 2000)))
    mixed = torch.cat([training[:500] + 1e-3, fresh[:1500]])
    assert 0.25 <= m.memorisation_rate(mixed, training, held_out).value <= 0.25 + 0.75 * 0.1
    assert m.memorisation_ratio(training[:300], training).value == 1
    assert m.memorisation_ratio(fresh, training).value < 0.02
    assert 0.25 <= m.memorisation_ratio(mixed, training).value <= 0.27


def test_memorisation_over_draws_averages_to_the_held_out_rate() -> None:
    """P(fresh <= the j-th of n held-out) = j / (n + 1) exactly, for distances from one law."""
    rates = [
        m.memorisation_rate(normal(50, 2, 3 * s), normal(40, 2, 3 * s + 1), normal(39, 2, 3 * s + 2), alpha=0.2).value
        for s in range(200)
    ]
    spread = torch.tensor(rates).std().item() / math.sqrt(200)
    assert abs(sum(rates) / 200 - 8 / 40) < 4 * spread


def test_memorisation_refuses_held_out_items_from_training() -> None:
    x = normal(100, 3, 0)
    with pytest.raises(InputError, match="occur in the training set"):
        m.memorisation_rate(normal(10, 3, 1), x, x[:50])
    with pytest.raises(InputError, match="alpha"):
        m.memorisation_rate(x, x, normal(10, 3, 1), alpha=0.05)
    with pytest.raises(InputError, match="ratio"):
        m.memorisation_ratio(x, x, ratio=1.0)


@pytest.mark.parametrize("classifier", m.CLASSIFIERS)
def test_two_sample_accuracy_is_half_for_one_law_and_one_for_two(classifier: str) -> None:
    same = m.classifier_two_sample(normal(300, 3, 0), normal(300, 3, 1), classifier=classifier)
    assert same.low - 0.03 <= 0.5 <= same.high + 0.03
    apart = m.classifier_two_sample(normal(300, 3, 0), normal(200, 3, 1) + 6, classifier=classifier)
    assert apart.value > 0.98 and (apart.n, apart.reference_n) == (200, 200)
    assert m.classifier_two_sample(normal(300, 3, 0), normal(200, 3, 1) + 6, classifier=classifier) == apart


def test_two_sample_classifiers_differ_as_stated() -> None:
    """Equal means and different spreads: no plane separates them, neighbours do; and Bayes' rate bounds both."""
    x, y = normal(500, 2, 0), 3 * normal(500, 2, 1)
    plane = m.classifier_two_sample(x, y).value
    bayes = 0.5 + 0.5 * (9 ** (-1 / 8) - 9 ** (-9 / 8))
    assert plane < 0.56
    assert plane + 0.1 < m.classifier_two_sample(x, y, classifier="neighbours").value < bayes + 0.05


def test_two_sample_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(MissingExtra, match=r"sfumato\[science\]"):
        m.classifier_two_sample(normal(30, 2, 0), normal(30, 2, 1))
    with pytest.raises(InputError, match="logistic, neighbours, mlp"):
        m.classifier_two_sample(normal(30, 2, 0), normal(30, 2, 1), classifier="svm")


def test_accuracies_equal_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy

    logits, labels = normal(200, 7, 0), torch.randint(0, 7, (200,), generator=torch.Generator().manual_seed(1))
    for top in (1, 3, 7):
        theirs = multiclass_accuracy(logits, labels, 7, average="micro", top_k=top).item()
        assert m.classification_accuracy(logits, labels, top=top).value == pytest.approx(theirs, abs=1e-6)
    assert m.classification_accuracy(torch.zeros(200, 7), labels, top=2).value == pytest.approx(2 / 7)


def test_retrieval_by_definition_and_with_ties() -> None:
    x, y = normal(40, 6, 0), normal(25, 6, 1)
    target = torch.randint(0, 25, (40,), generator=torch.Generator().manual_seed(2))
    cosine = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=2)
    for top in (1, 4, 25):
        hits = [int(target[i]) in cosine[i].topk(top).indices.tolist() for i in range(40)]
        assert m.retrieval_accuracy(x, y, target, top=top).value == pytest.approx(sum(hits) / 40)
    assert m.retrieval_accuracy(y, 3 * y).value == 1
    # An encoder that says the same of everything is at chance, whatever order the keys are in.
    assert m.retrieval_accuracy(torch.ones(10, 3), torch.ones(10, 3), top=2).value == pytest.approx(0.2)
    mean, first, fifth = m.text_agreement(x, y, target)
    assert mean.value == pytest.approx(cosine[torch.arange(40), target].mean().item())
    assert first.value == m.retrieval_accuracy(x, y, target).value <= fifth.value


def test_accuracies_refuse_bad_indices() -> None:
    x, y = normal(4, 3, 0), normal(6, 3, 1)
    for call, words in (
        (lambda: m.retrieval_accuracy(x, y), "give target"),
        (lambda: m.retrieval_accuracy(x, y, torch.tensor([0, 1, 2, 6])), r"0\.\.5"),
        (lambda: m.retrieval_accuracy(x, y, torch.tensor([0, 1, 2])), r"\(4,\)"),
        (lambda: m.retrieval_accuracy(x, y, torch.zeros(4)), "integer"),
        (lambda: m.retrieval_accuracy(x, y, torch.arange(4), top=7), "top = 7"),
        (lambda: m.retrieval_accuracy(0 * x, y, torch.arange(4)), "zero"),
        (lambda: m.retrieval_accuracy(x, y[:, :2], torch.arange(4)), "same extractor"),
        (lambda: m.classification_accuracy(x, torch.tensor([0, 1, 2, 3])), r"0\.\.2"),
        (lambda: m.text_agreement(x, y, torch.arange(4), top=(1, 9)), "top = 9"),
    ):
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize(("dtype", "span"), [(torch.uint8, None), (torch.float32, 2.0)])
def test_psnr_and_ssim_equal_torchmetrics_and_scikit_image(dtype: torch.dtype, span: float | None) -> None:
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure
    from torchmetrics.image import PeakSignalNoiseRatio

    base = pictures(6, 0, size=40)[..., :30].double()
    images, truth = torch.nn.functional.avg_pool2d(base, 3, 1), torch.nn.functional.avg_pool2d(base, 5, 1, 1)
    images, truth = images.round(), truth.round()
    if span is None:
        images, truth = images.to(dtype), truth.to(dtype)
    else:
        images, truth = (images / 127.5 - 1).to(dtype), (truth / 127.5 - 1).to(dtype)
    numbers = (images.double(), truth.double())
    full = span or 255.0
    theirs = PeakSignalNoiseRatio(data_range=full, reduction="elementwise_mean", dim=(1, 2, 3)).set_dtype(torch.float64)
    assert m.psnr(images, truth, data_range=span).value == pytest.approx(theirs(*numbers).item(), rel=1e-7)
    # torchmetrics adds reflected borders, which the published index does not have.
    _, everywhere = structural_similarity_index_measure(*numbers, data_range=full, return_full_image=True)
    inside = everywhere[..., 5:-5, 5:-5].flatten(1).mean(1)
    ours = m.ssim_each(images, truth, data_range=span).tolist()
    assert ours == pytest.approx(inside.tolist(), rel=1e-6)
    settings = {"gaussian_weights": True, "use_sample_covariance": False, "channel_axis": 0, "data_range": full}
    assert ours == pytest.approx(
        [structural_similarity(a.numpy(), b.numpy(), **settings) for a, b in zip(*numbers, strict=True)]
    )


def test_psnr_and_ssim_laws() -> None:
    truth = pictures(5, 0).clamp(max=245)
    off = truth + 10
    assert m.psnr(off, truth).value == pytest.approx(20 * math.log10(25.5))
    assert m.psnr(truth, truth).value == math.inf
    assert m.ssim(truth, truth).value == pytest.approx(1, abs=1e-12)
    assert m.ssim(off, truth).value == pytest.approx(m.ssim(truth, off).value)
    # Constants a and b have only the luminance term.
    a, b = torch.full((1, 1, 11, 11), 100, dtype=torch.uint8), torch.full((1, 1, 11, 11), 50, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert m.ssim(a, b).value == pytest.approx((2 * 5000 + c1) / (12500 + c1), rel=1e-9)
    each = m.ssim_each(pictures(3, 1), pictures(3, 2))
    alone = torch.cat([m.ssim_each(pictures(3, 1)[i : i + 1], pictures(3, 2)[i : i + 1]) for i in range(3)])
    assert torch.allclose(each, alone, rtol=1e-12)
    noisy = [m.ssim((truth.double() + s * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))),
                    truth.double(), data_range=255).value for s in (1, 10, 40, 90)]  # fmt: skip
    assert noisy == sorted(noisy, reverse=True)


@settings(max_examples=30, deadline=None)
@given(bad=st.sampled_from(["float", "shape", "dtype", "axes", "empty", "nan", "small", "range"]), ssim=st.booleans())
def test_bad_pairs_are_refused(bad: str, ssim: bool) -> None:
    x = pictures(2, 0)
    images, truth, numbers = {
        "float": (x / 255, x / 255, {}), "shape": (x, x[:1], {}), "dtype": (x, x.float(), {"data_range": 255}),
        "axes": (x[0], x[0], {}), "empty": (x[:0], x[:0], {}), "small": (x[..., :5], x[..., :5], {}),
        "nan": (x / 255 * torch.nan, x / 255, {"data_range": 1}), "range": (x, x, {"data_range": 0}),
    }[bad]  # fmt: skip
    if bad == "small" and not ssim:
        assert m.psnr(images, truth).value == math.inf
        return
    with pytest.raises(InputError):
        (m.ssim if ssim else m.psnr)(images, truth, **numbers)


def test_radial_power_finds_a_wave_where_it_is_and_noise_everywhere() -> None:
    side = 24
    place = torch.arange(side, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * 5 * place / side).expand(side, side)[None, None]
    power = radial_power(wave)
    assert int(power.argmax()) == 5 and float(power.sum() - power[5]) < 1e-20
    noise = 3 * torch.randn(400, 2, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (radial_power(noise) / 9 - 1).abs()[2:].max() < 0.05
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert detail_error(noise, noise) == 0 < detail_error(0.9 * noise, noise) < detail_error(blurred, noise)
    assert detail_error(0.1 * noise, noise) == pytest.approx(2.0)
    with pytest.raises(InputError, match="size"):
        detail_error(noise, noise[:, :1])
