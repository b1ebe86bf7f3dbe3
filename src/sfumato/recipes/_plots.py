"""Pictures of evidence: figures without a display or global state, as PIL images."""

from __future__ import annotations

import io
from typing import Any

INK, PALE, ACCENT, SECOND, THIRD = "#22303c", "#d5dbe0", "#d1495b", "#2e86ab", "#edae49"
STYLE = {
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

    return rc_context({**STYLE, "axes.prop_cycle": cycler(color=[SECOND, ACCENT, THIRD, INK])})


def image(made: Any, dpi: int = 110) -> Any:
    """The figure as a PIL image."""
    from PIL import Image

    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")
