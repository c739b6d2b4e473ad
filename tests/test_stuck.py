"""What is known of calls into Triton that do not come back."""

from __future__ import annotations

import threading

from slos_serve.backend.stuck import PATIENCE, Crossings


def test_a_call_that_hangs_is_told_after_so_many_looks_and_not_before() -> None:
    told: list[str] = []
    crossings = Crossings(lambda: told.append("stuck"))
    with crossings:
        for _ in range(PATIENCE - 1):
            crossings.look()
        assert not told
        crossings.look()
    assert told == ["stuck"]
    crossings.look()
    assert told == ["stuck"]


def test_many_calls_that_come_back_are_none_that_hangs() -> None:
    """Also where every look meets one, on either of two threads, and where a call ends in an exception."""
    told: list[str] = []
    crossings = Crossings(lambda: told.append("stuck"))

    def busy() -> None:
        for _ in range(3 * PATIENCE):
            try:
                with crossings:
                    crossings.look()
                    raise OSError("the caller has gone")
            except OSError:
                pass

    thread = threading.Thread(target=busy)
    thread.start()
    thread.join()
    busy()
    assert not told


def test_a_hanging_call_is_told_although_other_threads_go_on() -> None:
    told = threading.Event()
    begun, end = threading.Event(), threading.Event()
    crossings = Crossings(told.set)

    def hang() -> None:
        with crossings:
            begun.set()
            end.wait()

    thread = threading.Thread(target=hang)
    thread.start()
    begun.wait()
    for _ in range(PATIENCE):
        with crossings:
            crossings.look()
    end.set()
    thread.join()
    assert told.is_set()
