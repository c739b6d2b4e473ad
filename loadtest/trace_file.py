"""Reads anyone's own trace, CSV or gzipped CSV, into arrivals; every complaint names file, line and field.

Columns: arrival_s, prompt_tokens, output_tokens, and optionally slo_class, reasoning_tokens (part of
output_tokens), session_id, round, tool_delay_s, reusable_prefix_tokens; others are ignored. Rows are in
order of arrival. The round 0 of a session arrives at its time; later rounds wait for the round before.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NoReturn

from .workload import Arrival

REQUIRED: Final = ("arrival_s", "prompt_tokens", "output_tokens")
OPTIONAL: Final = ("slo_class", "reasoning_tokens", "session_id", "round", "tool_delay_s", "reusable_prefix_tokens")
_GZIP_MAGIC: Final = b"\x1f\x8b"


class TraceError(ValueError):
    """A trace that cannot be used."""


def read_trace(path: Path, default_class: str = "chatbot", *, allow_ties: bool = False) -> list[Arrival]:
    """The arrivals of a trace file. `default_class` stands where slo_class is absent or empty.

    Two requests at exactly the same time usually mean that a trace was rounded or exported twice, so they
    are refused unless `allow_ties`; later rounds of a session may share times, for they wait anyway.
    Raises TraceError naming file, line and field, and OSError when there is no such file.
    """
    arrivals: list[Arrival] = []
    rounds: dict[str, int] = {}
    for line, row in rows(path):
        arrival = _Row(path, line, row).arrival(default_class)
        _check_order(path, line, arrivals, arrival, allow_ties)
        _check_round(path, line, rounds, arrival)
        arrivals.append(arrival)
    if not arrivals:
        raise TraceError(f"{path}: has no rows")
    return arrivals


def rows(path: Path) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    with path.open("rb") as raw:
        opened = gzip.open if raw.read(2) == _GZIP_MAGIC else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if reader.fieldnames is None:
                raise TraceError(f"{path}: the file is empty")
            missing = [name for name in REQUIRED if name not in reader.fieldnames]
            if missing:
                raise TraceError(f"{path}, line 1: no column {missing[0]}; found {', '.join(reader.fieldnames)}")
            for row in reader:
                yield reader.line_num, row
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: not a CSV file in UTF-8, plain or gzipped ({error})") from error


class _Row:
    """One row being read."""

    def __init__(self, path: Path, line: int, row: Mapping[str, str | None]) -> None:
        self._where = f"{path}, line {line}"
        self._row = row

    def arrival(self, default_class: str) -> Arrival:
        prompt, output = self._integer("prompt_tokens", 1), self._integer("output_tokens", 1)
        return Arrival(
            at=self._seconds("arrival_s"),
            slo_class=self._text("slo_class") or default_class,
            prompt_tokens=prompt,
            output_tokens=output,
            thinking_tokens=self._integer("reasoning_tokens", 0, output),
            session=self._text("session_id") or None,
            round=self._integer("round", 0),
            tool_delay=self._seconds("tool_delay_s"),
            reusable_prefix_tokens=self._integer("reusable_prefix_tokens", 0, prompt),
        )

    def _text(self, name: str) -> str:
        value = self._row.get(name)
        if value is None and name in self._row:
            self._fail(name, "is missing: the row is shorter than the header", value)
        return (value or "").strip()

    def _number(self, name: str) -> float:
        text = self._text(name)
        if not text and name in OPTIONAL:
            return 0.0
        try:
            return float(text)
        except ValueError:
            self._fail(name, "must be a number", text)

    def _seconds(self, name: str) -> float:
        number = self._number(name)
        if not (math.isfinite(number) and number >= 0):
            self._fail(name, "must be a number of seconds, 0 or more", self._row[name])
        return number

    def _integer(self, name: str, least: int, most: int | None = None) -> int:
        number = self._number(name)
        if not (number.is_integer() and number >= least):
            self._fail(name, f"must be a whole number of at least {least}", self._row[name])
        if most is not None and number > most:
            self._fail(name, f"must be at most {most}, what it is part of", self._row[name])
        return int(number)

    def _fail(self, name: str, problem: str, got: str | None) -> NoReturn:
        raise TraceError(f"{self._where}: {name}: {problem}, got {got!r}")


def _check_order(path: Path, line: int, before: list[Arrival], arrival: Arrival, allow_ties: bool) -> None:
    if not before:
        return
    last = before[-1].at
    if arrival.at < last:
        raise TraceError(f"{path}, line {line}: arrival_s: must not decrease, got {arrival.at} after {last}")
    if arrival.at == last and arrival.round == 0 and not allow_ties:
        raise TraceError(f"{path}, line {line}: arrival_s: duplicate time {arrival.at}, as in the row before")


def _check_round(path: Path, line: int, rounds: dict[str, int], arrival: Arrival) -> None:
    """Rounds of a session count 0, 1, 2, ...; a row without session is a round 0."""
    expected = 0 if arrival.session is None else rounds.get(arrival.session, 0)
    if arrival.round != expected:
        session = "without session_id" if arrival.session is None else f"of session {arrival.session!r}"
        raise TraceError(f"{path}, line {line}: round: must be {expected} {session}, got {arrival.round}")
    if arrival.session is not None:
        rounds[arrival.session] = expected + 1
