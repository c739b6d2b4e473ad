"""Which new requests can be promised their SLO, exactly: the reference problem as a pure function.

One replica, one instant. A batch of n tokens with s draft steps takes `max over pieces (base + per_token n +
per_step s)` seconds and holds at most `max_batch_tokens`. Request i needs the rest of its prompt by
`d = max(deadline, now)` and its output token j by `d + j * tpot`; nobody ever ends; running requests are
kept; the KV blocks of accepted new requests are bounded; their summed value is to be as large as possible.

A set is accepted when two things hold. The fluid bound: in the order of deadlines, the prompt tokens that
batches as long as the tightest resident pace leave beside the decodes never fall short (Algorithm 1 of
SLOs-Serve). The construction: an earliest-deadline schedule, token by token, meets every deadline for ever.

The search goes through the new requests by deadline and keeps states (accepted counts per tier, memory,
leftover prefill tokens, value). One state hides another only with the same counts and no less value, no
more memory and no less leftover; identical requests are one class; what cannot beat the best known value by
a Lagrangian bound on tokens and memory is dropped. Work is bounded by counts, never by a clock, so results
repeat to the last bit; past the bounds the same search keeps only the states of highest bound (a beam).

Never reads a clock, never changes its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .admission import batch_seconds, pack, tokens_within
from .jit import compiled

NARROW: Final = 12  # states kept per class of requests in the first pass, which only has to be good
WIDE: Final = 384  # states kept per class of requests in the pass that has to be exact
EXPANSIONS: Final = 20_000  # states made by one pass, at most
CONSTRUCTIONS: Final = 60_000  # stream visits of the earliest-deadline construction in one search, at most
PRICE_STEPS: Final = 10  # bisections of the price of memory
SPLITS: Final = 256  # how often the construction may serve only a part of identical streams
SETTLE: Final = 128  # batches after the last prompt within which a schedule must have become periodic
_TINY: Final = 1e-9

# Columns of `jobs`: one row per class of identical requests, by deadline.
DUE: Final = 0  # seconds from now until the prompt must be done
PROMPT: Final = 1  # tokens
BLOCKS: Final = 2
VALUE: Final = 3
COPIES: Final = 4
TIER: Final = 5
FORCED: Final = 6  # 1 for running requests, which are kept
JOB_COLUMNS: Final = 7

# Columns of `streams`: what the construction serves.
ANCHOR: Final = 0  # token j is due at ANCHOR + j * tpot
LEFT: Final = 1  # prompt tokens to go
KIND: Final = 2  # tier
MANY: Final = 3  # identical streams in step
GOT: Final = 4  # output tokens so far (expected, when speculating)
STREAM_COLUMNS: Final = 5

# Rows of `terms` for each set of prices (see `_terms`).
PRICE: Final = 0
PACED: Final = 1
REST: Final = 2
IDLE: Final = 3
MEMORY: Final = 4
TERM_ROWS: Final = 5


@dataclass(frozen=True, slots=True)
class Speculation:
    """A decode item of length v, v in 1..max_length, yields (1 - alpha^v) / (1 - alpha) tokens on average.

    Items longer than 1 take v draft steps; the longest in a batch counts.
    """

    alpha: float
    max_length: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: must be within 0..1, got {self.alpha!r}")
        if self.max_length < 1:
            raise ValueError(f"max_length: must be >= 1, got {self.max_length!r}")


@dataclass(frozen=True, eq=False)
class AdmissionProblem:
    """One planning instant. The arrays have one entry per request, running and new alike, in any order.

    pieces            (per_token, per_step, base) of each line of the time model, seconds
    max_batch_tokens  tokens in one batch, at most
    tpots             seconds per output token of each tier, any number of tiers, in any order
    free_blocks       KV blocks for accepted new requests
    deadlines         float64 [n], absolute seconds: prompt complete
    prompts           int64 [n], prompt tokens still to compute
    blocks            int64 [n], KV blocks charged when a new request is accepted
    tiers             int64 [n], index into `tpots`
    values            float64 [n], what accepting is worth; nothing <= 0 is accepted
    running           bool [n]: kept in any case
    Raises ValueError naming the field that cannot be right.
    """

    now: float
    pieces: tuple[tuple[float, float, float], ...]
    max_batch_tokens: int
    tpots: tuple[float, ...]
    free_blocks: int
    deadlines: NDArray[np.float64]
    prompts: NDArray[np.int64]
    blocks: NDArray[np.int64]
    tiers: NDArray[np.int64]
    values: NDArray[np.float64]
    running: NDArray[np.bool_]
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        for name in ("deadlines", "prompts", "blocks", "tiers", "values", "running"):
            if getattr(self, name).shape != self.deadlines.shape or self.deadlines.ndim != 1:
                raise ValueError(f"{name}: must have shape {self.deadlines.shape}, got {getattr(self, name).shape}")
        _check(self.max_batch_tokens >= 1, "max_batch_tokens: must be >= 1", self.max_batch_tokens)
        _check(self.free_blocks >= 0, "free_blocks: must be >= 0", self.free_blocks)
        _check(bool(self.pieces), "pieces: must not be empty", self.pieces)
        for piece in self.pieces:
            right = len(piece) == 3 and bool(np.isfinite(piece).all()) and min(piece) >= 0.0
            _check(right, "pieces: must be three finite seconds >= 0 each", piece)
        _check(max(p[0] for p in self.pieces) > 0.0, "pieces: one must grow with tokens", self.pieces)
        _check(all(0.0 < t < np.inf for t in self.tpots), "tpots: must be finite and > 0", self.tpots)
        _check(bool(np.isfinite(self.now)), "now: must be finite", self.now)
        for name in ("deadlines", "values"):
            _check(bool(np.isfinite(getattr(self, name)).all()), f"{name}: must be finite", getattr(self, name))
        for name in ("prompts", "blocks", "tiers"):
            _check(bool((getattr(self, name) >= 0).all()), f"{name}: must be >= 0", getattr(self, name))
        _check(bool((self.tiers < len(self.tpots)).all()), f"tiers: must be < {len(self.tpots)}", self.tiers)

    @cached_property
    def perf(self) -> NDArray[np.float64]:
        """The time model as the compiled functions take it."""
        return pack([(base, token, step) for token, step, base in self.pieces], 0.0, 0.0, 1.0, 0.0, 0.0)

    @cached_property
    def gain(self) -> NDArray[np.float64]:
        """Tokens that an item of length v yields, at index v; [max length + 1]."""
        if self.speculation is None:
            return np.array([0.0, 1.0])
        powers = self.speculation.alpha ** np.arange(self.speculation.max_length)
        return np.concatenate([[0.0], np.cumsum(powers)])


def _check(right: bool, rule: str, got: object) -> None:
    if not right:
        raise ValueError(f"{rule}, got {got!r}")


@dataclass(frozen=True, slots=True)
class AdmissionResult:
    """The new requests to accept and what is known about them.

    accepted  indices of new requests, ascending
    value     their summed value
    bound     no set within the fluid bound is worth more (equal to `value` when the fluid optimum was met)
    exact     no bound on work was reached: the fluid optimum is proven, and so is the accepted set up to
              what dominance may hide from the construction
    kept      whether the running requests alone can be served in time; when not, nothing is accepted
    expanded  states made, the measure of work
    """

    accepted: tuple[int, ...]
    value: float
    bound: float
    exact: bool
    kept: bool
    expanded: int


@compiled
def fluid_rate(perf: Any, most: float, gain: Any, paces: Any, counts: Any, lengths: Any) -> float:
    """Prefill tokens per second beside `counts` [L] decodes per tier; negative when they cannot be kept up.

    Every tier in turn is the bottleneck at every item length; the others take the shortest item that keeps
    their pace at that batch time. The lengths chosen are left in `lengths` [L].
    """
    best = -1.0
    trial = np.ones(paces.size, np.int64)
    for i in range(paces.size):
        if counts[i] == 0:
            continue
        for v in range(1, gain.size):
            period = paces[i] * gain[v]
            steps = 0
            decodes = 0.0
            for tier in range(paces.size):
                if counts[tier] == 0:
                    continue
                u = 1
                while u < gain.size and paces[tier] * gain[u] < period - 1e-12:
                    u += 1
                if u == gain.size:
                    decodes = np.inf
                    break
                trial[tier] = u
                steps = max(steps, u)
                decodes += counts[tier] * u / (paces[tier] * gain[u])
            if decodes == np.inf:
                continue
            if steps == 1:
                steps = 0
            span = min(period, batch_seconds(perf, most, 0.0, 0.0, float(steps)))
            rate = min(most, tokens_within(perf, span, 0.0, 0.0, float(steps))) / span - decodes
            if rate >= -1e-6 and max(rate, 0.0) > best:
                best = max(rate, 0.0)
                lengths[:] = trial
    return best


@compiled
def idle_tokens(perf: Any, most: float, seconds: float) -> float:
    """Prefill tokens within `seconds` while nobody decodes: full batches, then one that fills the rest."""
    full = batch_seconds(perf, most, 0.0, 0.0, 0.0)
    whole = np.floor(seconds / full + _TINY)
    rest = tokens_within(perf, max(seconds - whole * full, 0.0), 0.0, 0.0, 0.0)
    return float(whole * most + min(max(rest, 0.0), most))


@compiled
def next_due(streams: Any, i: int, paces: Any) -> float:
    """When the stream's prompt, or its next output token, is due; seconds from now."""
    if streams[LEFT, i] > 0.0:
        return float(streams[ANCHOR, i])
    return float(streams[ANCHOR, i] + (np.floor(streams[GOT, i] + _TINY) + 1.0) * paces[int(streams[KIND, i])])


