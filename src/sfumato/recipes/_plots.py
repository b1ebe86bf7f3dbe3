"""Pictures of evidence: figures without a display or global state, as PIL images."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

INK, PALE, ACCENT, SECOND, THIRD = "#22303c", "#d5dbe0", "#d1495b", "#2e86ab", "#edae49"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.edgecolor": PALE,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "axes.prop_cycle": None,
}  # fmt: skip


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    return made


def style() -> Any:
    """A context in which axes are made with the style of all evidence."""
    from cycler import cycler
    from matplotlib import rc_context

    settings: Any = {**STYLE, "axes.prop_cycle": cycler(color=[SECOND, ACCENT, THIRD, INK])}
    return rc_context(settings)


def image(made: Any, dpi: int = 110) -> Any:
    """The figure as a PIL image."""
    from PIL import Image

    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")


def sheet(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """uint8 (N, C, H, W) side by side, ``columns`` a row (default: nearly square): (H', W', C), white between them.

    For ``ax.imshow``; a single channel is drawn with ``cmap="gray", vmin=0, vmax=255``.
    """
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    paper = images.new_full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255)
    for i, picture in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        paper[top : top + height, left : left + width] = picture.permute(1, 2, 0)
    return paper


def show(ax: Any, images: Tensor, columns: int | None = None, gap: int = 2, **labels: Any) -> None:
    """A sheet of pictures on an axis without ticks or frame; ``labels`` as in ``ax.set``."""
    ax.imshow(sheet(images, columns, gap).expand(-1, -1, 3), interpolation="nearest")
    ax.set(xticks=[], yticks=[], **labels)
    ax.spines[:].set_visible(False)
