"""`slos-serve bench-router`: what a router costs, as ratios to the same requests sent straight to the instances.

All ways are measured in turn, several rounds in one run, so that what else the machine does touches all alike:
tokens per second with many streams that never pause, and the first token with few that do. Greedy, lengths fixed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.client.client import SlosClient
from slos_serve.client.routed import RoutedClient

from . import text
from .demo_router import Addresses, service
from .play import Caller

WARM_SECONDS: Final = 3.0
PROMPT_TOKENS: Final = 60
# Promises that nobody breaks: what is measured is the way of the tokens, not the planner.
EASY: Final[Mapping[str, Any]] = {"ignore_eos": True, "slo_ttft_ms": 60e3, "slo_tpot_ms": 2e3}


@dataclass(frozen=True, slots=True)
class Rate:
    """One window of one way."""

    tokens_per_second: float
    responses_per_second: float
    first_token_ms: float


async def window(callers: Sequence[Caller], streams: int, seconds: float, length: int, pause: float) -> Rate:
    """`streams` closed loops over the callers for `seconds` after a warm-up, each pausing so long between requests."""
    rng = np.random.default_rng(0)
    prompts = [text.prompt(rng, PROMPT_TOKENS, "code") for _ in range(32)]
    begin = time.monotonic() + WARM_SECONDS
    end = begin + seconds
    tokens, responses, firsts = 0, 0, []
    turns = itertools.count()

    async def loop(caller: Caller) -> None:
        nonlocal tokens, responses
        while time.monotonic() < end:
            sent, first = time.monotonic(), True
            stream = caller.generate(prompts[next(turns) % len(prompts)], max_tokens=length, **EASY)
            async for delta in stream:
                if begin <= delta.at < end:
                    tokens += len(delta.token_ids)
                    responses += 1
                    if first:
                        firsts.append(delta.at - sent)
                first = False
                if delta.at >= end:
                    break
            await stream.aclose()
            await asyncio.sleep(pause)

    ways = itertools.cycle(callers)
    await asyncio.gather(*(loop(next(ways)) for _ in range(streams)))
    middle = statistics.median(firsts) * 1000 if firsts else float("nan")
    return Rate(tokens / seconds, responses / seconds, middle)


async def measure(addresses: Addresses, args: argparse.Namespace) -> dict[str, Any]:
    """Every way in turn, `args.rounds` times, under both loads."""
    async with AsyncExitStack() as stack:
        direct = [await stack.enter_async_context(SlosClient(each)) for each in addresses.instances]
        ways: dict[str, list[Caller]] = {
            "direct": list(direct),
            "place": [await stack.enter_async_context(RoutedClient([addresses.router]))],
            "forward": [await stack.enter_async_context(SlosClient(addresses.router, "slos_router"))],
            "ensemble": [await stack.enter_async_context(SlosClient(addresses.router, "slos_ensemble"))],
        }
        loads = {"many": (args.streams, args.length, 0.0), "few": (args.few, 24, 0.3)}
        found: dict[str, dict[str, list[Rate]]] = {load: {way: [] for way in ways} for load in loads}
        for number in range(args.rounds):
            for load, (streams, length, pause) in loads.items():
                for way, callers in ways.items():
                    rate = await window(callers, streams, args.seconds, length, pause)
                    found[load][way].append(rate)
                    shown = f"{rate.tokens_per_second:.0f} tokens/s, {rate.responses_per_second:.0f} responses/s"
                    print(f"round {number + 1} {load} {way}: {shown}, {rate.first_token_ms:.1f} ms", flush=True)
    return {load: {way: summary(rates, ways["direct"]) for way, rates in ways.items()} for load, ways in found.items()}


def summary(rates: Sequence[Rate], direct: Sequence[Rate]) -> dict[str, Any]:
    """Medians over the rounds, each round compared with its own direct window."""

    def middle(value: Callable[[Rate, Rate], float]) -> float:
        return statistics.median(value(rate, base) for rate, base in zip(rates, direct, strict=True))

    return {
        "token_ratio": middle(lambda rate, base: rate.tokens_per_second / base.tokens_per_second),
        "tokens_per_response": middle(lambda rate, _: rate.tokens_per_second / rate.responses_per_second),
        "first_token_added_ms": middle(lambda rate, base: rate.first_token_ms - base.first_token_ms),
        "rounds": [asdict(rate) for rate in rates],
    }


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], args: argparse.Namespace) -> str:
    """The ratios."""
    lines = [f"{'way':<10}{'tokens/s of direct':>20}{'tokens a response':>20}{'first token, ms more':>22}"]
    for way in found["many"]:
        many, few = found["many"][way], found["few"][way]
        lines.append(
            f"{way:<10}{many['token_ratio']:>20.2f}{many['tokens_per_response']:>20.1f}"
            f"{few['first_token_added_ms']:>22.1f}"
        )
    return "\n".join([*lines, f"{args.streams} streams without a pause; first token with {args.few} that pause"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve bench-router`."""
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--length", type=int, default=400, help="tokens of each stream (default: %(default)s)")
    parser.add_argument("--few", type=int, default=4, help="streams while the first token is measured")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """The command."""

    async def all_of_it() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="slos-bench-") as folder:
            async with service(args.model_repository, args.instances, Path(folder) / "log") as addresses:
                return await measure(addresses, args)

    found = asyncio.run(all_of_it())
    print(table(found, args))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0
