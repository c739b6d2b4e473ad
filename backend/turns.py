"""How long a thread's turns on a core are. Linux only, and never an error: elsewhere nothing changes.

Linux gives a core to a thread that wakes before one whose turns are longer, from 6.12 on and at equal priority
(`sched_attr.sched_runtime` of sched_setattr(2); earlier kernels leave it out of account). Shares of the core stay as
they are. A token passes half a dozen threads, each of which works for microseconds, and behind one that computes for
milliseconds each would wait for the end of its turn.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from typing import Final

LONG_SECONDS: Final = 0.02  # longer than most iterations; the default is about a millisecond
_CALL_NUMBER: Final = {"x86_64": 314, "aarch64": 274}  # of sched_setattr
_ATTRIBUTES: Final = "=IIQiIQQQ"  # size, policy, flags, nice, priority, runtime, deadline, period


def take_long_turns() -> bool:
    """The calling thread, which computes, lets others go first whenever they wake. False where it cannot be told."""
    number = _CALL_NUMBER.get(platform.machine())
    if platform.system() != "Linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    size = struct.calcsize(_ATTRIBUTES)
    attributes = struct.pack(_ATTRIBUTES, size, os.SCHED_OTHER, 0, nice, 0, int(LONG_SECONDS * 1e9), 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, attributes, 0) == 0)
