"""What the recipe of quantisation uses: the bundled digits, calibration sets, and the errors of quantised networks."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import sfumato as sf
from sfumato.acceleration import Calibration, denoised, noised, quantization, quantized
from sfumato.acceleration.calibration import told
from sfumato.core import Context, Streams, mix
from sfumato.denoisers.features import features
from sfumato.recipes._small import digits

N, ITEMS, STEPS, SEEDS = 160, 192, 50, 3
OURS, EVEN, NOISE, RAW = "own runs, normal times", "own runs, uniform times", "pure noise, t = 1", "images, t = 0.02"


class Bed:
    """The bundled digits, their runs from the same noise, and the error of a quantised network there."""

    def __init__(self, seed: int) -> None:
        self.seed, self.denoiser = seed, sf.load("digits").denoiser
        self.cond = {"y": torch.arange(N) % 10}
        self.full = self.run()

    @torch.no_grad()
    def run(self, denoiser: Any = None, seed: int = 1, solver: Any = "ddim", taps: Any = ()) -> Tensor:
        """Digits (N, 1, 8, 8)."""
        ctx = Context.of(N, mix(self.seed, seed), cond=self.cond, taps=tuple(taps))
        given = self.denoiser if denoiser is None else denoiser
        return sf.sample(given, solver=solver, grid="uniform", steps=STEPS, shape=(N, 1, 8, 8), ctx=ctx)

    def error(self, x: Tensor) -> float:
        """Root mean square difference from the full network's digits."""
        return float((x - self.full).square().mean().sqrt())

    def calibration(self, name: str, k: int) -> Calibration:
        """ITEMS items of one kind."""
        seed, x = mix(self.seed, 7, k), digits().x[:1198].reshape(-1, 1, 8, 8)
        cond: Any = {"y": torch.arange(ITEMS) % 10}
        if name in (OURS, EVEN):
            return denoised(self.denoiser, ITEMS, (1, 8, 8), cond=cond, times="normal" if name == OURS else "uniform", grid="uniform", steps=STEPS, seed=seed)  # fmt: skip
        if name == NOISE:
            noise = Streams.of(seed, ITEMS).normal(torch.empty(ITEMS, 1, 8, 8))
            return Calibration(noise, torch.ones(ITEMS), cond)
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed % 10**9))[:ITEMS]
        return told(noised(self.denoiser, x[rows], cond={"y": digits().labels[rows]}, times=0.0, seed=seed), 1 / STEPS)

    def quantised(self, bits: tuple[int, int], calibration: Calibration, **options: Any) -> Any:
        """The network with (weights, activations) bits."""
        return quantized(self.denoiser, calibration, weights=bits[0], activations=bits[1], **options)


def sizes(denoiser: Any, full: Any) -> float:
    """Bytes of the packed file over those of the float32 file."""
    from safetensors.torch import save_file

    with TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.safetensors"
        save_file({k: v.contiguous() for k, v in full.net.state_dict().items()}, whole)
        return quantization.save(denoiser, Path(folder) / "packed.safetensors") / whole.stat().st_size


def widths(bed: Bed, calibration: Calibration, path: str) -> list[tuple[float, float]]:
    """(t, 99.9 % quantile of |activation|) of one submodule over the run."""
    order, found = calibration.t.argsort(), []
    for rows in order.split(ITEMS // 8):
        part = calibration.select(rows)
        ctx = Context(cond=part.cond, batch=len(part))
        with torch.no_grad():
            _, seen = features(bed.denoiser, part.x, part.t, ctx, [path])
        found.append((float(part.t.mean()), float(seen[path].abs().flatten().quantile(0.999))))
    return found
