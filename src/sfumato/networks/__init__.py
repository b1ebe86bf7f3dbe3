"""Networks: plain modules `forward(x, label, **cond) -> Tensor` that know nothing of diffusion.

Each keeps its constructor arguments in `.config` and its registered name in `.network_name`, so JSON and safetensors
rebuild it: `build(net.network_name, net.config).load_state_dict(...)`.
"""

from __future__ import annotations

from sfumato.networks.aligner import ConditionAligner
from sfumato.networks.autoencoder import AutoencoderKL, Moments, PatchDiscriminator
from sfumato.networks.base import as_network, build, configured, names, register
from sfumato.networks.critics import FeatureCritic, PairCritic
from sfumato.networks.dit import DiT
from sfumato.networks.encoders import (
    ConvEncoder,
    DualEncoder,
    FeatureExtractor,
    TextTower,
    ViTEncoder,
    perceptual_distance,
)
from sfumato.networks.flexdit import FlexDiT, inherit
from sfumato.networks.latent import LatentNetwork, with_latent
from sfumato.networks.mlp import MLP
from sfumato.networks.subspace import SubspaceScore
from sfumato.networks.text import EmbeddingTable, SentenceEncoder, TextFeatures
from sfumato.networks.unet import UNet

__all__ = [
    "MLP", "AutoencoderKL", "ConditionAligner", "ConvEncoder", "DiT", "DualEncoder", "EmbeddingTable", "FeatureCritic", "FeatureExtractor", "FlexDiT",
    "LatentNetwork", "Moments", "PairCritic", "PatchDiscriminator", "SentenceEncoder", "SubspaceScore", "TextFeatures", "TextTower", "UNet", "ViTEncoder",
    "as_network", "build", "configured", "inherit", "names", "perceptual_distance", "register", "with_latent",
]  # fmt: skip