@compiled
def _forever(perf: Any, most: float, paces: Any, streams: Any, due: Any, size: int, now: float) -> bool:
    """Whether pure decoding, from here on, can surely meet every deadline for ever.

    Either one batch holds a token of everybody, is no longer than the tightest pace and is in time for all:
    then the next one is too. Or every stream has a whole pace ahead and batches of the tightest pace have
    room for a share of each tier: unit jobs in equal slots, where earliest deadline first is optimal.
    """
    streams_alive = 0.0
    tightest = np.inf
    slack = np.inf
    ahead = True
    for i in range(size):
        pace = paces[int(streams[KIND, i])]
        streams_alive += streams[MANY, i]
        tightest = min(tightest, pace)
        slack = min(slack, due[i] - now)
        ahead = ahead and due[i] - now >= pace - _TINY
    together = batch_seconds(perf, streams_alive, 0.0, 0.0, 0.0)
    if streams_alive <= most and together <= min(tightest, slack) + _TINY:
        return True
    share = 0.0
    for i in range(size):
        share += streams[MANY, i] / np.floor(paces[int(streams[KIND, i])] / tightest + _TINY)
    return ahead and share <= np.floor(min(most, tokens_within(perf, tightest, 0.0, 0.0, 0.0)) + 1e-6)


