"""Samples against a reference: one table of figures with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from sfumato.core.errors import InputError
from sfumato.core.registry import Registry
from sfumato.evaluation import metrics as m
from sfumato.evaluation.extraction import Images, Ranks, batches, extract
from sfumato.evaluation.features import DualEncoder, Extractor
from sfumato.evaluation.features import get as get_features
from sfumato.evaluation.measurement import Measurement
from sfumato.evaluation.metrics.images import psnr_of, ssim_of
from sfumato.evaluation.table import Table

METRICS = Registry("metric")
DEFAULT = ("frechet", "kernel", "precision-recall", "density-coverage")
PAIRED = ("psnr", "ssim")


@dataclass(frozen=True)
class FeatureSets:
    """What a metric of :func:`evaluate` may look at: features (N, d) of each set, and texts for dual encoders."""

    samples: Tensor
    reference: Tensor
    training: Tensor | None = None
    texts: Tensor | None = None
    target: Tensor | None = None
    seed: int = 0


Figures = Measurement | Sequence[Measurement]
Metric = Callable[[FeatureSets], Figures]
# The argument of evaluate, besides samples and reference, that a registered metric reads.
NEEDS = {"memorisation": "training", "memorisation-ratio": "training", "text-agreement": "prompts"}


@METRICS.register("frechet")
def _frechet(sets: FeatureSets) -> Figures:
    return m.frechet_distance(sets.samples, sets.reference, seed=sets.seed)


@METRICS.register("frechet-debiased")
def _frechet_debiased(sets: FeatureSets) -> Figures:
    return m.frechet_distance(sets.samples, sets.reference, seed=sets.seed, debiased=True)


@METRICS.register("kernel")
def _kernel(sets: FeatureSets) -> Figures:
    return m.kernel_distance(sets.samples, sets.reference)


@METRICS.register("rbf")
def _rbf(sets: FeatureSets) -> Figures:
    return m.rbf_distance(sets.samples, sets.reference, seed=sets.seed)


@METRICS.register("precision-recall")
def _precision_recall(sets: FeatureSets) -> Figures:
    return m.precision_recall(sets.samples, sets.reference)


@METRICS.register("density-coverage")
def _density_coverage(sets: FeatureSets) -> Figures:
    return m.density_coverage(sets.samples, sets.reference)


@METRICS.register("sliced-wasserstein")
def _sliced_wasserstein(sets: FeatureSets) -> Figures:
    return m.sliced_wasserstein(sets.samples, sets.reference, seed=sets.seed)


@METRICS.register("two-sample")
def _two_sample(sets: FeatureSets) -> Figures:
    return m.classifier_two_sample(sets.samples, sets.reference, seed=sets.seed)


@METRICS.register("memorisation")
def _memorisation(sets: FeatureSets) -> Figures:
    assert sets.training is not None
    return m.memorisation_rate(sets.samples, sets.training, sets.reference)


@METRICS.register("memorisation-ratio")
def _memorisation_ratio(sets: FeatureSets) -> Figures:
    assert sets.training is not None
    return m.memorisation_ratio(sets.samples, sets.training)


@METRICS.register("text-agreement")
def _text_agreement(sets: FeatureSets) -> Figures:
    assert sets.texts is not None
    top = [k for k in (1, 5) if k <= len(sets.texts)]
    return m.text_agreement(sets.samples, sets.texts, sets.target, top=top)


def evaluate(
    samples: Images,
    reference: Images,
    *,
    features: str | Extractor,
    metrics: Sequence[str | Metric] = DEFAULT,
    training: Images | None = None,
    prompts: Sequence[str] | None = None,
    concepts: Sequence[str] | None = None,
    seed: int = 0,
    batch: int = 64,
    reference_name: str = "reference",
    title: str = "",
    distributed: bool | None = None,
) -> Table:
    """Measure samples against a reference set that the model has not seen; a row is a figure with its interval.

    ``samples``, ``reference`` and ``training`` are uint8 images (N, C, H, W), an iterable of batches of them (shards of
    a memory map, a folder read in batches), or features (N, d) already made by the same extractor, as floats.

    Args:
        features: the name of an extractor or the extractor itself; its name is in every row.
        metrics: registered names, or functions of :class:`FeatureSets` that return measurements.
        training: what the model was trained on, for "memorisation" and "memorisation-ratio"; reference must be held
            out.
        prompts: the text of each sample, for "text-agreement"; the extractor must have ``encode_text``.
        concepts: all texts to choose from; by default the different prompts.
        seed: everything random in a metric is a function of it.
        distributed: in several processes (torchrun, accelerate launch) each extracts its share of the batches and all
            return the same table as one process would; False keeps a single process to itself.

    Raises:
        InputError: images or features that cannot be used, or a metric without what it needs.
        UnknownName: a metric or an extractor that does not exist.
        MissingExtra: an extractor or a metric whose package is not installed.
    """
    extractor = _extractor(features)
    chosen = find(metrics, {"training": training, "prompts": prompts})
    ranks = Ranks.detect(distributed)

    def make(name: str, images: Images) -> Tensor:
        if isinstance(images, Tensor) and images.dim() == 2 and images.is_floating_point():
            return images
        return extract(images, extractor, batch=batch, ranks=ranks, name=name)

    found = {"samples": make("samples", samples), "reference": make("reference", reference)}
    if training is not None:
        found["training"] = make("training", training)
    if prompts is not None:
        found |= _texts(extractor, prompts, concepts, len(found["samples"]))
    sets = FeatureSets(**found, seed=seed)
    rows = ranks.first(lambda: [figure for metric in chosen for figure in _listed(metric(sets))])
    return Table([figure.labelled(features=extractor.name, reference=reference_name) for figure in rows], title)


def evaluate_pairs(
    images: Images,
    truth: Images,
    *,
    metrics: Sequence[str] = PAIRED,
    batch: int = 64,
    reference_name: str = "truth",
    title: str = "",
) -> Table:
    """Restored uint8 images against their originals, pair by pair and in step: "psnr" and "ssim".

    Raises:
        InputError: an unknown figure, or sets that do not pair up in number and shape.
    """
    each = {"psnr": (m.psnr_each, psnr_of), "ssim": (m.ssim_each, ssim_of)}
    unknown = [name for name in metrics if name not in each]
    if unknown or not metrics:
        raise InputError(f"no figure of pairs {', '.join(map(repr, unknown))}; there are: {', '.join(PAIRED)}")
    left, right = batches(images, batch, "images"), batches(truth, batch, "truth")
    parts: dict[str, list[Tensor]] = {name: [] for name in metrics}
    seen = 0
    for a, b in zip_longest(left, right):
        if a is None or b is None:
            raise InputError(
                f"images and truth do not pair up: one of them ends after {seen} images, the other goes on"
            )
        for name, values in parts.items():
            values.append(each[name][0](a, b))
        seen += len(a)
    rows = [each[name][1](torch.cat(values)) for name, values in parts.items()]
    return Table([row.labelled(features="pixels", reference=reference_name) for row in rows], title)


def _extractor(features: str | Extractor) -> Extractor:
    found = get_features(features) if isinstance(features, str) else features
    if not callable(found) or not getattr(found, "name", None):
        raise InputError(
            f"features: a registered name or a callable with a name is wanted, got {features!r}; "
            "NetworkFeatures(net, name) makes one of a network"
        )
    return found


def find(metrics: Sequence[str | Metric], given: Mapping[str, Any]) -> list[Metric]:
    """The metrics of those names. InputError where there is none of a name, or where ``given`` lacks what it reads."""
    if isinstance(metrics, str) or not metrics:
        raise InputError(
            f"metrics: a sequence of names is wanted, got {metrics!r}; there are: {', '.join(METRICS.names())}"
        )
    for name in metrics:
        need = NEEDS.get(name) if isinstance(name, str) else None
        if need and given.get(need) is None:
            raise InputError(f"metric {name!r} needs {need}=...")
    return [metric if callable(metric) else METRICS.find(metric) for metric in metrics]


def _listed(figures: Figures) -> Sequence[Measurement]:
    found = [figures] if isinstance(figures, Measurement) else figures
    if not isinstance(found, Sequence) or not all(isinstance(figure, Measurement) for figure in found):
        raise InputError(f"a metric returns a Measurement or a sequence of them, got {figures!r}")
    return found


def _texts(extractor: Extractor, prompts: Sequence[str], concepts: Sequence[str] | None, n: int) -> dict[str, Tensor]:
    """Embeddings of all concepts, and for each sample the index of its own."""
    if not isinstance(extractor, DualEncoder):
        raise InputError(f"prompts are given, but {extractor.name} has no encode_text(texts) -> (M, d)")
    if isinstance(prompts, str) or len(prompts) != n:
        raise InputError(f"prompts: one text for each of the {n} samples is wanted, got {len(prompts)}")
    texts = list(dict.fromkeys(prompts if concepts is None else concepts))
    place = {text: i for i, text in enumerate(texts)}
    absent = sorted({prompt for prompt in prompts if prompt not in place})
    if absent:
        raise InputError(f"{len(absent)} prompts are not among the concepts, such as {absent[0]!r}")
    return {"texts": extractor.encode_text(texts), "target": torch.tensor([place[prompt] for prompt in prompts])}
