"""Pull an image and its text together: the objective of a dual encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core import Context, InputError, Loss, Objective


class Bias(nn.Module):
    """The learnt offset of the sigmoid loss's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(-10.0))


class Contrastive(Objective):
    """Images and texts of one concept together, all others apart; any number of positives an item.

    Logits are l = exp(log_scale) cos(image, text); pairs of one concept (the same emoji by another hand) are all
    positives.

    loss     'softmax'  cross-entropy of rows and columns, their mean; the target of row i is uniform over
                        {j : concept_j = concept_i} (Radford et al., 2021, "Learning Transferable Visual Models from
                        Natural Language Supervision"; positives: Khosla et al., 2020, "Supervised Contrastive Learning")
             'sigmoid'  -1/B sum_ij log sigmoid(z_ij (l_ij + b)), z = 1 for positives and -1 otherwise, with a learnt b:
                        player 'bias', in one turn with the encoder (Zhai, Mustafa, Kolesnikov, Beyer, 2023, "Sigmoid
                        Loss for Language Image Pre-Training")
    classes  {head: weight}: cross-entropies of the encoder's class heads (``encoder.classify``) beside it; an item with
             label -100 has no say

    A batch is {"x": images (B, C, H, W), "text": {"vector", ...}, "concept": (B,), and one (B,) of labels a class head}.
    Player 'encoder', see :class:`sfumato.networks.DualEncoder`. Every item is compared with every other, so a batch
    cannot be split into micro-batches or over processes (``couples``).
    """

    couples = True

    def __init__(
        self, encoder: nn.Module, classes: Mapping[str, float] | None = None, *, loss: str = "softmax"
    ) -> None:
        super().__init__()
        if loss not in ("softmax", "sigmoid"):
            raise InputError(f"loss = {loss!r}: use 'softmax' or 'sigmoid'")
        unknown = set(classes or {}) - set(getattr(encoder, "heads", {}))
        if unknown:
            raise InputError(
                f"the encoder has no class heads {sorted(unknown)}; it has {sorted(getattr(encoder, 'heads', {}))}"
            )
        self.encoder, self.classes, self.loss = encoder, dict(classes or {}), loss
        self.bias = Bias() if loss == "sigmoid" else None

    def players(self) -> Mapping[str, nn.Module]:
        return {"encoder": self.encoder} if self.bias is None else {"encoder": self.encoder, "bias": self.bias}

    def turns(self, it: int) -> Sequence[Sequence[str]]:
        return [list(self.players())]

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "encoder") -> Loss:
        x, concept = batch["x"], batch["concept"]
        if len(concept) != len(x):
            raise InputError(f"{len(x)} images, {len(concept)} concepts: give one an image")
        image, text = self.encoder.image(x), self.encoder.text(**batch["text"])  # type: ignore[operator]
        logits = self.encoder.log_scale.exp() * image @ text.T  # type: ignore[operator]
        positive = concept[:, None] == concept[None]
        match = (
            self._softmax(logits, positive) if self.bias is None else self._sigmoid(logits + self.bias.value, positive)
        )
        terms: dict[str, Tensor] = {"match": match.detach()}
        total = match
        heads = self.encoder.classify(image) if self.classes else {}  # type: ignore[operator]
        for name, weight in self.classes.items():
            loss = F.cross_entropy(heads[name], batch[name])
            terms[name] = loss.detach()
            total = total + weight * loss
        best = logits.argmax(1)
        terms["accuracy"] = (concept[best] == concept).double().mean()
        return Loss(total, terms)

    @staticmethod
    def _softmax(logits: Tensor, positive: Tensor) -> Tensor:
        target = positive.to(logits.dtype)
        target = target / target.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    @staticmethod
    def _sigmoid(logits: Tensor, positive: Tensor) -> Tensor:
        return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / len(logits)
