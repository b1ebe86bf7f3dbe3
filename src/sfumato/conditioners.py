"""Raw conditions (prompts, labels, vendors) to what a network reads, once a run."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sfumato import operators
from sfumato.codecs import to_float
from sfumato.core import Context, InputError, Registry
from sfumato.networks.text import EmbeddingTable, SentenceEncoder, check_prompts

registry = Registry("conditioner")
BUNDLED = Path(__file__).parent / "zoo" / "data"


class Conditioner:
    """``conditioner(n, prompts, **raw) -> {name: tensor (n, *)}``; ``config`` rebuilds it from JSON."""

    name: str
    config: Mapping[str, Any]

    def __call__(self, n: int, prompts: Sequence[str] | None = None, **raw: Any) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} must say what its conditions are")

    @property
    def vocabulary(self) -> list[str]:
        """Prompts that it knows by name; none where it reads any words, or none at all."""
        return []

    def in_turn(self, n: int, seed: int, prompts: Sequence[str] | None = None) -> list[str] | None:
        """n of the prompts, or of all it knows, in turn and in an order drawn by the seed; None where there are none."""
        heard = list(self.vocabulary if prompts is None else prompts)
        random.Random(seed).shuffle(heard)
        return [heard[i % len(heard)] for i in range(n)] if heard else None


def choices(name: str, given: Any, n: int, options: Sequence[str]) -> Tensor:
    """One of the named options, or one an item, or None for the null class: int64 (n,)."""
    values = list(given) if isinstance(given, (list, tuple, Tensor)) else [given] * n
    if len(values) != n:
        raise InputError(f"{len(values)} values of {name} for {n} images: give one, or one an image")
    rows = []
    for value in values:
        if value is None:
            rows.append(len(options))
        elif str(value) in options:
            rows.append(list(options).index(str(value)))
        else:
            raise InputError(f"{name} = {value!r}: one of {', '.join(options)}, or none")
    return torch.tensor(rows)


@registry.register("none")
class Unconditional(Conditioner):
    """For models that read nothing."""

    name, config = "none", {}

    def __call__(self, n: int, prompts: Sequence[str] | None = None, **raw: Any) -> dict[str, Any]:
        if prompts is not None or raw:
            raise InputError(f"this model reads no prompt and no {sorted(raw) or 'condition'}")
        return {}


@registry.register("classes")
class Classes(Conditioner):
    """Named classes: prompts are class names, an item without one is the null class."""

    name = "classes"

    def __init__(self, classes: Mapping[str, Sequence[str]]) -> None:
        self.config = {"classes": {k: list(v) for k, v in classes.items()}}
        self.classes = self.config["classes"]

    @property
    def vocabulary(self) -> list[str]:
        return list(next(iter(self.classes.values())))

    def __call__(self, n: int, prompts: Sequence[str] | None = None, **raw: Any) -> dict[str, Any]:
        first = next(iter(self.classes))
        if prompts is not None:
            raw = {first: list(prompts), **raw}
        _known(raw, self.classes)
        return {name: choices(name, raw.get(name), n, options) for name, options in self.classes.items()}


@registry.register("text")
class Text(Conditioner):
    """Sentence features of all-MiniLM-L6-v2 as ``text``, ``text_mask`` and ``vector``, beside named classes.

    tokens   word pieces a prompt
    classes  name -> options, as in :class:`Classes`
    table    a bundled table of known captions, so that those work without the text extra

    The pooled vector is scaled to entries of variance about 1. A missing prompt is the null condition.
    """

    name = "text"

    def __init__(
        self, tokens: int = 16, classes: Mapping[str, Sequence[str]] | None = None, table: str | None = None
    ) -> None:
        self.config = {"tokens": tokens, "classes": {k: list(v) for k, v in (classes or {}).items()}, "table": table}
        self.tokens, self.classes, self.table = tokens, self.config["classes"], table
        self._encoder: Any = None

    @property
    def encoder(self) -> Any:
        """The table of captions in front of the sentence encoder, each loaded when it is first needed."""
        if self._encoder is None:
            encoder = SentenceEncoder()
            self._encoder = EmbeddingTable.load(BUNDLED / self.table, encoder) if self.table else encoder
        return self._encoder

    @property
    def vocabulary(self) -> list[str]:
        return list(self.encoder.captions) if self.table else []

    def __call__(self, n: int, prompts: Sequence[str] | None = None, **raw: Any) -> dict[str, Any]:
        _known(raw, self.classes)
        cond: dict[str, Any] = {k: choices(k, raw.get(k), n, options) for k, options in self.classes.items()}
        return self._text(n, prompts) | cond

    def _text(self, n: int, prompts: Sequence[str] | None) -> dict[str, Tensor]:
        given = [""] * n if prompts is None else check_prompts(prompts)
        if len(given) != n:
            raise InputError(f"{len(given)} prompts for {n} images: give one an image")
        spoken = [p for p in given if p.strip()]
        channels = 384
        text, mask = torch.zeros(n, self.tokens, channels), torch.zeros(n, self.tokens, dtype=torch.bool)
        vector = torch.zeros(n, channels)
        if spoken:
            features = self.encoder.encode(spoken, self.tokens)
            rows = torch.tensor([bool(p.strip()) for p in given])
            text[rows], mask[rows], vector[rows] = features.tokens, features.mask, features.pooled * channels**0.5
        return {"text": text, "text_mask": mask, "vector": vector}


def _known(raw: Mapping[str, Any], classes: Mapping[str, Any]) -> None:
    unknown = set(raw) - set(classes)
    if unknown:
        raise InputError(f"this model reads no {sorted(unknown)}; it reads {sorted(classes) or 'only prompts'}")


@registry.register("degraded")
class Degraded(Conditioner):
    """For restoration: the degraded picture, enlarged to the size of the result, under the names the model reads it by.

    size      (height, width) of the result
    reads     the conditions it becomes; 'anchor' is what an anchored process leads to, 'image' what a network sees beside x
    operator  a spec such as "downsample(factor=4, noise=0.04)": what such pictures went through, see ``operators``

    ``image`` is uint8 or in [-1, 1], (1 or n, C, h, w) of any h and w. It is enlarged by cubic interpolation. For models that
    run on pixels.
    """

    name = "degraded"

    def __init__(
        self,
        size: Sequence[int],
        reads: Sequence[str] = ("anchor", "image"),
        operator: str = "downsample(factor=4)",
    ) -> None:
        height, width = size
        self.config = {"size": [height, width], "reads": list(reads), "operator": operator}
        self.size, self.operator = (height, width), operators.registry.make(operator)

    def __call__(self, n: int, prompts: Sequence[str] | None = None, **raw: Any) -> dict[str, Any]:
        image = raw.pop("image", None)
        if prompts is not None or raw:
            raise InputError(f"this model reads no prompt and no {sorted(raw) or 'further condition'}, only image=")
        if not isinstance(image, Tensor) or image.ndim != 4 or len(image) not in (1, n):
            given = f"{tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
            raise InputError(f"this model restores: give the degraded pictures, image=(1 or {n}, C, h, w), not {given}")
        wide = self.enlarged(image).expand(n, -1, -1, -1)
        return dict.fromkeys(self.config["reads"], wide)

    def enlarged(self, image: Tensor) -> Tensor:
        """uint8 or [-1, 1] (n, C, h, w) as floats in [-1, 1] of the result's size."""
        return interpolate(to_float(image), self.size, mode="bicubic", align_corners=False).clamp(-1, 1)

    def degraded(self, x: Tensor, ctx: Context) -> Tensor:
        """Pictures (n, C, H, W) in [-1, 1] as the operator leaves them, its noise drawn from the streams of ``ctx``."""
        small: Tensor = self.operator.measure(x, ctx)
        return small
