"""Classifier two-sample test, and accuracies of classifiers and of dual encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.core.errors import InputError, MissingExtra
from sfumato.evaluation.measurement import Measurement
from sfumato.evaluation.metrics._tensors import blocks, count, double, features, pair, same_width

CLASSIFIERS = ("logistic", "neighbours", "mlp")


def classifier_two_sample(
    samples: Tensor, reference: Tensor, *, classifier: str = "logistic", folds: int = 5, seed: int = 0
) -> Measurement:
    """Held-out accuracy of a classifier told to separate samples from reference: 0.5 is ideal, 1 is fully separable.

    Equal counts are drawn from both sets by the seed; every item is judged once, by a classifier fitted on the other
    folds with features standardised there. ``classifier``: "logistic" sees differences a plane can separate,
    "neighbours" (sqrt(n) of them) and "mlp" (64 hidden units) any. The interval is Wilson's over the judged items.
    Source: Lopez-Paz and Oquab (2017), Revisiting classifier two-sample tests.

    Raises:
        InputError: an unknown classifier, or fewer items than folds need.
        MissingExtra: scikit-learn is not installed.
    """
    x, y = pair(samples, reference)
    if classifier not in CLASSIFIERS:
        raise InputError(f"no classifier {classifier!r}; there are: {', '.join(CLASSIFIERS)}")
    each = min(len(x), len(y))
    count("folds", folds, 2, each // 2, f"parts of {each} items a set, at least 2 items in each")
    generator = torch.Generator().manual_seed(seed)
    drawn = [z[torch.randperm(len(z), generator=generator)[:each].to(z.device)].cpu() for z in (x, y)]
    labels = torch.arange(2).repeat_interleave(each)
    right = _judged(torch.cat(drawn), labels, classifier, folds, seed) == labels
    found = Measurement.share("classifier two-sample accuracy", right.double())
    note = f"{classifier}, {folds} folds; 0.5 is ideal"
    return found.labelled(n=each, reference_n=each, higher_is_better=False, note=note)


def _judged(x: Tensor, labels: Tensor, classifier: str, folds: int, seed: int) -> Tensor:
    """The label each item got while it was held out."""
    try:
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise MissingExtra("scikit-learn", extra="science") from None
    model = make_pipeline(StandardScaler(), _classifier(classifier, len(x), seed))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return torch.as_tensor(cross_val_predict(model, x.numpy(), labels.numpy(), cv=split))


def _classifier(name: str, n: int, seed: int) -> Any:
    if name == "logistic":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(max_iter=1000)
    if name == "neighbours":
        from sklearn.neighbors import KNeighborsClassifier

        # An odd number of neighbours has no ties.
        return KNeighborsClassifier(n_neighbors=2 * (round(n**0.5) // 2) + 1)
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((64,), early_stopping=True, max_iter=200, random_state=seed)


def classification_accuracy(logits: Tensor, labels: Tensor, *, top: int = 1) -> Measurement:
    """The share of items (N, C) whose label (N,) is among the ``top`` largest logits; ties count as drawn by lot.

    Raises:
        InputError: shapes that do not fit, labels outside 0..C-1, or NaN.
    """
    scores = features("logits", logits, 1)
    classes = scores.shape[1]
    labels = _indices("labels", labels, len(scores), classes).to(scores.device)
    count("top", top, 1, classes, f"of {classes} classes")
    name = "accuracy" if top == 1 else f"top-{top} accuracy"
    found = Measurement.share(name, _hits(scores, labels, top))
    return found.labelled(higher_is_better=True, note=f"{classes} classes")


def retrieval_accuracy(queries: Tensor, keys: Tensor, target: Tensor | None = None, *, top: int = 1) -> Measurement:
    """The share of queries (N, d) whose own key is among the ``top`` keys (M, d) of largest cosine.

    ``target`` (N,) is the index of each query's key; by default query i belongs to key i. Equal cosines count as drawn
    by lot, so an encoder that maps everything to one point scores top / M and not 1.

    Raises:
        InputError: shapes that do not fit, a zero embedding, or targets outside 0..M-1.
    """
    q, p = _unit("queries", queries), _unit("keys", keys)
    same_width("queries", q, "keys", p)
    target = _own(target, len(q), len(p)).to(q.device)
    count("top", top, 1, len(p), f"of {len(p)} keys")
    p = p.to(q.device)
    hits = torch.cat([_hits(q[rows] @ p.T, target[rows], top, 1e-12) for rows in blocks(len(q), len(p))])
    found = Measurement.share(f"top-{top} retrieval", hits)
    return found.labelled(reference_n=len(p), higher_is_better=True, note=f"chance is {top / len(p):.3g}")


def text_agreement(
    images: Tensor, texts: Tensor, target: Tensor | None = None, *, top: Sequence[int] = (1, 5)
) -> tuple[Measurement, ...]:
    """The mean cosine of image (N, d) and own text (M, d) embeddings of a dual encoder, then the top-k retrieval.

    ``target`` (N,) is the index of each image's text; by default image i belongs to text i. The mean cosine has a scale
    of its own for every encoder and is inflated by training against it; retrieval among all texts has a known chance
    level. Entries of ``top`` above M are an error. Source: Hessel, Holtzman, Forbes, Le Bras, Choi (2021), CLIPScore.

    Raises:
        InputError: as :func:`retrieval_accuracy`.
    """
    x, y = _unit("images", images), _unit("texts", texts)
    same_width("images", x, "texts", y)
    own = _own(target, len(x), len(y))
    cosine = (x * y[own.to(y.device)].to(x.device)).sum(1)
    mean = Measurement.mean("text agreement", cosine, reference_n=len(y), higher_is_better=True, note="mean cosine")
    return mean, *(retrieval_accuracy(images, texts, own, top=k) for k in top)


def _unit(name: str, x: Tensor) -> Tensor:
    x = features(name, x, 1)
    length = x.norm(dim=1, keepdim=True)
    if not bool((length > 0).all()):
        raise InputError(f"{name}: {int((length == 0).sum())} of {len(x)} embeddings are zero and have no direction")
    return x / length


def _own(target: Tensor | None, n: int, m: int) -> Tensor:
    if target is not None:
        return _indices("target", target, n, m)
    if n != m:
        raise InputError(f"{n} queries and {m} keys: give target, the index of each query's key")
    return torch.arange(n)


def _indices(name: str, index: Tensor, n: int, most: int) -> Tensor:
    if not isinstance(index, Tensor) or index.shape != (n,) or index.is_floating_point() or index.dtype == torch.bool:
        given = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise InputError(f"{name}: an integer tensor ({n},) is wanted, got {given}")
    if n and not 0 <= int(index.min()) <= int(index.max()) < most:
        raise InputError(f"{name}: indices lie in 0..{most - 1}, got {int(index.min())}..{int(index.max())}")
    return index.long()


def _hits(scores: Tensor, own: Tensor, top: int, tolerance: float = 0.0) -> Tensor:
    """The probability that the own score is among the top ones when ties are drawn by lot: exact, no randomness."""
    mine = double(scores).gather(1, own.unsqueeze(1))
    above = (scores > mine + tolerance).sum(1)
    tied = ((scores - mine).abs() <= tolerance).sum(1)
    return ((top - above).clamp(min=0) / tied.double()).clamp(max=1)
