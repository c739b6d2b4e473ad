"""`slos-serve bench-router`: what a router costs, as ratios to the same requests sent straight to the instances.

All ways are measured in one run, so that what else the machine does touches all alike: tokens per second in several
rounds of windows with many streams that never pause, and the first token with few that do and change the way with
every request. Greedy, lengths fixed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from slos_serve.client.client import SlosClient
from slos_serve.client.routed import RoutedClient

from . import text
from .demo_router import Addresses, service
from .play import Caller

WARM_SECONDS: Final = 3.0
PROMPT_TOKENS: Final = 60
PAUSE_SECONDS: Final = 0.3
# Promises that nobody breaks: what is measured is the way of the tokens, not the planner.
EASY: Final[Mapping[str, Any]] = {"ignore_eos": True, "slo_ttft_ms": 60e3, "slo_tpot_ms": 2e3}
Ways: TypeAlias = Mapping[str, Sequence[Caller]]


@dataclass(frozen=True, slots=True)
class Rate:
    """One window of one way."""

    tokens_per_second: float
    responses_per_second: float


def prompts() -> list[str]:
    rng = np.random.default_rng(0)
    return [text.prompt(rng, PROMPT_TOKENS, "code") for _ in range(32)]


async def window(callers: Sequence[Caller], streams: int, seconds: float, length: int) -> Rate:
    """`streams` closed loops over the callers for `seconds` after a warm-up."""
    begin = time.monotonic() + WARM_SECONDS
    end = begin + seconds
    tokens = responses = 0
    asked = itertools.cycle(prompts())

    async def loop(caller: Caller) -> None:
        nonlocal tokens, responses
        while time.monotonic() < end:
            stream = caller.generate(next(asked), max_tokens=length, **EASY)
            async for delta in stream:
                if begin <= delta.at < end:
                    tokens += len(delta.token_ids)
                    responses += 1
                if delta.at >= end:
                    break
            await stream.aclose()

    turn = itertools.cycle(callers)
    await asyncio.gather(*(loop(next(turn)) for _ in range(streams)))
    return Rate(tokens / seconds, responses / seconds)


async def first_tokens(ways: Ways, streams: int, seconds: float, length: int) -> dict[str, list[float]]:
    """Seconds to the first token by way. Each stream takes the ways in turn, so that all meet the same machine."""
    end = time.monotonic() + seconds
    asked = itertools.cycle(prompts())
    found: dict[str, list[float]] = {way: [] for way in ways}
    turns = {way: itertools.cycle(callers) for way, callers in ways.items()}

    async def loop(number: int) -> None:
        await asyncio.sleep(PAUSE_SECONDS * number / streams)
        order = itertools.islice(itertools.cycle(ways), number % len(ways), None)
        while time.monotonic() < end:
            way = next(order)
            stream = next(turns[way]).generate(next(asked), max_tokens=length, **EASY)
            sent, first = time.monotonic(), math.nan
            async for delta in stream:
                first = first if first <= delta.at else delta.at
            found[way].append(first - sent)
            await asyncio.sleep(PAUSE_SECONDS)

    await asyncio.gather(*(loop(number) for number in range(streams)))
    return found


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
        await first_tokens(ways, args.few, WARM_SECONDS, args.few_length)
        firsts = await first_tokens(ways, args.few, args.first_seconds, args.few_length)
        for way, seconds in firsts.items():
            print(f"first token {way}: {1000 * statistics.median(seconds):.1f} ms of {len(seconds)}", flush=True)
        rates: dict[str, list[Rate]] = {way: [] for way in ways}
        for number in range(args.rounds):
            for way, callers in ways.items():
                rate = await window(callers, args.streams, args.seconds, args.length)
                rates[way].append(rate)
                shown = f"{rate.tokens_per_second:.0f} tokens/s, {rate.responses_per_second:.0f} responses/s"
                print(f"round {number + 1} {way}: {shown}", flush=True)
    return {way: summary(rates[way], rates["direct"], firsts[way], firsts["direct"]) for way in ways}


def summary(
    rates: Sequence[Rate], direct: Sequence[Rate], firsts: Sequence[float], direct_firsts: Sequence[float]
) -> dict[str, Any]:
    """Rates: medians over the rounds, each round compared with its own direct window. First tokens: medians."""

    def middle(value: Callable[[Rate, Rate], float]) -> float:
        found = [value(rate, base) for rate, base in zip(rates, direct, strict=True)]
        return statistics.median(found) if found else math.nan

    return {
        "token_ratio": middle(lambda rate, base: rate.tokens_per_second / base.tokens_per_second),
        "tokens_per_response": middle(lambda rate, _: rate.tokens_per_second / rate.responses_per_second),
        "first_token_ms": 1000 * statistics.median(firsts),
        "first_token_added_ms": 1000 * (statistics.median(firsts) - statistics.median(direct_firsts)),
        "rounds": [asdict(rate) for rate in rates],
        "first_tokens_ms": [round(1000 * each, 2) for each in firsts],
    }


def table(found: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> str:
    """The ratios."""
    lines = [f"{'way':<10}{'tokens/s of direct':>20}{'tokens a response':>20}{'first token, ms':>18}{'ms more':>10}"]
    for way, each in found.items():
        lines.append(
            f"{way:<10}{each['token_ratio']:>20.2f}{each['tokens_per_response']:>20.1f}"
            f"{each['first_token_ms']:>18.1f}{each['first_token_added_ms']:>10.1f}"
        )
    return "\n".join([*lines, f"{args.streams} streams without a pause; first token with {args.few} that pause"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve bench-router`."""
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--length", type=int, default=400, help="tokens of each stream (default: %(default)s)")
    parser.add_argument("--few", type=int, default=4, help="streams while the first token is measured")
    parser.add_argument(
        "--few-length",
        type=int,
        default=24,
        help="tokens of each of those; with 1, and --few 1, nothing else runs meanwhile (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of windows; 0: first tokens only (default: %(default)s)")
    parser.add_argument("--first-seconds", type=float, default=60.0, help="first tokens are measured so long")
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
