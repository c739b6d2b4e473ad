"""What arrives when: one definition of every workload, for live load, for simulation and for Locust.

Pure numpy; every random number comes from a generator passed in, so a seed fixes everything. A trace's
rate is varied by thinning it or by superposing shifted copies, never by rescaling its time, so bursts
keep their length. Lengths come from the shipped data sets, whole rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import traces

Times: TypeAlias = NDArray[np.float64]
Rng: TypeAlias = np.random.Generator


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload. Times in seconds, lengths in tokens.

    `output_tokens` include the `thinking_tokens` that come first. Requests of one `session` are its
    rounds: round 0 arrives at `at`; a later round is released `tool_delay` seconds after the round
    before it has ended, and never before `at`. Its prompt repeats `reusable_prefix_tokens` of what the
    session has seen.
    """

    at: float
    slo_class: str
    prompt_tokens: int
    output_tokens: int
    thinking_tokens: int = 0
    session: str | None = None
    round: int = 0
    tool_delay: float = 0.0
    reusable_prefix_tokens: int = 0


Workload: TypeAlias = Callable[[Rng, Times], list[Arrival]]


def poisson(rng: Rng, rate: float, seconds: float) -> Times:
    """Ascending arrival times in [0, seconds) of a Poisson process with `rate` requests per second."""
    return np.sort(rng.uniform(0.0, seconds, rng.poisson(rate * seconds)))


def onoff_bursts(
    rng: Rng, rate: float, seconds: float, factor: float = 5.0, duty: float = 0.15, period: float | None = None
) -> Times:
    """Poisson arrivals whose rate jumps to `factor` times the mean for a `duty` share of every period.

    `rate` is the mean over a period; between bursts the rate is what remains of it. A period is 200
    mean inter-arrival times unless given in seconds; its phase is random. Raises ValueError when the
    bursts alone would exceed the mean (`factor * duty` > 1).
    """
    if not 0 < duty < 1 or not 0 < factor * duty <= 1:
        raise ValueError(f"duty must be in (0, 1) and factor * duty in (0, 1], got duty={duty}, factor={factor}")
    period = 200.0 / rate if period is None else period
    quiet = rate * (1 - factor * duty) / (1 - duty)
    starts = np.arange(-rng.uniform(0.0, period), seconds, period)
    knots = np.append(np.stack([starts, starts + duty * period], axis=1).ravel(), starts[-1] + period)
    rates = np.tile([factor * rate, quiet], len(starts))
    # A unit-rate Poisson process on the axis of expected counts, read back on the axis of time.
    expected = np.concatenate([[0.0], np.cumsum(rates * np.diff(knots))])
    times = np.interp(poisson(rng, 1.0, float(expected[-1])), expected, knots)
    return times[(times >= 0) & (times < seconds)]


def replay(rng: Rng, trace: Times, rate: float, seconds: float) -> Times:
    """Arrival times in [0, seconds) with the rhythm of a recorded `trace` at `rate` requests per second.

    Whole copies of the trace, each rotated by a random shift, and one more thinned to the rest. `rate`
    is kept on average over all shifts; a short window of a bursty trace can hold far more or less.
    """
    span = float(trace[-1] - trace[0]) * len(trace) / (len(trace) - 1)
    copies, rest = divmod(rate * span / len(trace), 1.0)
    shifted = [_rotated(rng, trace, span, seconds) for _ in range(int(copies) + 1)]
    last = shifted.pop()
    return np.sort(np.concatenate([*shifted, last[rng.random(len(last)) < rest]]))


def _rotated(rng: Rng, trace: Times, span: float, seconds: float) -> Times:
    once = np.sort((trace - trace[0] - rng.uniform(0.0, span)) % span)
    laps = np.arange(math.ceil(seconds / span)) * span
    times: Times = (laps[:, None] + once).ravel()
    return times[times < seconds]


def representative(rng: Rng, draw: Callable[[Rng], Times], expected: float, tries: int = 50) -> Times:
    """The draw whose number of arrivals comes nearest to `expected`: a short window at the asked rate."""
    return min((draw(rng) for _ in range(tries)), key=lambda times: abs(len(times) - expected))


def _sampled(rng: Rng, name: str, count: int) -> traces.Columns:
    columns = traces.load(name)
    rows = rng.integers(0, len(next(iter(columns.values()))), count)
    return {key: values[rows] for key, values in columns.items()}


def _from_lengths(name: str, slo_class: str) -> Workload:
    def workload(rng: Rng, times: Times) -> list[Arrival]:
        rows = _sampled(rng, name, len(times))
        lengths = zip(times.tolist(), rows["prompt_tokens"].tolist(), rows["output_tokens"].tolist(), strict=True)
        return [Arrival(at, slo_class, prompt, output) for at, prompt, output in lengths]

    workload.__doc__ = f"Class {slo_class}: prompt and output lengths from {name}, pairs kept together."
    return workload


chatbot: Final = _from_lengths("sharegpt", "chatbot")
coding: Final = _from_lengths("azure_code", "coding")
short_coding: Final = _from_lengths("humaneval", "coding")
summarization: Final = _from_lengths("arxiv", "summarization")


