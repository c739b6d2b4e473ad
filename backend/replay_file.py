"""Recordings as files: written by a server whose settings say `record`, checked by `slos-serve replay FILE`.

Each start of the server appends its recording to the file. Every line is written at once, so a crashed
server's recording ends with what led to the crash. A file that cannot be written stops the recording,
never the server.
"""

from __future__ import annotations

import argparse
import gzip
import logging
from pathlib import Path
from typing import TextIO

from slos_serve.scheduler import POLICIES
from slos_serve.scheduler.recording import Difference, Recording, read, replay

log = logging.getLogger(__name__)


class Tape:
    """Appends lines to a file. Raises OSError when it cannot be opened, and nothing later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = path.open("a", buffering=1, encoding="utf-8")

    def write(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line)
        except OSError as error:
            log.error("%s cannot be written (%s): nothing more is recorded", self._path, error)
            self._file = None


def read_recordings(path: Path) -> list[Recording]:
    """The recordings in a file, gzipped or not. Raises ValueError naming file and line, or OSError."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        try:
            recordings = read(file)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from error
    if not recordings:
        raise ValueError(f"{path}: there is no recording in it")
    return recordings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help='what a server with the setting "record" wrote (.gz: gzipped)')


def run(args: argparse.Namespace) -> int:
    """Replay every recording of the file: 0 when all plans are equal, 1 when one differs."""
    differs = 0
    for recording in read_recordings(args.file):
        header = recording.header
        if header.policy not in POLICIES:
            raise ValueError(f"{args.file}: policy: must be one of {', '.join(POLICIES)}, got {header.policy!r}")
        difference = replay(recording, POLICIES[header.policy](header.capabilities, header.perf))
        story = f"{header.policy}: {recording.plans} plans for {len(recording.requests)} requests"
        print(f"{story}, " + ("all equal" if difference is None else _told(difference)))
        differs |= difference is not None
    return int(differs)


def _told(difference: Difference) -> str:
    return (
        f"the replay differs at plan {difference.index}, second {difference.now!r}\n"
        f"  recorded {difference.recorded}\n  replayed {difference.replayed}"
    )