@compiled
def _sort(order: Any, due: Any, size: int) -> None:
    """By due time; insertion, because a batch leaves the order nearly sorted. Stable."""
    for i in range(1, size):
        item = order[i]
        at = i
        while at > 0 and due[order[at - 1]] > due[item]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = item


@compiled
def _draft_length(
    perf: Any, most: float, paces: Any, streams: Any, due: Any, order: Any, size: int, now: float, longest: int
) -> int:
    """The longest item up to `longest` whose batch holds all that is due when it must end; 0 when none does."""
    end = due[order[0]]
    for v in range(longest, 0, -1):
        must = 0.0
        for k in range(size):
            i = order[k]
            if due[i] > end + _TINY:
                break
            must += streams[LEFT, i] if streams[LEFT, i] > 0.0 else v * streams[MANY, i]
        steps = float(v) if v > 1 else 0.0
        if must <= min(most, np.floor(tokens_within(perf, end - now, 0.0, 0.0, steps) + 1e-6)):
            return v
    return 0


@compiled
def earliest_deadline(perf: Any, most: float, gain: Any, paces: Any, given: Any, size: int, longest: int) -> int:
    """Serve `given` [STREAM_COLUMNS, n] earliest deadline first, token by token, with items up to `longest`.

    Every batch ends when the earliest unmet deadline does, or when its work is done; each stream decodes at
    most once in it. Returns the stream visits it took, negative when a deadline is missed or no steady
    state is reached.
    """
    rows = size + SPLITS
    streams = np.empty((STREAM_COLUMNS, rows))
    streams[:, :size] = given[:, :size]
    due = np.empty(rows)
    order = np.arange(rows)
    prompts = 0
    for i in range(size):
        due[i] = next_due(streams, i, paces)
        prompts += streams[LEFT, i] > 0.0
    _sort(order, due, size)
    now = 0.0
    visits = 0
    settling = 0
    while True:
        if prompts == 0:
            if _forever(perf, most, paces, streams, due, size, now):
                return visits + size
            settling += 1
        if settling > SETTLE or visits > CONSTRUCTIONS:
            return -visits - 1
        v = _draft_length(perf, most, paces, streams, due, order, size, now, longest)
        if v == 0:
            return -visits - 1
        steps = float(v) if v > 1 else 0.0
        room = min(most, np.floor(tokens_within(perf, due[order[0]] - now, 0.0, 0.0, steps) + 1e-6))
        left = room
        drafted = 0.0
        present = size
        for k in range(present):
            if left <= 0.0:
                break
            i = order[k]
            visits += 1
            if streams[LEFT, i] > 0.0:
                done = min(left, streams[LEFT, i])
                streams[LEFT, i] -= done
                left -= done
                prompts -= streams[LEFT, i] == 0.0
            else:
                fit = min(streams[MANY, i], np.floor(left / v))
                if fit <= 0.0:
                    continue
                if fit < streams[MANY, i]:
                    if size == rows:
                        return -visits - 1
                    streams[:, size] = streams[:, i]
                    streams[MANY, size] -= fit
                    streams[MANY, i] = fit
                    due[size] = due[i]
                    order[size] = size
                    size += 1
                streams[GOT, i] += gain[v]
                left -= fit * v
                drafted = steps
            due[i] = next_due(streams, i, paces)
        now += batch_seconds(perf, room - left, 0.0, 0.0, drafted)
        _sort(order, due, size)
        visits += size


