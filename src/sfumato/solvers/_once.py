"""A denoiser that answers the question it was asked before without asking again."""

from __future__ import annotations

from typing import Any

from sfumato.core import Context, Denoiser, Wrapper


class Once(Wrapper):
    """Keeps the belief at the states given to it, by identity, while one step is taken several ways.

    ``asked`` counts the calls that went through. It lives for one step and one context: make a new one for the next.
    """

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.asked = 0
        self._known: list[tuple[Any, Any, Any]] = []

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        for state, time, belief in self._known:
            if state is x and time is t:
                return belief
        belief = self.inner(x, t, ctx)
        self.asked += 1
        self._known.append((x, t, belief))
        return belief
