"""Learnt tokens: a vector put into the prompt, found by descending any loss on the pictures through the sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError
from sfumato.files import write_atomically
from sfumato.tuning.inputs import Generator, optimise


@dataclass(frozen=True, eq=False)
class Token:
    """Vectors beside a prompt's own: ``token.put(cond)`` gives the conditions with it, for any prompt, model and seed.

    value  (K, C), or (B, K, C) with one set an item
    name   the condition: token states (B, L, C) are made longer by K, a pooled vector (B, C) is moved by their sum
    mask   the condition that says which token states count; put in as True where the conditions have it
    """

    value: Tensor
    name: str = "text"
    mask: str = "text_mask"

    def put(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The conditions with the token. InputError where they have no such condition, or of another width."""
        given = cond.get(self.name)
        if not isinstance(given, Tensor) or given.ndim not in (2, 3) or given.shape[-1] != self.value.shape[-1]:
            has = {k: tuple(v.shape) for k, v in cond.items() if isinstance(v, Tensor)}
            raise InputError(f"a token of width {self.value.shape[-1]} for {self.name!r} does not fit conditions {has}")
        value = self.value if self.value.ndim == 3 else self.value[None]
        if len(value) not in (1, len(given)):
            raise InputError(f"{len(value)} tokens for {len(given)} items: give one for all, or one an item")
        value = value.to(given).expand(len(given), -1, -1)
        if given.ndim == 2:
            return {**cond, self.name: given + value.sum(1)}
        out = {**cond, self.name: torch.cat([given, value], 1)}
        if isinstance(mask := cond.get(self.mask), Tensor):
            out[self.mask] = torch.cat([mask, mask.new_ones(len(mask), value.shape[1])], 1)
        return out

    def item(self, i: int) -> Token:
        """The token of one item, for reuse."""
        return self if self.value.ndim == 2 else Token(self.value[i], self.name, self.mask)

    def save(self, path: str | Path) -> Path:
        """One safetensors file, names in its metadata."""
        from safetensors.torch import save

        data = save({"value": self.value.detach().contiguous()}, {"name": self.name, "mask": self.mask})
        write_atomically(Path(path), data)
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> Token:
        """What :meth:`save` wrote; InputError for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return Token(file.get_tensor("value"), **file.metadata())
        except (SafetensorError, TypeError) as error:
            raise InputError(f"{path} is not a saved token ({error}): Token.save writes one") from error


@dataclass(frozen=True)
class Learnt:
    """token: fits the items it was learnt for; loss: the best of each of T tokens, (T,), and the history of losses, (n, T)."""

    token: Token
    loss: Tensor
    history: Tensor


def optimise_token(
    generate: Generator,
    x: Tensor,
    cond: Mapping[str, Any],
    loss: Callable[[Tensor], Tensor],
    *,
    init: Tensor,
    name: str = "text",
    mask: str = "text_mask",
    shared: bool | Tensor = False,
    bound: float | None = None,
    steps: int = 50,
    lr: float = 0.1,
    decay: float = 0.0,
    clip: float | None = 1.0,
    patience: int | None = 15,
) -> Learnt:
    """e* = argmin_e loss(G(x, prompt + e)): the token is trained through the whole run of the frozen generator, from fixed noise.

    generate  :class:`sfumato.tuning.inputs.Generator`, e.g. ``Generator.of(pipeline, steps=6)``
    x         (B, *) the noise; the same at every step, so losses can be compared
    cond      conditions of the B items, as the model reads them
    loss      decoded data (B, *) -> (B,): any differentiable one (a counter, a classifier, a similarity)
    init      where it begins: (K, C) for all, or (T, K, C); the states of a word such as "some"
    shared    False: a token an item, each on its own; True: one for all, that minimises their mean; or (B,) int64, which token
              item i has (several noises of one prompt, say)
    bound     on the norm of each vector, e.g. that of ordinary words
    others    of AdamW, as in :func:`sfumato.tuning.inputs.optimise`

    Sources: Zafar, Wolf, Schwartz, 2024, "Iterative Object Count Optimization for Text-to-image Diffusion Models" (one a picture);
    Liu, Kortylewski, Bai, Bai, Yuille, 2024, "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial
    Search" (one for all prompts).
    """
    n = len(x)
    index = shared if isinstance(shared, Tensor) else torch.zeros(n).long() if shared else torch.arange(n)
    if index.shape != (n,) or index.is_floating_point() or int(index.min()) < 0:
        raise InputError(f"shared is True, False or (B,) int64 for {n} items; not {index.dtype} {tuple(index.shape)}")
    count = torch.bincount(index)
    if init.ndim not in (2, 3) or (init.ndim == 3 and len(init) != len(count)):
        raise InputError(f"init is (K, C), or (T, K, C) for {len(count)} tokens; not {tuple(init.shape)}")
    begin = init if init.ndim == 3 else init[None].expand(len(count), -1, -1)

    def value(given: Mapping[str, Tensor]) -> Tensor:
        out = loss(generate(x, Token(given["token"][index], name, mask).put(cond)))
        return out.new_zeros(len(count)).index_add(0, index, out) / count

    def inside(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        size = given["token"].norm(dim=-1, keepdim=True)
        return {"token": given["token"] * (bound / size.clamp(min=bound))}  # type: ignore[operator, type-var]

    found = optimise(
        {"token": begin}, value, steps=steps, lr=lr, decay=decay, clip=clip, patience=patience,
        project=None if bound is None else inside,
    )  # fmt: skip
    best = found.values["token"]
    return Learnt(Token(best[0] if shared is True else best[index], name, mask), found.loss, found.history)


@dataclass(frozen=True, eq=False)
class CountLoss:
    """|sum D(x) / s - N|: how far a counter's density is from the wanted number, (B,).

    counter   decoded data (B, *) -> density (B, *), not negative, differentiable
    wanted    N, one number or (B,), positive
    scale     s: what the density of one object sums to
    detector  data -> how many, without a gradient: then s = sum D / n is estimated anew on each picture, so the value is
              |n - N| and only the direction is the density's; a picture where it finds none keeps ``scale``

    Source: Zafar, Wolf, Schwartz, 2024, "Iterative Object Count Optimization for Text-to-image Diffusion Models".
    """

    counter: Callable[[Tensor], Tensor]
    wanted: Any
    scale: float = 1.0
    detector: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not (bool((torch.as_tensor(self.wanted) > 0).all()) and self.scale > 0):
            raise InputError(f"wanted = {self.wanted} and scale = {self.scale}: positive numbers")

    def __call__(self, x: Tensor) -> Tensor:
        total = self.counter(x).flatten(1).sum(1)
        scale: Any = self.scale
        if self.detector is not None:
            n = self.detector(x.detach()).to(total)
            scale = torch.where(n > 0, total.detach() / n.clamp(min=1), self.scale)
        return (total / scale - torch.as_tensor(self.wanted).to(total)).abs()


__all__ = ["CountLoss", "Learnt", "Token", "optimise_token"]
