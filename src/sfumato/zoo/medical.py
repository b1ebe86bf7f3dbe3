"""Two brains by magnetic resonance, and 32-pixel patches of them: Colin27 (learned from) and ICBM152 (unseen).

Both are T1-weighted, without the skull, and come inside packages: Colin27, the average of 27 scans of one man, in the Debian
package ``mricron-data``; ICBM152, the symmetric average of 152 young adults, in the Python package ``nilearn``, of which only
the file is read. They are averaged here to voxels of 2 mm.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core import mix
from sfumato.core.errors import InputError, MissingExtra, UnknownName
from sfumato.files import cache_folder
from sfumato.zoo.packages import check, new_folder, run
from sfumato.zoo.sets import MissingDataset

SIDE, FILLED = 32, 0.5  # pixels a side; the least share of a patch that is brain
MNI = "Made by the Montreal Neurological Institute, McGill University; the package states its terms of use."


@dataclass(frozen=True)
class Volume:
    """A scan inside a package: ``inside`` is its path there, ``credit`` what to state when it is shown."""

    what: str
    package: str
    command: str
    inside: str
    sha256: str
    credit: str


VOLUMES = {
    "colin27": Volume(
        "T1 of one man, the average of 27 scans, 1 mm, without the skull", "apt mricron-data",
        "apt-get install mricron-data", "/usr/share/mricron/templates/ch2bet.nii.gz",
        "592a2d20abdf36eefcb540ca8958428040edffc1bc1a18ba1dcfbabac77c5dd1",
        f"Holmes et al., 1998, Enhancement of MR Images Using Registration for Signal Averaging. {MNI}",
    ),
    "icbm152": Volume(
        "T1, the symmetric average of 152 adults (2009a), 1 mm, without the skull", "PyPI nilearn 0.14.1",
        "pip install nilearn", "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
        f"Fonov et al., 2011, Unbiased Average Age-Appropriate Atlases for Pediatric Studies. {MNI}",
    ),
}  # fmt: skip


def about(name: str) -> Volume:
    """Origin and licence of a scan. UnknownName lists those that there are."""
    if name not in VOLUMES:
        raise UnknownName(f"no scan {name!r}: choose from {', '.join(VOLUMES)}")
    return VOLUMES[name]


def locate(name: str) -> Path:
    """The file of a scan on this machine, checked; MissingDataset says which package brings it."""
    scan = about(name)
    for place in (*_installed(scan), cache_folder() / "medical" / Path(scan.inside).name):
        if place.is_file():
            return check(place, scan.sha256)
    fetch_it = (
        " or `python -m sfumato.zoo.medical`, which keeps it in the cache" if scan.package.startswith("apt") else ""
    )
    raise MissingDataset(f"{name} is not on this machine; it comes from {scan.package}: run `{scan.command}`{fetch_it}")


def fetch() -> Path:
    """Bring Colin27 out of its Debian package into the cache, without installing it: needs apt-get and dpkg-deb."""
    scan, need = VOLUMES["colin27"], "this scan comes as a package of Debian and Ubuntu"
    with new_folder(cache_folder() / "medical") as folder, tempfile.TemporaryDirectory(dir=folder.parent) as work:
        run(["apt-get", "download", "mricron-data"], Path(work), need)
        run(["dpkg-deb", "-x", next(Path(work).glob("*.deb")).name, "."], Path(work), need)
        os.replace(check(Path(work) / scan.inside.lstrip("/"), scan.sha256), folder / Path(scan.inside).name)
    return locate("colin27")


def _installed(scan: Volume) -> list[Path]:
    if scan.inside.startswith("/"):
        return [Path(scan.inside)]
    spec = find_spec(scan.package.split()[1])
    return [Path(place, scan.inside) for place in (spec.submodule_search_locations or [])] if spec else []


@cache
def volume(name: str) -> Tensor:
    """A scan (X, Y, Z) at 2 mm, float32: 0 is air, 1 the 99.5th percentile of the voxels that are not 0.

    Raises MissingDataset where the scan is absent, MissingExtra without nibabel.
    """
    path = locate(name)
    try:
        import nibabel
    except ImportError as error:
        raise MissingExtra("nibabel", extra="medical") from error
    voxels = torch.tensor(nibabel.load(path).get_fdata(), dtype=torch.float32)  # type: ignore[attr-defined]
    bright = voxels[voxels > 0].flatten().kthvalue(int(0.995 * int((voxels > 0).sum()))).values
    return F.avg_pool3d(voxels[None, None], 2)[0, 0] / bright


@cache
def _axial(name: str) -> tuple[Tensor, Tensor]:
    """The axial slices (N, H, W), front up, and the corners (M, 3) of patches that are brain enough."""
    slices = volume(name).permute(2, 1, 0).flip(1).contiguous()
    share = F.avg_pool2d((slices > 0.05).float()[:, None], SIDE, stride=1)[:, 0]
    return slices, (share >= FILLED).nonzero()


class Patches:
    """Iteration i -> {"x": patches (B, 1, 32, 32)}, about [-1, 1]: a pure function of (seed, i).

    Pieces of axial slices anywhere in the brain, at least half brain each. ``augment`` mirrors half of them left-right and
    varies contrast: v -> gain v^gamma with gain in [0.9, 1.1] and gamma in [0.8, 1.25], a number of each a patch.
    """

    def __init__(self, name: str, size: int, seed: int = 0, augment: bool = True) -> None:
        if size < 1:
            raise InputError(f"size = {size}: a batch has at least 1 patch")
        about(name)
        self.name, self.size, self.seed, self.augment = name, size, seed, augment

    def __call__(self, i: int) -> Mapping[str, Any]:
        generator = torch.Generator().manual_seed(mix(self.seed, i) & 0xFFFFFFFF)
        number = torch.rand(self.size, 4, generator=generator, dtype=torch.float64)
        out = torch.stack([self._one(*row) for row in number.tolist()])
        return {"x": (2 * out - 1)[:, None]}

    def _one(self, place: float, mirror: float, gain: float, gamma: float) -> Tensor:
        slices, corners = _axial(self.name)
        k, y, x = corners[int(place * len(corners))].tolist()
        patch = slices[k, y : y + SIDE, x : x + SIDE]
        if not self.augment:
            return patch
        patch = patch.flip(1) if mirror < 0.5 else patch
        return (0.9 + 0.2 * gain) * patch ** (0.8 * (1.25 / 0.8) ** gamma)


def patches(name: str, n: int, seed: int = 0, augment: bool = False) -> Tensor:
    """n patches (n, 1, 32, 32) of a scan, drawn by ``seed``; as they are unless ``augment``."""
    return Patches(name, n, seed, augment)(0)["x"]  # type: ignore[no-any-return]


def lesions(x: Tensor, contrasts: Sequence[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Patches (n, 1, 32, 32) with one false lesion each, and where it is, bool (n, 1, 32, 32).

    A blob of random shape, r(theta) = r0 (1 + sum_k a_k cos(k theta + phi_k)) with r0 in [2.5, 5] pixels, brighter or darker
    than what it lies on by the contrasts in turn (in units of the patches), in the brain and off the border.
    """
    if not contrasts or x.ndim != 4 or x.shape[1] != 1:
        raise InputError(f"patches (n, 1, H, W) and at least one contrast, not {tuple(x.shape)} and {contrasts}")
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=x.dtype) for n in x.shape[-2:]), indexing="ij")
    harmonics, blobs = torch.arange(2.0, 5.0).to(x), []
    for i, patch in enumerate(x[:, 0]):
        generator = torch.Generator().manual_seed(mix(seed, i) & 0xFFFFFFFF)
        u = torch.rand(9, generator=generator, dtype=x.dtype)
        inside = torch.zeros_like(patch, dtype=torch.bool)
        inside[5:-5, 5:-5] = patch[5:-5, 5:-5] > -0.5
        if not inside.any():
            raise InputError(f"patch {i} has no brain off its border to put a lesion in")
        places = inside.nonzero()
        down, right = (p - c for p, c in zip((rows, columns), places[int(u[0] * len(places))], strict=True))
        wave = (u[1:4] / 4 * torch.cos(harmonics * torch.atan2(down, right)[..., None] + 2 * torch.pi * u[4:7])).sum(-1)
        edge = (2.5 + 2.5 * u[7]) * (1 + wave) - (down**2 + right**2).sqrt()
        blobs.append(
            torch.stack([torch.sigmoid(2 * edge) * (1 if u[8] < 0.5 else -1) * contrasts[i % len(contrasts)], edge])
        )
    added, edges = torch.stack(blobs).split(1, 1)
    return (x + added).clamp(min=-1), edges > 0


def auroc(heat: Tensor, where: Tensor) -> float:
    """How well a heat map finds what is marked: the area under the receiver operating characteristic over all pixels."""
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise MissingExtra("scikit-learn", extra="science") from error
    return float(roc_auc_score(where.flatten().cpu(), heat.flatten().cpu()))


if __name__ == "__main__":
    print(fetch())
