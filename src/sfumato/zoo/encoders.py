"""The bundled image/text encoders, loaded by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import networks
from sfumato.core import InputError
from sfumato.evaluation.features import EXTRACTORS
from sfumato.files import bundled_models, write_atomically


def save_encoder(net: nn.Module, path: str | Path, card: dict[str, Any]) -> None:
    """Write ``encoder.json`` and ``model.safetensors`` (half precision)."""
    from safetensors.torch import save

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous().clone() for k, v in net.state_dict().items()}
    write_atomically(folder / "model.safetensors", save(weights))
    description = {"network": {"name": net.network_name, "config": net.config}, "card": card}
    write_atomically(folder / "encoder.json", json.dumps(description, indent=1).encode())


def load_encoder(name_or_path: str | Path) -> nn.Module:
    """A dual encoder in eval mode, by bundled name or folder: ``emoji-encoder`` or ``emoji-judge``."""
    from safetensors.torch import load_file

    known = bundled_models("encoder.json")
    folder = known.get(str(name_or_path), Path(name_or_path))
    if not (folder / "encoder.json").exists():
        raise InputError(
            f"no encoder {str(name_or_path)!r}: give a saved folder or one of {', '.join(known) or 'none'}"
        )
    d = json.loads((folder / "encoder.json").read_text())
    net = networks.build(d["network"]["name"], d["network"]["config"])
    net.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return net.eval()


@torch.no_grad()
def embed_images(encoder: nn.Module, images: Tensor, batch: int = 256) -> Tensor:
    """Embeddings of length 1 (N, d) of uint8 images (N, 3, H, W), which are averaged down to 32 pixels first."""
    factor = images.shape[-1] // 32
    if images.shape[-1] != images.shape[-2] or factor * 32 != images.shape[-1]:
        raise InputError(f"{tuple(images.shape[-2:])}: square images with a side that is a multiple of 32")
    out = []
    for part in images.split(batch):
        x = torch.nn.functional.avg_pool2d(part.float() / 127.5 - 1, factor) if factor > 1 else part.float() / 127.5 - 1
        out.append(encoder.image(x))  # type: ignore[operator]
    return torch.cat(out)


class EncoderFeatures:
    """A bundled dual encoder as a feature extractor: uint8 (B, 3, H, W) -> unit vectors (B, d), and texts into the same space.

    H = W a multiple of 32. Texts are those of the bundled captions, or any with the extra 'text'.
    """

    def __init__(self, name: str) -> None:
        self.name, self.encoder = name, load_encoder(name)

    def __call__(self, images: Tensor) -> Tensor:
        return embed_images(self.encoder, images)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(M, d) unit vectors."""
        from sfumato.conditioners import Text
        from sfumato.zoo import captions

        read = Text(captions.TOKENS, table=captions.TABLE)
        return self.encoder.text(read(len(texts), list(texts))["vector"])  # type: ignore[operator]


@EXTRACTORS.register("emoji-judge")
def emoji_judge() -> EncoderFeatures:
    """The encoder that no model was trained or guided with."""
    return EncoderFeatures("emoji-judge")
