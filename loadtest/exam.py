"""`slos-serve exam`: how many requests per second each policy serves within its SLOs, in virtual time.

One cell is a workload under arrivals on a profile with a policy and replicas, from a seed; lists make a
matrix. Results are equal for equal arguments on any machine with the same numpy, except for the planner's
real time. Results are written as one JSON file, whole or not at all, after each cell; with `--resume`, `--all`
or `--study` cells that are already in it are not played again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from slos_serve.scheduler.attainment import RULES

from .burst import burst, burst_table
from .capacity import EXAMINED
from .cells import ARRIVALS, WORLDS, known, profiles
from .examine import HEADLINE, Cell, results, scene
from .settings import ABLATIONS, LENGTHS, SETTINGS
from .workload import WORKLOADS

ONE: Final[Mapping[str, str]] = {
    "workload": "chatbot",
    "arrivals": "bursts",
    "profile": "a100-llama-3-8b",
    "policy": "slos_serve",
    "replicas": "1",
    "ttft_floor_ms": "0",
    "setting": "",
    "noise": "0.05",
    "acceptance": "0",
    "target": "0.9,0.95,0.99",
    "rule": ",".join(RULES),
}
_EVERYONE: Final = {
    **ONE,
    "policy": ",".join(name for name in EXAMINED if name != "distserve"),
    "workload": ",".join(WORKLOADS),
}
_SPLIT: Final = {"policy": "distserve", "target": "0.9", "rule": HEADLINE}  # slow to simulate
# What is not given takes these values; each part is a product of its own.
MATRIX: Final[Sequence[Mapping[str, str]]] = (
    {**_EVERYONE, "arrivals": "bursts,poisson", "profile": "a100-llama-3-8b,a100-opt-13b,h100-llama-3-8b"},
    {**_EVERYONE, **_SPLIT},
    {**_EVERYONE, "ttft_floor_ms": "250"},
    {**_EVERYONE, "arrivals": "azure_code", "workload": "coding,mixed"},
    {**_EVERYONE, "arrivals": "azure_chat", "workload": "chatbot"},
)
_OURS: Final = {**ONE, "target": "0.9", "rule": HEADLINE, "workload": "chatbot,coding,mixed,reasoning"}
_OPT: Final = "a100-opt-13b,a100-40gb-opt-13b"  # where KV memory binds
ACCEPTANCE: Final = "0.7"  # of the studies' draft model
_GUESSING: Final = {**_OURS, "workload": "chatbot,mixed", "acceptance": ACCEPTANCE}
_BOTH_MODELS: Final = "a100-llama-3-8b,a100-opt-13b"
STUDIES: Final[Mapping[str, Sequence[Mapping[str, str]]]] = {
    "ablation": ({**_OURS, "profile": _BOTH_MODELS, "setting": ",".join(["", *ABLATIONS])},),
    "lengths": ({**_OURS, "workload": "chatbot,mixed", "profile": _BOTH_MODELS, "setting": ",".join(LENGTHS)},),
    "scaling": ({**_OURS, "workload": "coding,mixed", "policy": "slos_serve,sarathi", "replicas": "1,2,4,8"},),
    "equal_gpus": ({**_OURS, "workload": "coding,mixed", "policy": ",".join(EXAMINED), "replicas": "12"},),
    "speculation": tuple(
        {**_GUESSING, "profile": _OPT, "policy": policy, "acceptance": acceptance}
        for policy, acceptance in (("slos_serve,slos_serve_paper", ACCEPTANCE), (",".join(EXAMINED), "0"))
    ),
    "burst": ({**_OURS, "workload": "coding,mixed", "policy": "slos_serve,qoserve,vllm,sarathi"},),
    # What a capacity would be in a world that differs in one thing.
    "limits": (
        *(
            {**_OURS, "workload": "chatbot,coding,mixed,tool_calling", "profile": profile, **change}
            for profile, change in (
                ("a100-llama-3-8b,a100-llama-3-8b-double-kv", {}),
                ("a100-llama-3-8b", {"noise": "0"}),
                ("a100-llama-3-8b", {"setting": "lengths_exact"}),
                ("a100-llama-3-8b", {"setting": "lead_whole"}),
            )
        ),
        *(
            {**_GUESSING, "profile": profile, **change}
            for profile, change in (
                ("a100-opt-13b,a100-opt-13b-double-kv,a100-opt-13b-free-drafts", {}),
                ("a100-opt-13b", {"noise": "0"}),
                ("a100-opt-13b", {"setting": "lengths_exact"}),
                ("a100-opt-13b", {"acceptance": "0.9"}),
            )
        ),
    ),
    "paper": (
        {
            **_EVERYONE,
            "policy": "slos_serve,slos_serve_paper,vllm,sarathi,distserve",
            "workload": "chatbot,coding,summarization,mixed,tool_calling,reasoning",
            "arrivals": "poisson,bursts",
            "profile": "a100-opt-13b-linear",
            "target": "0.9",
            "rule": "blocks",
        },
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve exam`."""
    lists = {
        "workload": (WORKLOADS, "what is asked"),
        "arrivals": (ARRIVALS, "when it is asked"),
        "profile": (profiles(), f"the time model, also with {', '.join(WORLDS)} behind it"),
        "policy": (EXAMINED, "who plans"),
    }
    for name, (names, help_text) in lists.items():
        parser.add_argument(f"--{name}", help=f"{help_text}, a comma-separated list of: {', '.join(names)}")
    parser.add_argument("--trace", type=Path, help="a trace file instead of workload and arrivals (CSV or CSV.gz)")
    parser.add_argument("--replicas", help="how many, a list")
    parser.add_argument("--seed", default="0", help="a list")
    parser.add_argument(
        "--setting", help=f"parts of slos_serve changed, a list of: {', '.join(filter(None, SETTINGS))}"
    )
    parser.add_argument("--ttft-floor-ms", help="no TTFT SLO below this, a list; 0: the pure rule")
    parser.add_argument("--rate", help="sessions per second for all replicas, a list; without: search the capacity")
    parser.add_argument("--target", help="shares of sessions that must attain, a list; first: headline")
    parser.add_argument("--rule", help=f"scoring rules for the capacity, a list of {','.join(RULES)}")
    parser.add_argument("--noise", help="relative sd of the iteration times, a list")
    parser.add_argument("--requests", type=int, default=600, help="at least so many sessions per run")
    parser.add_argument("--burst-period", type=float, default=60.0, help="seconds from one burst to the next")
    parser.add_argument("--slo", action="append", default=[], help="CLASS=TTFT/TPOT[/ANSWER_TPOT] in ms, TTFT also 5x")
    parser.add_argument("--acceptance", help="share of a draft model's guesses that are right; 0: no draft model")
    parser.add_argument(
        "--prefix-reuse", action="store_true", help="what a session's round repeats of those before it is cached"
    )
    parser.add_argument("--untuned", action="store_true", help="baselines as they come, nothing swept but ratios")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--all", action="store_true", help="the full matrix, resumable: what is not given varies")
    several.add_argument("--study", choices=STUDIES, help="the cells of one study instead")
    parser.add_argument("--resume", action="store_true", help="keep the cells that are already in the JSON file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes for several cells")
    parser.add_argument("--json", type=Path, help="write the results here")


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Every combination that was asked for, once, checked. Raises ValueError naming the option."""
    if args.trace is not None and (args.workload or args.arrivals):
        raise ValueError("--trace: brings its own workload and arrivals, do not give --workload or --arrivals")
    if args.requests < 10:
        raise ValueError(f"--requests: must be at least 10, got {args.requests}")
    parts = MATRIX if args.all else STUDIES[args.study] if args.study else (ONE,)
    cells = list(dict.fromkeys(cell for part in parts for cell in _part(args, part)))
    for cell in cells:
        scene(cell)
    return cells


def _part(args: argparse.Namespace, defaults: Mapping[str, str]) -> Iterator[Cell]:
    """The product of what was given, and of the defaults elsewhere."""
    chosen = {name: given if (given := getattr(args, name)) is not None else defaults[name] for name in defaults}
    if args.trace is not None:
        chosen |= {"workload": args.trace.name, "arrivals": "trace"}
    else:
        for name in _names(chosen["arrivals"]):
            known("arrivals", name, ARRIVALS)
    targets = tuple(_numbers("target", chosen["target"], 0.01, 1.0))
    rules = tuple(rule for rule in RULES if rule in _known_rules(chosen["rule"]))
    rates: Sequence[float | None] = [None] if args.rate is None else _numbers("rate", args.rate, 1e-6, 1e6)
    acceptance = _numbers("acceptance", chosen["acceptance"], 0, 1)[0]
    burst_period = _numbers("burst-period", str(args.burst_period), 1, 1e6)[0]
    for workload, arrivals, profile, policy, setting, replicas, seed, floor, noise, rate in itertools.product(
        _names(chosen["workload"]),
        _names(chosen["arrivals"]),
        _names(chosen["profile"]),
        _names(chosen["policy"]),
        [name.strip() for name in chosen["setting"].split(",")],
        _numbers("replicas", chosen["replicas"], 1, 1024, whole=True),
        _numbers("seed", args.seed, 0, 2**31, whole=True),
        _numbers("ttft-floor-ms", chosen["ttft_floor_ms"], 0, 1e6),
        _numbers("noise", chosen["noise"], 0, 1),
        rates,
    ):
        yield Cell(
            workload=workload,
            arrivals=arrivals,
            profile=profile,
            policy=policy,
            replicas=int(replicas),
            seed=int(seed),
            ttft_floor_ms=floor,
            noise=noise,
            rate=rate,
            targets=targets,
            rules=rules,
            slos=tuple(args.slo),
            trace=args.trace,
            min_requests=args.requests,
            burst_period=burst_period,
            setting=setting,
            acceptance=acceptance,
            prefix_reuse=args.prefix_reuse,
            untuned=args.untuned or args.study == "paper",
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _known_rules(text: str) -> list[str]:
    names = _names(text)
    for name in names:
        known("rule", name, RULES)
    return names


def _numbers(option: str, text: str, low: float, high: float, *, whole: bool = False) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{option}: must be numbers separated by commas, got {text!r}") from None
    for value in values:
        if not low <= value <= high or (whole and not value.is_integer()):
            kind = "whole numbers" if whole else "numbers"
            raise ValueError(f"--{option}: must be {kind} in [{low:g}, {high:g}], got {text!r}")
    return values


def run(args: argparse.Namespace) -> int:
    """Play the cells, show the table, write the JSON."""
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json: no such folder: {args.json.parent}")
    cells = cells_of(args)
    if args.study == "burst":
        return _bursts(cells, args)
    done = _earlier(args.json, cells) if args.resume or args.all or args.study else []
    have = [{name: result[name] for name in cells[0].about()} for result in done]
    left = [cell for cell in cells if cell.about() not in have]
    started = time.monotonic()
    for result in results(left, args.jobs):
        done.append(result)
        if args.json is not None:
            write_json(args.json, _in_order(done, cells))
        _progress(len(done), len(cells), time.monotonic() - started)
    if args.json is not None and not left:
        write_json(args.json, _in_order(done, cells))
    print(table(_in_order(done, cells)))
    return 0


def _bursts(cells: Sequence[Cell], args: argparse.Namespace) -> int:
    """The burst experiment for each workload and profile, all policies together."""
    found = []
    for cell in dict.fromkeys(replace(cell, policy="slos_serve") for cell in cells):
        of_cell = [each.policy for each in cells if replace(each, policy="slos_serve") == cell]
        found.append(burst(cell, of_cell))
        if args.json is not None:
            write_json(args.json, [], bursts=found)
        print(burst_table(found[-1]), flush=True)
    return 0


def write_json(path: Path, cells: Sequence[Mapping[str, Any]], **others: Any) -> None:
    """Replace the file as a whole."""
    text = json.dumps({"cells": list(cells), **others}, indent=1) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _earlier(path: Path | None, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Results of these cells that the file already holds."""
    if path is None or not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of exam results ({error!r})") from error
    wanted = [cell.about() for cell in cells]
    return [result for result in stored if {name: result.get(name) for name in wanted[0]} in wanted]


