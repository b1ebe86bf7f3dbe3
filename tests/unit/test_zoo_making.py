"""The makers of the bundled models: their batches are pure functions, and they never see what is held out."""

from __future__ import annotations

import pytest
import torch

from sfumato.core import InputError
from sfumato.zoo import captions, emoji, making, score_emoji
from sfumato.zoo.encoders import load_encoder, save_encoder
from sfumato.zoo.make_emoji import EmojiBatches, augment, encoder_network


@pytest.fixture(scope="module")
def items() -> emoji.EmojiSet:
    return emoji.load(8, split="train")


def test_no_kept_out_word_is_ever_heard_unless_it_is_a_caption(items):
    for caption, tags in zip(items.captions, items.tags, strict=True):
        said = captions.texts_of(caption, tags)
        assert said[0] == caption
        assert not any(word in text for text in said[1:] for word in captions.NEVER_HEARD)
    assert not any(word in caption for caption in items.captions for word in captions.NEVER_HEARD)


def test_batches_are_pure_functions_of_the_iteration(items, monkeypatch):
    n = len(items.captions)
    rows = captions.TextBank(
        torch.randn(n, 2, 4), torch.ones(n, 2, dtype=torch.bool), torch.randn(n, 4), [[i] for i in range(n)]
    )
    monkeypatch.setattr(captions, "bank", lambda _: rows)
    one, two = (EmojiBatches(items, items.images, 16, seed=3) for _ in range(2))
    for i in (7, 0, 7):
        a, b = one(i), two(i)
        assert torch.equal(a["x"], b["x"])
        assert torch.equal(a["cond"]["vector"], b["cond"]["vector"])
        chosen = one.rows(i)
        assert len(set(chosen.tolist())) == 16
        assert torch.equal(a["cond"]["vendor"], items.vendor[chosen])
        assert torch.equal(a["x"], items.images[chosen].float() / 127.5 - 1)
    assert not torch.equal(one(0)["x"], one(1)["x"])


def test_captions_are_chosen_as_often_as_said():
    bank = captions.TextBank(torch.empty(0), torch.empty(0), torch.empty(0), [[0, 1, 2], [3]])
    generator = torch.Generator().manual_seed(0)
    rows = bank.choose(torch.tensor([0, 1] * 2000), generator, caption=0.7)
    assert set(rows[1::2].tolist()) == {3}
    share = (rows[::2] == 0).double().mean()
    assert 0.66 < share < 0.74
    assert set(rows[::2].tolist()) == {0, 1, 2}


def test_augmentation_keeps_the_shape_and_is_decided_by_the_generator():
    x = torch.rand(5, 3, 16, 16) * 2 - 1
    a, b = (augment(x, torch.Generator().manual_seed(2)) for _ in range(2))
    assert a.shape == x.shape and torch.equal(a, b)
    assert not torch.equal(a, augment(x, torch.Generator().manual_seed(3)))


def test_a_saved_encoder_is_the_same_function_to_half_precision(tmp_path):
    net = encoder_network(0, "conv-encoder").eval()
    save_encoder(net, tmp_path, {"made by": "a test"})
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    assert torch.allclose(load_encoder(tmp_path).image(x), net.image(x), atol=5e-3)
    with pytest.raises(InputError, match="no encoder"):
        load_encoder("nobody")


def test_scores_ask_for_each_concept_once_and_compare_it_with_another_hand(items):
    rows = score_emoji.one_a_concept(items, 50, seed=1)
    assert len(set(items.concept[rows].tolist())) == 50
    other = score_emoji._other_vendor(items, rows)
    pairs = {int(items.concept[r]): int(r) for r in rows}
    for row in other.tolist():
        assert pairs[int(items.concept[row])] != row


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="no model 'x' is made here; there are: digits"):
        making.make("x", tmp_path)
