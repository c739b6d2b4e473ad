"""Runs a kernel's independent units of work on as many threads as PyTorch uses.

Kernels hold no lock and write apart, so that a unit's result does not depend on who computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Final

import torch

_ENOUGH: Final = 1 << 20  # operations for which waking a thread pays: about 30 microseconds


def run(kernel: Callable[..., None], units: int, operations: int, *args: Any) -> None:
    """Call `kernel(*args, first, last)` for shares of `range(units)` that cost `operations` in all."""
    count = 1 if is_alone(operations) else min(torch.get_num_threads(), units, 1 + operations // _ENOUGH)
    if count <= 1:
        kernel(*args, 0, units)
        return
    ends = [units * part // count for part in range(count + 1)]
    others = [_threads().submit(kernel, *args, ends[part], ends[part + 1]) for part in range(1, count)]
    kernel(*args, 0, ends[1])
    for other in others:
        other.result()


def is_alone(operations: int) -> bool:
    """Whether `run` takes one thread for so many operations."""
    return operations < _ENOUGH or torch.get_num_threads() == 1


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernel")