def _in_order(done: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    order = [cell.about() for cell in cells]
    return sorted(done, key=lambda result: order.index({name: result[name] for name in order[0]}))


def _progress(done: int, total: int, seconds: float) -> None:
    if total > 1:
        filled = 30 * done // total
        line = f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} cells, {seconds:.0f} s"
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(line, end=end, file=sys.stderr, flush=True)


_HEADER: Final = (
    "workload", "arrivals", "profile", "policy", "parameters or setting", "replicas", "seed", "floor ms",
    "req/s per GPU", "bound", "strict", "blocks", "mean", "by tokens", "sessions", "planner ms p50/p99",
)  # fmt: skip


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """The results as text: a line per cell; capacities at each target, attainment at the first of them."""
    lines = [_HEADER, *(_line(result) for result in done)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def told(result: Mapping[str, Any]) -> str:
    """What sets a cell apart beside its names: the parameters found best, or the setting; drafts; other noise."""
    words = [f"{name}={value:g}" for name, value in (result["parameters"] or {}).items()]
    words = words or [result["setting"]]
    words += [f"drafts {result['acceptance']:g}"] if result["acceptance"] else []
    words += [f"noise {result['noise']:g}"] if result["noise"] != float(ONE["noise"]) else []
    return " ".join(filter(None, words))


def _line(result: Mapping[str, Any]) -> tuple[str, ...]:
    about = [str(result[name]) for name in ("workload", "arrivals", "profile", "policy")]
    where = [told(result) or "-", str(result["replicas"]), str(result["seed"]), f"{result['ttft_floor_ms']:g}"]
    if "attainment" not in result:
        return (*about, *where, "0", _bound_text(result), *["-"] * 6)
    shares = [f"{100 * result['attainment'][rule]:.1f} %" for rule in RULES]
    planner = result["planner_ms"]
    return (
        *about,
        *where,
        _rates(result),
        _bound_text(result),
        *shares,
        f"{100 * result['token_weighted_attainment']:.1f} %",
        str(result["sessions"]),
        f"{planner['median']:.2f} / {planner['p99']:.2f}",
    )


def _bound_text(result: Mapping[str, Any]) -> str:
    return f"{result['bound']['least']:.3g}" if result.get("bound") else "-"


def _rates(result: Mapping[str, Any]) -> str:
    if not result["capacity_per_gpu"]:
        return f"at {result['at_rate'] / result['replicas']:.3g}"
    headline = result["capacity_per_gpu"][result["rules"][0]]
    if len(headline) == 1:
        return f"{next(iter(headline.values())):.3g}"
    return ", ".join(f"{100 * float(target):g} %: {rate:.3g}" for target, rate in headline.items())
