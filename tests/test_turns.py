"""The engine thread's turns: asked for where Linux knows them, with everything else as it was."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading

import pytest

from slos_serve.backend.turns import LONG_SECONDS, take_long_turns

GETATTR = {"x86_64": 315, "aarch64": 275}


def turn_seconds() -> float:
    """Of the calling thread, as the kernel tells; 0 where it does not."""
    buffer = ctypes.create_string_buffer(56)
    if ctypes.CDLL(None).syscall(GETATTR[platform.machine()], 0, buffer, 56, 0) != 0:
        return 0.0
    return float(struct.unpack_from("=Q", buffer.raw, 24)[0]) / 1e9


def in_a_thread(found: list[object]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 3)
    found += [take_long_turns(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)]
    found.append(turn_seconds())


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() not in GETATTR, reason="Linux tells turns")
def test_a_thread_takes_long_turns_at_its_own_priority_and_no_other_thread_does() -> None:
    """Its niceness and policy stay, and so do the turns of the thread that started it."""
    before = turn_seconds()
    found: list[object] = []
    thread = threading.Thread(target=in_a_thread, args=(found,))
    thread.start()
    thread.join()
    taken, nice, policy, turn = found
    assert (nice, policy) == (3, os.SCHED_OTHER)
    assert turn_seconds() == before
    if not taken or not before:
        pytest.skip("this kernel knows of no turns")
    assert turn == pytest.approx(LONG_SECONDS)
