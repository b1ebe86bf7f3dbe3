"""How good a text-to-emoji model is, by an encoder that no model was trained or guided with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError
from sfumato.evaluation import Table
from sfumato.evaluation.metrics import (
    classification_accuracy,
    frechet_distance,
    memorisation_rate,
    precision_recall,
    retrieval_accuracy,
)
from sfumato.networks import EmbeddingTable
from sfumato.pipeline import Pipeline
from sfumato.zoo import captions, emoji
from sfumato.zoo.encoders import embed_images, load_encoder

JUDGE = "emoji-judge"


def score(pipeline: Pipeline, n: int = 500, seed: int = 0, **sampling: Any) -> tuple[Table, dict[str, float], Tensor]:
    """(table, ratios, images) of ``n`` images, one for each of ``n`` trained concepts without skin tone.

    Retrieval is the judge's top 5 of the prompt among the captions of all concepts without skin tone. Its yardstick is the
    same figure on drawings no model has seen: the held-out vendor's. Precision and recall are between the generated images
    and the training drawings of the same concepts; their yardstick puts another vendor's drawings of those concepts in the
    place of the generated ones. ``ratios`` divides each by its yardstick.
    """
    judge: Any = load_encoder(JUDGE)
    size = pipeline.size[0]
    train = emoji.load(size, split="train", skin_tones=False)
    held = emoji.load(size, split="heldout-vendor", skin_tones=False)
    if n > len(set(train.concept.tolist())):
        raise InputError(f"n = {n}: there are {len(set(train.concept.tolist()))} trained concepts")
    asked = one_a_concept(train, n, seed)
    texts, targets = _texts(judge, train)
    images = pipeline.generate(
        [train.captions[i] for i in asked.tolist()],
        seed=seed,
        cond={"vendor": [emoji.VENDORS[v] for v in train.vendor[asked].tolist()]},
        **sampling,
    )
    ours, real = embed_images(judge, images), embed_images(judge, train.images[asked])
    unseen, other = embed_images(judge, held.images), embed_images(judge, train.images[_other_vendor(train, asked)])
    every = embed_images(judge, train.images)
    about = {"features": JUDGE}

    def retrieval(x: Tensor, concepts: Tensor, name: str) -> Any:
        found = retrieval_accuracy(x, texts, torch.tensor([targets[c] for c in concepts.tolist()]), top=5)
        return found.labelled(name=name, reference=f"captions of {len(texts)} concepts", **about)

    def vendor(x: Tensor, truth: Tensor, name: str) -> Any:
        return classification_accuracy(judge.classify(x)["vendor"], truth).labelled(name=name, **about)

    precision, recall = precision_recall(ours, real)
    real_precision, real_recall = precision_recall(other, real)
    hits = retrieval(ours, train.concept[asked], "top-5 retrieval")
    best = retrieval(unseen, held.concept, "top-5 retrieval, real unseen drawings")
    rows = [
        hits,
        best,
        vendor(ours, train.vendor[asked], "vendor accuracy"),
        vendor(unseen, held.vendor, "vendor accuracy, real unseen drawings"),
        precision.labelled(reference="training drawings of the same concepts", **about),
        real_precision.labelled(name="precision, another vendor's drawings", **about),
        recall.labelled(reference="training drawings of the same concepts", **about),
        real_recall.labelled(name="recall, another vendor's drawings", **about),
        frechet_distance(ours, real).labelled(reference="training drawings of the same concepts", **about),
        memorisation_rate(ours, every, unseen).labelled(**about),
    ]
    ratios = {
        "retrieval": hits.value / best.value,
        "precision": precision.value / real_precision.value,
        "recall": recall.value / real_recall.value,
    }
    return Table(rows), ratios, images


def one_a_concept(items: emoji.EmojiSet, n: int, seed: int) -> Tensor:
    """One drawing of each of n concepts, whichever vendor comes first in a seeded order."""
    order = torch.randperm(len(items.captions), generator=torch.Generator().manual_seed(seed))
    seen: dict[int, int] = {}
    for row in order.tolist():
        seen.setdefault(int(items.concept[row]), row)
    return torch.tensor(list(seen.values())[:n])


def _other_vendor(items: emoji.EmojiSet, rows: Tensor) -> Tensor:
    """For each row the same concept by the next vendor that drew it (concepts of one vendor are left out)."""
    by: dict[int, list[int]] = {}
    for row, concept in enumerate(items.concept.tolist()):
        by.setdefault(concept, []).append(row)
    out = []
    for row in rows.tolist():
        same = by[int(items.concept[row])]
        if len(same) > 1:
            out.append(same[(same.index(row) + 1) % len(same)])
    return torch.tensor(out)


@torch.no_grad()
def _texts(judge: Any, items: emoji.EmojiSet) -> tuple[Tensor, dict[int, int]]:
    """Embeddings of the captions of all concepts without skin tone, and the row of each concept."""
    table = EmbeddingTable.load(captions.table_path())
    kept = [i for i, c in enumerate(items.concepts) if c.tone is None]
    features = table.encode([items.concepts[i].caption for i in kept], captions.TOKENS)
    vector = captions.conditions(*features)["vector"]
    return judge.text(vector), {concept: row for row, concept in enumerate(kept)}


def main(name: str = "emoji-latent") -> None:
    """Score a bundled model, print the table and keep it in the model's card: ``python -m sfumato.zoo.score_emoji``."""
    import json

    from sfumato.files import write_atomically
    from sfumato.pipeline import find, load

    table, ratios, _ = score(load(name))
    path = find(name) / "pipeline.json"
    description = json.loads(path.read_text())
    command = f"python -m sfumato.zoo.score_emoji {name}"
    kept = ("name", "value", "low", "high", "n", "reference_n", "features", "reference", "interval", "note")
    rows = [{k: row[k] for k in kept} for row in table.rows]
    description["card"]["scores"] = {"command": command, "rows": rows, "over the yardstick": ratios}
    write_atomically(path, json.dumps(description, indent=1, ensure_ascii=False).encode())
    table.show()
    print({k: round(v, 3) for k, v in ratios.items()})


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