def reasoning(rng: Rng, times: Times) -> list[Arrival]:
    """Class reasoning: both hours of DeepSeek-R1 in equal parts; the output is thinking, then the answer."""
    morning = rng.random(len(times)) < 0.5
    hours = [_sampled(rng, name, len(times)) for name in ("r1_morning", "r1_afternoon")]
    prompt, thinking, answer = (
        np.where(morning, hours[0][name], hours[1][name]).tolist()
        for name in ("prompt_tokens", "reasoning_tokens", "answer_tokens")
    )
    return [
        Arrival(at, "reasoning", p, t + a, thinking_tokens=t)
        for at, p, t, a in zip(times.tolist(), prompt, thinking, answer, strict=True)
    ]


def mixed(rng: Rng, times: Times) -> list[Arrival]:
    """Chatbot, coding and summarization, each request drawn as one of the three with equal chance."""
    return mixture({chatbot: 1.0, coding: 1.0, summarization: 1.0})(rng, times)


def mixture(shares: Mapping[Workload, float]) -> Workload:
    """A workload that sends each arrival to one of several, with chances in proportion to `shares`."""
    weights = np.array(list(shares.values()))

    def workload(rng: Rng, times: Times) -> list[Arrival]:
        picks = rng.choice(len(weights), len(times), p=weights / weights.sum())
        parts = [part(rng, times[picks == index]) for index, part in enumerate(shares)]
        return merged(parts)

    return workload


def tool_calling(rng: Rng, times: Times, mean_tool_delay: float = 1.0) -> list[Arrival]:
    """Tool sessions, one per arrival time: rounds that call tools, then a final answer.

    Number of rounds, size of the first prompt and of the final answer from ToolBench sessions; what a
    call writes and what a tool adds from ToolBench example turns. No public data has tool run times:
    they are assumed exponential with `mean_tool_delay` seconds. Every round is of class tool_calling.
    """
    sessions = _sampled(rng, "toolbench_sessions", len(times))
    turns = traces.load("toolbench_turns")
    calls = turns["output_tokens"][turns["is_final"] == 0]
    finals = turns["output_tokens"][turns["is_final"] == 1]
    added = turns["new_prompt_tokens"][turns["turn"] > 0]
    arrivals = []
    for index, at in enumerate(times.tolist()):
        prompt = int(sessions["tool_doc_tokens"][index] + sessions["query_tokens"][index])
        rounds = int(sessions["llm_calls"][index])
        # A session that gave up has no answer of its own length: take one from the examples.
        answer = int(sessions["final_answer_tokens"][index]) or int(rng.choice(finals))
        seen = 0
        for number in range(rounds):
            last = number == rounds - 1
            arrivals.append(
                Arrival(
                    at,
                    "tool_calling",
                    prompt,
                    answer if last else int(rng.choice(calls)),
                    session=f"tool-{index}",
                    round=number,
                    tool_delay=float(rng.exponential(mean_tool_delay)) if number else 0.0,
                    reusable_prefix_tokens=seen,
                )
            )
            seen = prompt + arrivals[-1].output_tokens
            prompt = seen + max(1, int(rng.choice(added)))
    return arrivals


WORKLOADS: Final[Mapping[str, Workload]] = {
    "chatbot": chatbot,
    "coding": coding,
    "short_coding": short_coding,
    "summarization": summarization,
    "mixed": mixed,
    "tool_calling": tool_calling,
    "reasoning": reasoning,
}


def merged(parts: Iterable[Sequence[Arrival]]) -> list[Arrival]:
    """Several workloads as one, by arrival time; rounds of a session stay in order."""
    return sorted((arrival for part in parts for arrival in part), key=lambda arrival: (arrival.at, arrival.round))


@dataclass(frozen=True, slots=True)
class Limits:
    """How a workload is made to fit a smaller model: lengths times a scale, then clipped (tokens)."""

    prompt_scale: float = 1.0
    output_scale: float = 1.0
    max_prompt_tokens: int = 1 << 30
    max_output_tokens: int = 1 << 30


def fit(arrivals: Sequence[Arrival], limits: Limits) -> list[Arrival]:
    """The same arrivals within `limits`: the shape of the lengths stays, only their tail is clipped.

    Thinking keeps its share of the output. A round whose prompt would be clipped is dropped with the
    rounds after it, for a clipped prompt would no longer contain what the session has seen.
    """
    fitted = []
    ended: set[str] = set()
    for arrival in arrivals:
        prompt = max(1, round(arrival.prompt_tokens * limits.prompt_scale))
        if arrival.round and arrival.session and (arrival.session in ended or prompt > limits.max_prompt_tokens):
            ended.add(arrival.session)
            continue
        output = min(max(1, round(arrival.output_tokens * limits.output_scale)), limits.max_output_tokens)
        prompt = min(prompt, limits.max_prompt_tokens)
        fitted.append(
            replace(
                arrival,
                prompt_tokens=prompt,
                output_tokens=output,
                thinking_tokens=round(arrival.thinking_tokens * output / arrival.output_tokens),
                reusable_prefix_tokens=min(round(arrival.reusable_prefix_tokens * limits.prompt_scale), prompt - 1),
            )
        )
    return fitted