@compiled
def _supply(perf: Any, most: float, gain: Any, paces: Any, jobs: Any, base: Any, taken: Any) -> Any:
    """Prefill tokens there can be by each class's due time, [classes], beside the decodes of `taken`."""
    supply = np.empty(jobs.shape[1])
    counts = base.copy()
    lengths = np.ones(paces.size, np.int64)
    rate = fluid_rate(perf, most, gain, paces, counts, lengths) if counts.sum() > 0 else -1.0
    idle = counts.sum() == 0
    total = 0.0
    at = 0.0
    for g in range(jobs.shape[1]):
        total = idle_tokens(perf, most, jobs[DUE, g]) if idle else total + max(rate, 0.0) * (jobs[DUE, g] - at)
        at = jobs[DUE, g]
        supply[g] = total
        if taken[g] > 0:
            counts[int(jobs[TIER, g])] += taken[g]
            rate = fluid_rate(perf, most, gain, paces, counts, lengths)
            idle = False
    return supply


@compiled
def _token_prices(jobs: Any, supply: Any, blocks_price: float, used: Any) -> Any:
    """What a token of prefill is worth to each class, [classes], falling with the due time.

    The dual of the fractional problem (nested budgets): in order of deadlines, cut what is worth least per
    token until the budget holds; the worth of the last cut is the price. `used[0]` gets the blocks used.
    """
    classes = jobs.shape[1]
    price = np.zeros(classes)
    held = np.zeros(classes)
    worth = np.empty(classes)
    total = 0.0
    for g in range(classes):
        tokens = jobs[PROMPT, g] * jobs[COPIES, g]
        gained = jobs[VALUE, g] - blocks_price * jobs[BLOCKS, g]
        worth[g] = np.inf if jobs[FORCED, g] > 0.0 else gained / max(jobs[PROMPT, g], 1.0)
        held[g] = tokens if worth[g] > 0.0 else 0.0
        total += held[g]
        while total > supply[g]:
            least = -1
            for i in range(g + 1):
                if held[i] > 0.0 and worth[i] < np.inf and (least < 0 or worth[i] < worth[least]):
                    least = i
            if least < 0:
                break
            cut = min(held[least], total - supply[g])
            held[least] -= cut
            total -= cut
            price[g] = worth[least]
    used[0] = 0.0
    for g in range(classes - 1, -1, -1):
        if jobs[FORCED, g] == 0.0 and worth[g] > 0.0:
            share = held[g] / jobs[PROMPT, g] if jobs[PROMPT, g] > 0.0 else jobs[COPIES, g]
            used[0] += share * jobs[BLOCKS, g]
        if g + 1 < classes:
            price[g] = max(price[g], price[g + 1])
    return price


