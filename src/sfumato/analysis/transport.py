"""Steady transport of particles in a slab by discrete ordinates, and its acceleration by diffusion.

Another diffusion than the rest of the library's: here it is the limit of transport that preconditions its iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.core import InputError

SCHEMES = ("none", "consistent", "centred")


@dataclass(frozen=True)
class Slab:
    """mu dpsi/dx + total psi = (scattering phi + source) / 2 for |mu| <= 1, phi = sum_m w_m psi_m, vacuum outside.

    width, cells   of the slab: cells of equal size, diamond differences
    total          cross-section, one over the mean free path
    ratio          c = scattering / total, below 1
    angles         of the Gauss-Legendre quadrature, an even number; the weights add to 2
    """

    width: float = 100.0
    cells: int = 200
    total: float = 1.0
    ratio: float = 0.9
    angles: int = 8

    def __post_init__(self) -> None:
        if (
            min(self.width, self.total) <= 0
            or self.cells < 2
            or not 0 <= self.ratio < 1
            or self.angles < 2
            or self.angles % 2
        ):
            raise InputError(
                f"{self}: width and total above 0, two cells at least, 0 <= ratio < 1, an even number of angles"
            )

    @property
    def size(self) -> float:
        """Of a cell."""
        return self.width / self.cells

    def sweep(self, phi: Tensor, source: Tensor | float = 0.0) -> Tensor:
        """phi of the next source iteration, (cells,): every direction solved for the scattering of ``phi``."""
        points, weights = np.polynomial.legendre.leggauss(self.angles)
        half = self.angles // 2
        mu, w = torch.from_numpy(points[half:]), torch.from_numpy(weights[half:])
        emission = 0.5 * (self.ratio * self.total * phi + source)
        out = torch.zeros_like(phi)
        for backwards in (False, True):
            order = range(self.cells - 1, -1, -1) if backwards else range(self.cells)
            flux = torch.zeros_like(mu)
            for i in order:
                middle = (emission[i] * self.size + 2 * mu * flux) / (2 * mu + self.total * self.size)
                flux = 2 * middle - flux
                out[i] += w @ middle
        return out

    def correction(self, change: Tensor, scheme: str = "consistent") -> Tensor:
        """What diffusion adds to phi in each cell for a change phi^{l + 1/2} - phi^l, (cells,).

        -(f' / (3 total))' + absorption f = scattering change, with f / 2 = f' / (3 total) at the vacuum. 'consistent'
        solves it at the edges by the three-point scheme that follows from the diamond differences themselves; 'centred' is
        the usual one of cell centres, which differs from it where cells are thick.
        """
        if scheme not in SCHEMES[1:]:
            raise InputError(f"scheme = {scheme!r}: use 'consistent' or 'centred'")
        h, d = self.size, 1 / (3 * self.total)
        absorption, load = (1 - self.ratio) * self.total, self.ratio * self.total * change * self.size
        n = self.cells + (scheme == "consistent")
        matrix, right = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        if scheme == "consistent":
            for i in range(self.cells):  # a cell gives half of its balance to each of its edges
                for a, b in ((i, i + 1), (i + 1, i)):
                    matrix[a, a] += d / h + absorption * h / 4
                    matrix[a, b] += -d / h + absorption * h / 4
                    right[a] += load[i] / 2
            matrix[0, 0] += 0.5
            matrix[-1, -1] += 0.5
            edges = torch.linalg.solve(matrix, right)
            return 0.5 * (edges[1:] + edges[:-1])
        for i in range(self.cells):
            matrix[i, i] += absorption * h
            for j in (i - 1, i + 1):
                inside = 0 <= j < self.cells
                leak = d / h if inside else 1 / (2 + h / (2 * d))
                matrix[i, i] += leak
                if inside:
                    matrix[i, j] -= leak
        return torch.linalg.solve(matrix, load)

    def step(self, phi: Tensor, source: Tensor | float = 0.0, scheme: str = "none") -> Tensor:
        """One iteration: a sweep and, unless 'none', its correction."""
        swept = self.sweep(phi, source)
        return swept if scheme == "none" else swept + self.correction(swept - phi, scheme)

    def factor(self, scheme: str = "none", iterations: int = 30, seed: int = 0) -> float:
        """How much an iteration shrinks the error in the end: the spectral radius, from random beginnings without source.

        In an infinite slab it is c for source iteration and at most 0.2247 c under consistent acceleration.
        """
        phi = torch.rand(self.cells, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        before = phi
        for _ in range(iterations):
            before = phi / phi.norm()
            phi = self.step(before, 0.0, scheme)
        return float(phi.norm() / before.norm())

    def solve(
        self, source: Tensor | float = 1.0, scheme: str = "consistent", tolerance: float = 1e-10, most: int = 5000,
        told: Callable[[int, float], None] | None = None,
    ) -> tuple[Tensor, int]:  # fmt: skip
        """(phi (cells,), iterations) where the change is below ``tolerance`` times phi. Raises InputError where it is not within
        ``most`` iterations."""
        if most < 1:
            raise InputError(f"most = {most}: at least one iteration")
        phi = torch.zeros(self.cells, dtype=torch.float64)
        for it in range(1, most + 1):
            after = self.step(phi, source, scheme)
            change = float((after - phi).norm() / after.norm().clamp(min=1e-300))  # without a source phi is 0 at once
            if told is not None:
                told(it, change)
            phi = after
            if change < tolerance:
                return phi, it
            if not np.isfinite(change):
                break
        raise InputError(
            f"no convergence in {it} iterations of scheme {scheme!r}: cells of {self.size * self.total:g} free paths"
        )
