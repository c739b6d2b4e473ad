"""`slos-serve probe`: does a running server still give tokens? For a liveness probe, where nothing else supervises.

Triton's own health endpoints stay green when an engine is dead. Ends with 0 when each of our models gives a token or
goes on computing, with 1 and the reason when one does not. Changes nothing.
"""

from __future__ import annotations

import argparse
import math

from .supervisor import Judge, Limits, probe_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve probe`."""
    parser.add_argument("--http", default="127.0.0.1:8000", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--metrics", default="127.0.0.1:8002", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--timeout", type=float, default=Limits().probe_timeout, metavar="S", help="for a token; default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Ask once. Raises ValueError for a time that is none."""
    if not (math.isfinite(args.timeout) and args.timeout > 0):
        raise ValueError(f"--timeout: expected seconds above 0, got {args.timeout}")
    found = probe_server(args.http, args.metrics, timeout=args.timeout)
    cause = Judge(failed_probes=1).cause(found)
    print(cause or f"alive{': busy, ' + found.detail if found.answer == 'failed' else ''}")
    return int(cause is not None)
