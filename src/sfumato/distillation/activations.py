"""Features of states for moment matching: what a frozen network makes of them, or a feature extractor of the pictures."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core import Context, Frozen, InputError, linear
from sfumato.denoisers import features
from sfumato.pipeline import Pipeline

SMALL, CELLS = 0.1, 2  # at this time a network still sees everything; features are averaged over CELLS x CELLS parts


class Standardised(nn.Module):
    """Features (B, d) of mean 0 and variance 1 over some data, so that kernels of their inner products have one scale."""

    shift: Tensor
    scale: Tensor

    def __init__(self, body: nn.Module, data: Tensor) -> None:
        super().__init__()
        self.body = body
        with torch.no_grad():
            seen = torch.cat([body(part) for part in data.split(64)])
        spread = seen.std(0)
        self.register_buffer("shift", seen.mean(0))
        self.register_buffer("scale", spread.clamp(min=1e-3 * float(spread.max()) + 1e-12))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) - self.shift) / self.scale  # type: ignore[no-any-return]


class Shown(nn.Module):
    """Features (B, 2 d) of states as they are shown, cut off at [-1, 1], and with a lesser weight as they are.

    sqrt(2 / (1 + w^2)) (f(clamp(x)), w f(x)), so that an inner product over 2 d is the mean, with weights 1 and w^2, of those of
    cut and of uncut states over d. Pictures are cut off at black and white: means of features of uncut states can be matched by
    values that are then cut off, and features of cut ones alone let states run away.

    body   features (B, d) of states
    share  w

    Raises InputError for a negative share.
    """

    def __init__(self, body: nn.Module, share: float = 0.5) -> None:
        super().__init__()
        if not 0 <= share < math.inf:
            raise InputError(f"share = {share}: a finite weight, not negative")
        self.body, self.share = body, share

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.body(x.clamp(-1, 1)), self.share * self.body(x)], 1)
        return both * math.sqrt(2 / (1 + self.share**2))


class Activations(nn.Module):
    """States (B, *) to the outputs of some submodules of a frozen denoiser's network, averaged over parts of the picture.

    The network is shown the clean state as it is at a small time, without noise and without a condition, so the features are
    a differentiable function of the state alone.
    """

    def __init__(self, pipeline: Pipeline, paths: Sequence[str], raw: dict[str, Any]) -> None:
        super().__init__()
        denoiser: Any = copy.copy(pipeline.denoiser)
        self.denoiser, self.paths = Frozen(denoiser), list(paths)
        self.nothing = pipeline.conditions(1, None, **raw)

    def forward(self, x: Tensor) -> Tensor:
        cond = {k: v.to(x.device).expand(len(x), *v.shape[1:]) for k, v in self.nothing.items()}
        c, denoiser = self.denoiser.process.coef(SMALL), self.denoiser
        _, maps = features.features(
            denoiser, linear(c.alpha, x), SMALL, Context(cond=cond, batch=len(x), device=x.device), self.paths  # type: ignore[arg-type]
        )  # fmt: skip
        return torch.cat([_averaged(maps[path], x).flatten(1) for path in self.paths], 1)


class Extracted(nn.Module):
    """States to the features of a classifier of pictures, through the codec."""

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        super().__init__()
        from sfumato.evaluation.features import BackboneFeatures, get

        found = get(name)
        if not isinstance(found, BackboneFeatures):
            raise InputError(
                f"features = {name!r} have no gradient: 'teacher', 'pixels', or a network such as 'mobilenet-v2'"
            )
        self.codec, self.net = pipeline.codec, found.net
        self.mean, self.std, self.size = found.mean, found.std, found.size

    def forward(self, x: Tensor) -> Tensor:
        pictures = self.codec.decode(x).expand(-1, 3, -1, -1) / 2 + 0.5
        pictures = F.interpolate(pictures, (self.size, self.size), mode="bicubic", antialias=True)
        return self.net((pictures - self.mean) / self.std)  # type: ignore[no-any-return]


def places(denoiser: Any) -> list[str]:
    """Where a network is looked into: its last map, its bottleneck, and what lies between. InputError where none is known."""
    net: Any = features.network(denoiser)
    deepest = features.bottleneck(net)
    known = {name for name, _ in net.named_modules()}
    levels, stack = deepest.split("."), deepest.rsplit(".", 1)
    if "level" in levels:  # our U-Nets
        first = levels.index("level")
        return [".".join(levels[: k + 1]) for k in range(first, len(levels))]
    if stack[-1].isdigit():  # a transformer
        count = sum(name.startswith(f"{stack[0]}.") and name.count(".") == deepest.count(".") for name in known)
        blocks = [f"{stack[0]}.{k}" for k in sorted({count // 4, count // 2, count - 1})]
        two = {b for b in blocks if any(name.startswith(f"{b}.") and "context" in name for name in known)}
        return [f"{b}.ff" if b in two else b for b in blocks]  # of two streams the picture's
    ends = [name for name in ("model.conv_norm_out", "conv_norm_out") if name in known]
    return [*ends, deepest]


def seen(pipeline: Pipeline, name: str, data: Tensor, raw: dict[str, Any]) -> nn.Module:
    """The features of this name: 'teacher', 'pixels' or an extractor's, standardised over ``data``, states of the pipeline."""
    if name == "teacher":
        body: nn.Module = Activations(pipeline, places(pipeline.denoiser), raw)
    elif name == "pixels":
        body = nn.Flatten()
    else:
        body = Extracted(pipeline, name)
    return Standardised(body, data)


def _averaged(h: Tensor, x: Tensor) -> Tensor:
    """What a submodule says of x, as maps (B, C, CELLS, CELLS)."""
    return F.adaptive_avg_pool2d(features.as_maps(h, x), CELLS)


__all__ = ["Activations", "Extracted", "Shown", "Standardised", "places", "seen"]
