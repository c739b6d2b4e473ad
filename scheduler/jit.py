"""The one place that knows numba: `compiled` turns a loop over arrays into machine code.

Without numba the same functions run as plain Python: slower, with equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

F = TypeVar("F", bound=Callable[..., object])

try:
    from numba import njit

    def compiled(function: F) -> F:
        """Compile on first use and keep the machine code beside the source where that is writable."""
        return cast(F, njit(cache=True, error_model="numpy")(function))

except ImportError:  # pragma: no cover - numba is in every extra that plans at speed

    def compiled(function: F) -> F:
        return function
