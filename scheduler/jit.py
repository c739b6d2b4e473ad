"""The one place that knows numba here: `compiled` turns a loop over arrays into machine code.

Without numba the same functions run as plain Python: slower, with equal results.

numba keeps machine code beside the source and looks only at the age of the file a function stands in. But a
function's code holds the constants and functions of other files too, so the kept code is named by all sources
it may come from: after an upgrade none of the old is used.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., object])

try:
    from numba import njit
except ImportError:  # pragma: no cover - numba is in every extra that plans at speed
    njit = None


def compiler(sources: Iterable[Path], **options: Any) -> Callable[[F], F]:
    """A decorator that compiles on first use and keeps the machine code beside the function's source where that is
    writable, named by all `sources`; `options` are numba's."""
    name = f"_{zlib.crc32(b''.join(path.read_bytes() for path in sorted(sources))):08x}"

    def compiled(function: F) -> F:
        if njit is None:
            return function
        function.__qualname__ += name
        return cast(F, njit(cache=True, error_model="numpy", **options)(function))

    return compiled


compiled: Callable[[F], F] = compiler(Path(__file__).parent.glob("*.py"))