@compiled
def _terms(perf: Any, most: float, paces: Any, jobs: Any, price: Any, blocks_price: float) -> Any:
    """Suffix sums [TERM_ROWS, classes + 1] that make the Lagrangian bound of a state O(1).

    Any prices that fall with the due time give a valid bound; those of `_token_prices` give a good one. A
    class costs its prompt, its blocks, and at least one token per tpot from its due time on.
    """
    classes = jobs.shape[1]
    terms = np.zeros((TERM_ROWS, classes + 1))
    terms[MEMORY, :] = blocks_price
    for g in range(classes - 1, -1, -1):
        step = price[g] - (price[g + 1] if g + 1 < classes else 0.0)
        before = jobs[DUE, g - 1] if g > 0 else 0.0
        beyond = terms[PACED, g + 1]
        terms[PRICE, g] = price[g]
        terms[PACED, g] = beyond + price[g] * (jobs[DUE, g] - before)
        idle = tokens_within(perf, jobs[DUE, g], 0.0, 0.0, 0.0)
        terms[IDLE, g] = terms[IDLE, g + 1] + step * max(idle, 0.0)
        cost = jobs[PROMPT, g] * price[g] + beyond / paces[int(jobs[TIER, g])]
        if jobs[FORCED, g] > 0.0:
            gained = -cost
        else:
            gained = max(0.0, jobs[VALUE, g] - cost - blocks_price * jobs[BLOCKS, g])
        terms[REST, g] = terms[REST, g + 1] + gained * jobs[COPIES, g]
    return terms


@compiled
def _bound(terms: Any, g: int, value: float, left: float, rate: float, blocks: float, unit: float) -> float:
    """The most a state can still be worth when the classes from `g` on are open; a multiple of `unit`."""
    best = np.inf
    for k in range(terms.shape[0]):
        more = terms[k, REST, g] + terms[k, MEMORY, g] * blocks
        if rate < 0.0:
            more += terms[k, IDLE, g]
        else:
            more += terms[k, PRICE, g] * left + terms[k, PACED, g] * rate
        best = min(best, value + more)
    if unit > 0.0:
        best = np.floor(best / unit + 1e-6) * unit
    return float(best)
