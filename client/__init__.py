"""What a user installs: the client of a slos_serve model, over gRPC and over HTTP.

The names below are loaded when first used, so that `client.wire` alone needs numpy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import SlosClient, Stream, generate
    from .routed import RoutedClient
    from .stream import Delta, Duplicated, Lost, Refused, Result, StreamError

__all__ = [
    "Delta",
    "Duplicated",
    "Lost",
    "Refused",
    "Result",
    "RoutedClient",
    "SlosClient",
    "Stream",
    "StreamError",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import client, routed, stream

    return next(getattr(module, name) for module in (client, routed, stream) if hasattr(module, name))
