"""`slos-serve plan`: how many replicas a recorded trace needs to keep its promises, by the exam's own simulation.

The trace is played as it is, every session at its own time; sessions are dealt round robin. The fewest
replicas are found by doubling and bisection, which takes for granted that more replicas attain no less.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from slos_serve.scheduler.attainment import RULES, Rule

from .capacity import EXAMINED, Score, score
from .cells import check_targets, check_trace, known, load_profile, parse_targets, profiles, turns
from .examine import Cell, Scene
from .trace_file import read_trace

TARGETS: Final = (0.9, 0.95, 0.99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve plan`."""
    parser.add_argument("--trace", type=Path, required=True, help="CSV or CSV.gz; columns as for slos-serve exam")
    parser.add_argument("--gpu", required=True, help=f"with --model one of: {', '.join(profiles())}")
    parser.add_argument("--model", required=True, help="see --gpu")
    parser.add_argument("--slo", action="append", default=[], help="CLASS=TTFT/TPOT[/ANSWER_TPOT] in ms, TTFT also 5x")
    parser.add_argument("--slo-class", default="chatbot", help="class of rows that name none")
    parser.add_argument("--policy", default="slos_serve", help=f"who plans, one of: {', '.join(EXAMINED)}")
    parser.add_argument("--rule", default="strict", help=f"scoring rule, one of: {', '.join(RULES)}")
    parser.add_argument("--ttft-floor-ms", type=float, default=0.0, help="no TTFT SLO below this")
    parser.add_argument("--noise", type=float, default=0.05, help="relative sd of the iteration times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-replicas", type=int, default=256, help="give up beyond this many")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> int:
    """Find the replicas, show them, write the JSON."""
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json: no such folder: {args.json.parent}")
    if not 1 <= args.max_replicas <= 4096:
        raise ValueError(f"--max-replicas: must be in [1, 4096], got {args.max_replicas}")
    found = plan(args)
    for target, each in found["targets"].items():
        need = "more than " + str(args.max_replicas) if each is None else str(each["replicas"])
        share = f", attained {100 * each['attained']:.1f} %, {100 * each['by_tokens']:.1f} % by tokens" if each else ""
        print(f"{100 * float(target):g} % of {found['sessions']} sessions: {need} x {found['profile']}{share}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """The fewest replicas for each target, as JSON values. Raises ValueError naming what is wrong with the question."""
    known("policy", args.policy, EXAMINED)
    known("rule", args.rule, RULES)
    rule: Rule = args.rule
    profile, targets = load_profile(f"{args.gpu}-{args.model}"), parse_targets(args.slo)
    check_targets(targets, profile)
    check_trace(args.trace, profile, targets, args.slo_class)
    arrivals = read_trace(args.trace, args.slo_class)
    firsts, _ = turns(arrivals, profile, targets, args.ttft_floor_ms / 1000)
    span = max(arrivals[-1].at - arrivals[0].at, 1e-9)
    cell = Cell(args.trace.name, "trace", profile.name, args.policy, 1, args.seed, noise=args.noise, trace=args.trace)
    played: dict[int, tuple[dict[str, float], Score]] = {}

    def attain(replicas: int) -> tuple[dict[str, float], Score]:
        if replicas not in played:
            scene = Scene(replace(cell, replicas=replicas), profile, targets, 0.0, 1.0)
            tried = [
                (dict(each), score(firsts, scene.play(each, firsts), rate=len(firsts) / span, seconds=span, dropped=0))
                for each in scene.cell.examined().sweep
            ]
            played[replicas] = max(tried, key=lambda pair: pair[1].attainment[rule])
        return played[replicas]

    def enough(target: float, replicas: int) -> bool:
        return attain(replicas)[1].attainment[rule] >= target

    answers: dict[str, Any] = {}
    for target in TARGETS:
        need = fewest(partial(enough, target), args.max_replicas)
        answers[f"{target:g}"] = None if need is None else _answer(need, *attain(need), rule)
    return {
        "trace": str(args.trace),
        "profile": profile.name,
        "policy": args.policy,
        "rule": args.rule,
        "sessions": len(firsts),
        "sessions_per_second": len(firsts) / span,
        "targets": answers,
    }


def _answer(replicas: int, parameters: dict[str, float], found: Score, rule: Rule) -> dict[str, Any]:
    return {
        "replicas": replicas,
        "parameters": parameters,
        "attained": found.attainment[rule],
        "by_tokens": found.token_weighted,
        "by_length": list(found.by_length),
        "p99_time_between_tokens_s": found.p99_gap,
    }


def fewest(enough: Callable[[int], bool], most: int) -> int | None:
    """The least number up to `most` that is enough, if more is never less; None when there is none."""
    high = 1
    while not enough(high):
        if high >= most:
            return None
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
