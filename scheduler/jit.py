"""The one place that knows numba: `compiled` turns a loop over arrays into machine code.

Without numba the same functions run as plain Python: slower, with equal results.

numba keeps machine code beside the source and looks only at the age of the file a function stands in. But a
function's code holds the constants and functions of other files too, so the kept code is named by all sources
of this package: after an upgrade none of the old is used.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

F = TypeVar("F", bound=Callable[..., object])

_SOURCES = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))

try:
    from numba import njit

    def compiled(function: F) -> F:
        """Compile on first use and keep the machine code beside the source where that is writable."""
        function.__qualname__ += f"_{_SOURCES:08x}"
        return cast(F, njit(cache=True, error_model="numpy")(function))

except ImportError:  # pragma: no cover - numba is in every extra that plans at speed

    def compiled(function: F) -> F:
        return function
