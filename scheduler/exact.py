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

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .jit import compiled
from .perf import PerfModel, Piece
from .timemodel import batch_seconds, pack, tokens_within

# Bounds on work. They make a call take about a millisecond for 32 waiting requests and two for 64.
NARROW: Final = 12  # states kept per class of requests in the first pass, which only has to be good
WIDE: Final = 32  # states kept in the second pass, which has to be exact; times the effort
PROVED: Final = 8  # states kept where every one of them has to pass the construction; times the effort
VISITS_MOST: Final = 8_000  # stream visits of the construction in that pass; times the effort
FEW: Final = 48  # with fewer classes the effort is multiplied, up to 4 times, at no more time in all
MADE_MOST: Final = 50_000  # states made in one pass
CONSTRUCTION_MOST: Final = 60_000  # stream visits of one construction
PRICE_STEPS: Final = 10  # bisections of the price of memory
SPLITS: Final = 96  # how often the construction may serve only a part of identical streams
SETTLE: Final = 128  # batches after the last prompt within which a schedule must have become periodic
ROUNDING: Final = 1e-6  # of a token: room for 99.9999995 tokens is room for 100
TOLERANCE: Final = 1e-9  # of tokens, seconds and values: absorbs the rounding of sums

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
MARK: Final = 5  # slack that a repetition of the last batches needs, seconds
STREAM_COLUMNS: Final = 6

# Rows of `terms` for each set of prices (see `_terms`).
PRICE: Final = 0
PACED: Final = 1
REST: Final = 2
IDLE: Final = 3
MEMORY: Final = 4
USES: Final = 5
CAPPED: Final = 6
TERM_ROWS: Final = 7


# Columns of a state; the accepted and running decodes of each tier follow from COUNTS on.
WORTH: Final = 0
ROOM: Final = 1  # prefill tokens to spare at the due time of the last class
SPENT: Final = 2  # blocks
RATE: Final = 3  # prefill tokens per second from here on; negative while nobody decodes
BOUND: Final = 4
USED: Final = 5  # prompt tokens of all classes taken
NODE: Final = 6  # the last class taken, a column of `nodes`
COUNTS: Final = 7
BUCKETS: Final = 128

# Rows of `nodes`: the trail of what was taken.
PARENT: Final = 0
CLASS: Final = 1
TAKEN: Final = 2

# What a search reports.
BEST: Final = 0  # the value of the best set
DROPPED: Final = 1  # the highest bound among states that were dropped for want of room
MADE: Final = 2  # states
VISITS: Final = 3  # streams visited by the construction
LENGTH: Final = 4  # the longest item of the construction's last success
NEAR: Final = 5  # the same, when the pass began
OUTCOMES: Final = 6


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


_COLUMNS: Final[dict[str, type[np.generic]]] = {
    "deadlines": np.float64,
    "prompts": np.int64,
    "blocks": np.int64,
    "tiers": np.int64,
    "values": np.float64,
    "running": np.bool_,
}


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
    `perf`, `gain` (tokens that an item of each length yields, from 0 on) and `paces` are the same in arrays.
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
    perf: NDArray[np.float64] = field(init=False, repr=False)
    gain: NDArray[np.float64] = field(init=False, repr=False)
    paces: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, dtype in _COLUMNS.items():
            column = np.ascontiguousarray(getattr(self, name))
            _check(np.can_cast(column.dtype, dtype, "same_kind"), f"{name}: must be {dtype.__name__}", column.dtype)
            object.__setattr__(self, name, column.astype(dtype, copy=False))
            _check(
                column.shape == (len(self.deadlines),), f"{name}: must have shape [{len(self.deadlines)}]", column.shape
            )
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
        object.__setattr__(self, "paces", np.array(self.tpots, np.float64))
        pieces = tuple(Piece(base, token, step) for token, step, base in self.pieces)
        object.__setattr__(self, "perf", pack(PerfModel(pieces), margin=0.0))
        longest, alpha = (self.speculation.max_length, self.speculation.alpha) if self.speculation else (1, 0.0)
        object.__setattr__(self, "gain", np.cumsum([0.0, *(alpha**v for v in range(longest))]))


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
def fluid_options(perf: Any, most: float, gain: Any, paces: Any) -> Any:
    """Every way to speculate beside any decodes: (lengths, load, speed).

    In option (i, v) tier i is the bottleneck with items of length v, and every other tier takes the shortest
    item that keeps its pace at that batch time. lengths [tiers, v, tiers] are those items (0: none is long
    enough), load [tiers, v, tiers] the tokens per second that one stream of a tier then costs, and speed
    [tiers, v, draft steps] the tokens per second of such batches.
    """
    tiers, longest = paces.size, gain.size - 1
    lengths = np.zeros((tiers, longest + 1, tiers), np.int64)
    load = np.zeros((tiers, longest + 1, tiers))
    speed = np.zeros((tiers, longest + 1, longest + 1))
    for i in range(tiers):
        for v in range(1, longest + 1):
            period = paces[i] * gain[v]
            for tier in range(tiers):
                u = 1
                while u <= longest and paces[tier] * gain[u] < period - 1e-12:
                    u += 1
                if u <= longest:
                    lengths[i, v, tier] = u
                    load[i, v, tier] = u / (paces[tier] * gain[u])
            for u in range(1, longest + 1):
                steps = float(u) if u > 1 else 0.0
                span = min(period, batch_seconds(perf, most, 0.0, 0.0, steps))
                speed[i, v, u] = min(most, tokens_within(perf, span, 0.0, 0.0, steps)) / span
    return lengths, load, speed


@compiled
def fluid_rate(options: Any, counts: Any) -> float:
    """Most prefill tokens per second beside `counts` [tiers] decodes; negative when those cannot be kept up."""
    lengths, load, speed = options
    best = -1.0
    for i in range(counts.size):
        if counts[i] == 0:
            continue
        for v in range(1, speed.shape[1]):
            decodes = 0.0
            drafted = 1
            for tier in range(counts.size):
                if counts[tier] > 0:
                    decodes += counts[tier] * load[i, v, tier]
                    drafted = max(drafted, lengths[i, v, tier]) if lengths[i, v, tier] > 0 else speed.shape[1]
                if drafted == speed.shape[1]:
                    break
            if drafted < speed.shape[1]:
                rate = speed[i, v, drafted] - decodes
                if rate >= -1e-6:
                    best = max(best, rate, 0.0)
    return best


@compiled
def idle_tokens(model: Any, seconds: float) -> float:
    """Prefill tokens within `seconds` while nobody decodes: full batches, then one that fills the rest."""
    perf, most, _, _ = model
    full = batch_seconds(perf, most, 0.0, 0.0, 0.0)
    whole = np.floor(seconds / full + TOLERANCE)
    rest = tokens_within(perf, max(seconds - whole * full, 0.0), 0.0, 0.0, 0.0)
    return float(whole * most + min(max(rest, 0.0), most))


@compiled
def next_due(streams: Any, i: int, paces: Any) -> float:
    """When the stream's prompt, or its next output token, is due; seconds from now."""
    if streams[LEFT, i] > 0.0:
        return float(streams[ANCHOR, i])
    return float(streams[ANCHOR, i] + (np.floor(streams[GOT, i] + TOLERANCE) + 1.0) * paces[int(streams[KIND, i])])


@compiled
def _forever(model: Any, streams: Any, due: Any, size: int, now: float) -> bool:
    """Whether pure decoding, from here on, surely meets every deadline for ever. Any of three proofs will do.

    One batch holds a token of everybody, is no longer than the tightest pace and in time for all: then so is
    the next one. Every stream has at least the slack it had at `MARK`: then the batches since can be repeated
    for ever. Every stream has a pace of slack, and batches as long as the tightest pace have room for each
    stream's share, one token in so many whole batches: unit jobs in equal slots (proportionate fairness).
    """
    perf, most, _, paces = model
    alive = share = 0.0
    slack = tightest = np.inf
    cyclic = ahead = True
    for i in range(size):
        tightest = min(tightest, paces[int(streams[KIND, i])])
    for i in range(size):
        pace = paces[int(streams[KIND, i])]
        alive += streams[MANY, i]
        share += streams[MANY, i] / np.floor(pace / tightest + TOLERANCE)
        slack = min(slack, due[i] - now)
        cyclic = cyclic and due[i] - now >= streams[MARK, i] - TOLERANCE
        ahead = ahead and due[i] - now >= pace - TOLERANCE
    if cyclic or (ahead and share <= np.floor(min(most, tokens_within(perf, tightest, 0.0, 0.0, 0.0)) + ROUNDING)):
        return True
    return alive <= most and batch_seconds(perf, alive, 0.0, 0.0, 0.0) <= min(slack, tightest) + TOLERANCE


@compiled
def _mark(paces: Any, streams: Any, due: Any, size: int, now: float, longest: int) -> None:
    """Note every stream's slack; a repetition needs two tokens more where items yield fractions of a token."""
    for i in range(size):
        streams[MARK, i] = due[i] - now + (2.0 * paces[int(streams[KIND, i])] if longest > 1 else 0.0)


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
def _draft_length(model: Any, streams: Any, due: Any, order: Any, size: int, now: float, longest: int) -> int:
    """The longest item up to `longest` that leaves room for all that is due when the batch must end.

    A batch that is full before it must end need not hold all of that: another follows in time.
    """
    perf, most, _, _ = model
    end = due[order[0]]
    for v in range(longest, 1, -1):
        must = 0.0
        for k in range(size):
            i = order[k]
            if due[i] > end + TOLERANCE:
                break
            must += streams[LEFT, i] if streams[LEFT, i] > 0.0 else v * streams[MANY, i]
        room = np.floor(tokens_within(perf, end - now, 0.0, 0.0, float(v)) + ROUNDING)
        if room >= min(must, most):
            return v
    return 1


@compiled
def earliest_deadline(model: Any, given: Any, size: int, longest: int) -> int:
    """Serve `given` [STREAM_COLUMNS, n] earliest deadline first, token by token, with items up to `longest`.

    Every batch ends when the earliest unmet deadline does, or when its work is done; each stream decodes at
    most once in it. Returns the stream visits it took, negative when a deadline is missed or no steady
    state is reached.
    """
    perf, most, gain, paces = model
    rows = size + SPLITS
    streams = np.empty((STREAM_COLUMNS, rows))
    streams[:, :size] = given[:, :size]
    streams[MARK] = np.inf
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
            if _forever(model, streams, due, size, now):
                return visits + size
            if settling & (settling - 1) == 0:
                _mark(paces, streams, due, size, now, longest)
            settling += 1
        if settling > SETTLE or visits > CONSTRUCTION_MOST:
            return -visits - 1
        v = _draft_length(model, streams, due, order, size, now, longest)
        steps = float(v) if v > 1 else 0.0
        room = min(most, np.floor(tokens_within(perf, due[order[0]] - now, 0.0, 0.0, steps) + ROUNDING))
        if room < 1.0:
            return -visits - 1
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
def supplied(model: Any, options: Any, jobs: Any, base: Any, taken: Any) -> Any:
    """Prefill tokens there can be by each class's due time, [classes], beside the decodes of `taken`.

    With it comes the rate afterwards, negative when the decodes cannot be kept up.
    """
    supply = np.empty(jobs.shape[1])
    counts = base.copy()
    idle = counts.sum() == 0
    rate = 0.0 if idle else fluid_rate(options, counts)
    total = at = 0.0
    for g in range(jobs.shape[1]):
        total = idle_tokens(model, jobs[DUE, g]) if idle else total + max(rate, 0.0) * (jobs[DUE, g] - at)
        at = jobs[DUE, g]
        supply[g] = total
        if taken[g] > 0:
            counts[int(jobs[TIER, g])] += taken[g]
            rate = fluid_rate(options, counts)
            idle = False
    return supply, rate


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
def _terms(model: Any, jobs: Any, price: Any, blocks_price: float) -> Any:
    """Suffix sums [TERM_ROWS, classes + 1] that make the Lagrangian bound of a state O(1).

    Any prices that fall with the due time give a valid bound; those of `_token_prices` give a good one. A
    class costs its prompt, its blocks, and at least one token per tpot from its due time on.
    """
    perf, _, _, paces = model
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
        gained = -cost
        if jobs[FORCED, g] == 0.0:
            gained = max(0.0, jobs[VALUE, g] - cost - blocks_price * jobs[BLOCKS, g])
        terms[REST, g] = terms[REST, g + 1] + gained * jobs[COPIES, g]
    return terms


@compiled
def _caps(model: Any, jobs: Any, base: Any) -> Any:
    """Prompt tokens that any real schedule can serve by each class's due time, [classes], beside `base` decodes.

    Tighter than the fluid supply because batches and tokens are counted whole: the tightest stream needs
    its n-th item, and so n batches, by the time its n items' tokens are due, and each batch pays its base.
    """
    perf, _, gain, paces = model
    caps = np.full(jobs.shape[1], np.inf)
    tightest = np.inf
    for tier in range(paces.size):
        if base[tier] > 0:
            tightest = min(tightest, paces[tier])
    if tightest == np.inf:
        return caps
    for g in range(jobs.shape[1]):
        due = jobs[DUE, g] + TOLERANCE
        batches = np.ceil(np.floor(due / tightest) / gain[-1] - TOLERANCE)
        tokens = (batches + 1.0) * tokens_within(perf, due / (batches + 1.0), 0.0, 0.0, 0.0)
        if batches > 0.0:
            end = due if gain.size > 2 else batches * tightest
            tokens = max(tokens, batches * tokens_within(perf, end / batches, 0.0, 0.0, 0.0))
        for tier in range(paces.size):
            tokens -= base[tier] * np.floor(due / paces[tier])
        caps[g] = max(tokens, 0.0) + ROUNDING * (batches + 1.0)
    return caps


@compiled
def _cap_terms(jobs: Any, price: Any, caps: Any, blocks_price: float) -> Any:
    """As `_terms`, from the caps."""
    classes = jobs.shape[1]
    terms = np.zeros((TERM_ROWS, classes + 1))
    terms[MEMORY, :] = blocks_price
    for g in range(classes - 1, -1, -1):
        step = price[g] - (price[g + 1] if g + 1 < classes else 0.0)
        terms[USES, g] = price[g]
        terms[CAPPED, g] = terms[CAPPED, g + 1] + (step * caps[g] if step > 0.0 else 0.0)
        gained = -jobs[PROMPT, g] * price[g]
        if jobs[FORCED, g] == 0.0:
            gained = max(0.0, jobs[VALUE, g] + gained - blocks_price * jobs[BLOCKS, g])
        terms[REST, g] = terms[REST, g + 1] + gained * jobs[COPIES, g]
    return terms


@compiled
def _bound(terms: Any, g: int, worth: float, room: float, rate: float, used: float, spare: float, unit: float) -> float:
    """The most a state can still be worth when the classes from `g` on are open; a multiple of `unit`.

    The state has `room` prefill tokens, `rate` more per second (negative: nobody decodes), `used` tokens of
    prompts taken, and `spare` blocks.
    """
    best = np.inf
    for k in range(terms.shape[1]):
        more = terms[g, k, REST] + terms[g, k, MEMORY] * spare + terms[g, k, CAPPED] - terms[g, k, USES] * used
        if rate < 0.0:
            more += terms[g, k, IDLE]
        else:
            more += terms[g, k, PRICE] * room + terms[g, k, PACED] * rate
        best = min(best, worth + more)
    if unit > 0.0:
        best = np.floor(best / unit + 1e-6) * unit
    return float(best)


@compiled
def constructed(model: Any, jobs: Any, fixed: Any, taken: Any, near: float, outcome: Any) -> bool:
    """Whether an earliest-deadline schedule serves the `fixed` streams and `taken` [classes] copies of `jobs`.

    Tries every longest item, or when `near` > 0 those about as long. Adds its work to `outcome`.
    """
    size = fixed.shape[1]
    streams = np.zeros((STREAM_COLUMNS, size + int(taken.sum())))
    streams[:, :size] = fixed
    for g in range(taken.size):
        for _ in range(0 if jobs[FORCED, g] > 0.0 else taken[g]):
            streams[ANCHOR, size] = jobs[DUE, g]
            streams[LEFT, size] = jobs[PROMPT, g]
            streams[KIND, size] = jobs[TIER, g]
            streams[MANY, size] = 1.0
            size += 1
    if size == 0:
        return True
    for longest in range(model[2].size - 1, 0, -1):
        if near > 0.0 and abs(longest - near) > 1.0:
            continue
        visits = earliest_deadline(model, streams, size, longest)
        outcome[VISITS] += abs(visits)
        if visits > 0:
            outcome[LENGTH] = longest
            return True
    return False


@compiled
def _trace(nodes: Any, node: int, taken: Any) -> None:
    """The copies of each class taken on the way to `node`."""
    taken[:] = 0
    while node >= 0:
        taken[nodes[CLASS, node]] = nodes[TAKEN, node]
        node = nodes[PARENT, node]


@compiled
def _hidden(states: Any, chain: Any, head: int, row: int, capped: bool) -> bool:
    """Whether a state of the bucket dominates `row`; one that `row` dominates gets the bound -inf.

    The tokens used count only where they are `capped`; otherwise what matters of them is in ROOM.
    """
    at = head
    while at >= 0:
        same = True
        for k in range(COUNTS, states.shape[1]):
            same = same and states[at, k] == states[row, k]
        if same:
            worth = states[at, WORTH] - states[row, WORTH]
            room = states[at, ROOM] - states[row, ROOM]
            spent = states[at, SPENT] - states[row, SPENT]
            used = states[at, USED] - states[row, USED] if capped else 0.0
            if worth >= 0.0 and room >= 0.0 and spent <= 0.0 and used <= 0.0:
                return True
            if worth <= 0.0 and room <= 0.0 and spent >= 0.0 and used >= 0.0:
                states[at, BOUND] = -np.inf
        at = chain[at]
    return False


@compiled
def _bucket(state: Any) -> int:
    key = 0
    for k in range(COUNTS, state.size):
        key = (key * 31 + int(state[k])) % 1000003
    return key % BUCKETS


@compiled
def _survivors(states: Any, size: int, width: int, ranked: bool, outcome: Any) -> Any:
    """The states that are not dominated and may still be best; those of highest bound when more than `width`."""
    alive = np.flatnonzero(states[:size, BOUND] > outcome[BEST] + TOLERANCE)
    if ranked or alive.size > width:
        alive = alive[np.argsort(-states[alive, BOUND], kind="mergesort")]
    if alive.size > width:
        outcome[DROPPED] = max(outcome[DROPPED], states[alive[width], BOUND])
    return states[alive[:width]]


@compiled
def _root(options: Any, base: Any, terms: Any, free: float, unit: float) -> Any:
    """The one state before the first class, [1, columns]."""
    states = np.zeros((1, COUNTS + base.size))
    states[0, COUNTS:] = base
    states[0, NODE] = -1.0
    states[0, RATE] = fluid_rate(options, base) if base.sum() > 0 else -1.0
    states[0, BOUND] = _bound(terms, 0, 0.0, 0.0, states[0, RATE], 0.0, free, unit)
    return states


@compiled
def _child(options: Any, space: Any, prices: Any, g: int, copies: int, parent: Any, child: Any, best: float) -> bool:
    """Make the state after taking `copies` of class `g`; False when it is outside the bounds or not above `best`.

    The bound is tried with too high a rate first (each decode costs at least a token per tpot), because the
    true one takes long.
    """
    jobs, _, _, free, paces = space
    terms, caps, unit = prices
    tier = int(jobs[TIER, g])
    worth = parent[WORTH] + copies * jobs[VALUE, g]
    room = parent[ROOM] - copies * jobs[PROMPT, g]
    used = parent[USED] + copies * jobs[PROMPT, g]
    spent = parent[SPENT] + copies * jobs[BLOCKS, g]
    rate = parent[RATE]
    if room < -TOLERANCE or spent > free or used > caps[g]:
        return False
    if copies > 0 and rate >= 0.0:
        rate = max(rate - copies / paces[tier], 0.0)
    bound = _bound(terms, g + 1, worth, room, rate, used, free - spent, unit)
    if bound <= best + TOLERANCE:
        return False
    for k in range(COUNTS, child.size):
        child[k] = parent[k]
    if copies > 0:
        child[COUNTS + tier] += copies
        rate = fluid_rate(options, child[COUNTS:])
        bound = _bound(terms, g + 1, worth, room, rate, used, free - spent, unit)
        if rate < 0.0 or bound <= best + TOLERANCE:
            return False
    child[WORTH] = worth
    child[ROOM] = room
    child[SPENT] = spent
    child[RATE] = rate
    child[BOUND] = bound
    child[USED] = used
    child[NODE] = parent[NODE]
    return True


@compiled
def _last_forced(jobs: Any) -> int:
    """The class up to which running requests are still to come; a state beyond it is a whole set."""
    last = 0
    for g in range(jobs.shape[1]):
        if jobs[FORCED, g] > 0.0:
            last = g
    return last


@compiled
def _expanded(
    model: Any,
    options: Any,
    space: Any,
    prices: Any,
    g: int,
    states: Any,
    after: Any,
    nodes: Any,
    made: int,
    limit: float,
    best: Any,
    outcome: Any,
) -> Any:
    """Fill `after` with what class `g` makes of `states`; returns how many and the nodes made so far.

    A `limit` >= 0 asks for the construction of every set, up to so many visits in all.
    """
    jobs, _, fixed, _, _ = space
    heads = np.full(BUCKETS, -1)
    chain = np.empty(after.shape[0], np.int64)
    taken = np.empty(jobs.shape[1], np.int64)
    span = jobs[DUE, g] - (jobs[DUE, g - 1] if g > 0 else 0.0)
    least = int(jobs[COPIES, g] * jobs[FORCED, g])
    prove = limit >= 0.0 and least == 0
    whole = g >= _last_forced(jobs)
    new = 0
    for parent in states:
        parent[ROOM] = idle_tokens(model, jobs[DUE, g]) if parent[RATE] < 0.0 else parent[ROOM] + parent[RATE] * span
        for copies in range(int(jobs[COPIES, g]), least - 1, -1):
            if new == after.shape[0] or made == MADE_MOST:
                outcome[DROPPED] = max(outcome[DROPPED], parent[BOUND])
                break
            child = after[new]
            if not _child(options, space, prices, g, copies, parent, child, outcome[BEST]):
                continue
            bucket = _bucket(child)
            if _hidden(after, chain, heads[bucket], new, limit >= 0.0):
                continue
            if copies > 0:
                if prove and outcome[VISITS] > limit:
                    outcome[DROPPED] = max(outcome[DROPPED], child[BOUND])
                    continue
                nodes[PARENT, made] = int(parent[NODE])
                nodes[CLASS, made] = g
                nodes[TAKEN, made] = copies
                child[NODE] = made
                made += 1
                better = whole and child[WORTH] > outcome[BEST]
                if prove or better:
                    _trace(nodes, made - 1, taken)
                if prove and not constructed(model, jobs, fixed, taken, outcome[NEAR], outcome):
                    continue
                if better:
                    outcome[BEST] = child[WORTH]
                    best[:] = taken
            chain[new] = heads[bucket]
            heads[bucket] = new
            new += 1
    return new, made


@compiled
def search(
    model: Any, options: Any, space: Any, prices: Any, width: int, visits: float, best: Any, outcome: Any
) -> None:
    """One pass through the classes for a set worth more than `outcome[BEST]`; leaves it in `best` [classes].

    `space` is (jobs, base, fixed, free, tpots), `prices` (terms, caps, unit). At most `width` states outlive a class.
    With `visits` > 0 every set must pass the construction, and each class gets its share of so many visits.
    """
    jobs, base, _, free, _ = space
    terms, _, unit = prices
    states = _root(options, base, terms, free, unit)
    after = np.empty((4 * width, states.shape[1]))
    nodes = np.empty((3, MADE_MOST), np.int64)
    last = outcome[VISITS] + visits
    outcome[NEAR] = outcome[LENGTH]
    made = 0
    for g in range(jobs.shape[1]):
        limit = -1.0
        if visits > 0.0:
            limit = outcome[VISITS] + max(last - outcome[VISITS], 0.0) / (jobs.shape[1] - g)
        size, made = _expanded(model, options, space, prices, g, states, after, nodes, made, limit, best, outcome)
        states = _survivors(after, size, width, visits > 0.0, outcome)
    outcome[MADE] += made


@compiled
def fill(model: Any, jobs: Any, fixed: Any, free: float, visits: float, best: Any, outcome: Any) -> None:
    """Make `best` [classes] a set that the construction serves, and try to add what it lacks.

    Moore-Hodgson on the real schedule: in order of deadlines, whenever the taken ones cannot be served, the
    one that is worth least per token is set back; then the others are offered a place, those worth most per
    token first, until `visits` are spent.
    """
    order = np.argsort(jobs[VALUE] / np.maximum(jobs[PROMPT], 1.0), kind="mergesort")
    wanted = best.copy()
    for g in range(best.size):
        if jobs[FORCED, g] == 0.0:
            best[g] = 0
    spent = 0.0
    for g in range(best.size):
        for _ in range(0 if jobs[FORCED, g] > 0.0 else wanted[g]):
            best[g] += 1
            spent += jobs[BLOCKS, g]
            while not constructed(model, jobs, fixed, best, 0.0, outcome):
                for other in order:
                    if best[other] > 0 and jobs[FORCED, other] == 0.0:
                        best[other] -= 1
                        spent -= jobs[BLOCKS, other]
                        break
    for g in order[::-1]:
        while jobs[FORCED, g] == 0.0 and best[g] < jobs[COPIES, g] and spent + jobs[BLOCKS, g] <= free:
            if outcome[VISITS] > visits:
                return
            best[g] += 1
            if not constructed(model, jobs, fixed, best, 0.0, outcome):
                best[g] -= 1
                break
            spent += jobs[BLOCKS, g]


@compiled
def _before(table: Any, i: int, j: int) -> bool:
    """The order of classes: by due time, and identical requests together."""
    for k in range(table.shape[0]):
        if table[k, i] != table[k, j]:
            return bool(table[k, i] < table[k, j])
    return False


@compiled
def classified(requests: Any, now: float, free: float, level: int) -> Any:
    """Requests as (jobs, base, fixed, rows, first): identical ones merged, by due time.

    base [`level` tiers] counts the decodes that are in step, fixed [STREAM_COLUMNS, n] has the streams of all
    running requests, and class g consists of the requests `rows[first[g] : first[g + 1]]`.
    """
    deadlines, prompts, blocks, tiers, values, running = requests
    table = np.empty((JOB_COLUMNS, deadlines.size))
    rows = np.empty(deadlines.size, np.int64)
    base = np.zeros(level, np.int64)
    size = 0
    wanted = 0.0
    for i in range(deadlines.size):
        due = max(deadlines[i] - now, 0.0)
        if running[i] and prompts[i] == 0 and due == 0.0:
            base[tiers[i]] += 1
        elif running[i] or (values[i] > 0.0 and blocks[i] <= free):
            table[DUE, size] = due
            table[PROMPT, size] = prompts[i]
            table[BLOCKS, size] = 0.0 if running[i] else blocks[i]
            table[VALUE, size] = 0.0 if running[i] else values[i]
            table[COPIES, size] = 1.0
            table[TIER, size] = tiers[i]
            table[FORCED, size] = 1.0 if running[i] else 0.0
            wanted += table[BLOCKS, size]
            rows[size] = i
            size += 1
    if wanted <= free:
        table[BLOCKS, :size] = 0.0
    order = np.argsort(table[DUE, :size], kind="mergesort")
    for i in range(1, size):
        item = order[i]
        at = i
        while at > 0 and _before(table, item, order[at - 1]):
            order[at] = order[at - 1]
            at -= 1
        order[at] = item
    first = np.zeros(size + 1, np.int64)
    classes = 0
    for i in range(size):
        if i == 0 or _before(table, order[i - 1], order[i]):
            first[classes] = i
            classes += 1
    first[classes] = size
    jobs = table[:, order[first[:classes]]].copy()
    jobs[COPIES] = first[1 : classes + 1] - first[:classes]
    return jobs, base, _fixed(jobs, base), rows[order], first[: classes + 1]


@compiled
def _fixed(jobs: Any, base: Any) -> Any:
    """The streams of the running requests: one per tier of decodes in step, one per forced class."""
    streams = np.zeros((STREAM_COLUMNS, base.size + jobs.shape[1]))
    size = 0
    for tier in range(base.size):
        if base[tier] > 0:
            streams[KIND, size] = tier
            streams[MANY, size] = base[tier]
            size += 1
    for g in range(jobs.shape[1]):
        if jobs[FORCED, g] > 0.0:
            streams[ANCHOR, size] = jobs[DUE, g]
            streams[LEFT, size] = jobs[PROMPT, g] * jobs[COPIES, g]
            streams[KIND, size] = jobs[TIER, g]
            streams[MANY, size] = jobs[COPIES, g]
            size += 1
    return streams[:, :size].copy()


@compiled
def priced(model: Any, jobs: Any, supply: Any, capped: bool, free: float) -> Any:
    """Terms of the Lagrangian bound, [classes + 1, 1 or 3, TERM_ROWS], at prices where supply meets demand.

    `supply` is what the fluid bound has, or, when `capped`, the caps. Where memory binds too, its price is
    bisected and the terms on both sides of it are added.
    """
    used = np.zeros(1)
    prices = np.zeros(3)
    _token_prices(jobs, supply, 0.0, used)
    sets = 1
    if used[0] > free:
        sets = 3
        for g in range(jobs.shape[1]):
            prices[2] = max(prices[2], jobs[VALUE, g] / max(jobs[BLOCKS, g], 1.0))
        for _ in range(PRICE_STEPS):
            middle = 0.5 * (prices[1] + prices[2])
            _token_prices(jobs, supply, middle, used)
            prices[1 if used[0] > free else 2] = middle
    terms = np.empty((jobs.shape[1] + 1, sets, TERM_ROWS))
    for k in range(sets):
        price = _token_prices(jobs, supply, prices[k], used)
        if capped:
            terms[:, k] = _cap_terms(jobs, price, supply, prices[k]).T
        else:
            terms[:, k] = _terms(model, jobs, price, prices[k]).T
    return terms


@compiled
def _scaled(jobs: Any) -> Any:
    """Divides the values by a power of two that makes them at most 1; returns it and the unit of the scaled values.

    The unit is the largest whole number that divides every value, over the power; 0 when they are not whole.
    """
    scale = 1.0
    unit = 0
    whole = True
    for value in jobs[VALUE]:
        while scale < value:
            scale *= 2.0
    for value in jobs[VALUE]:
        while value > 0.0 and scale > 2.0 * jobs[VALUE].max():
            scale *= 0.5
        whole = whole and value < 2.0**52 and value == np.floor(value)
    for value in jobs[VALUE]:
        rest = int(value) if whole else 0
        while rest > 0:
            unit, rest = rest, unit % rest
    jobs[VALUE] /= scale
    return scale, unit / scale


@compiled
def _fluid_optimum(
    model: Any, options: Any, space: Any, supply: Any, unit: float, effort: int, best: Any, outcome: Any
) -> None:
    """A narrow pass, and when that dropped anything a wide one with prices learnt from its result."""
    jobs, base, _, free, _ = space
    caps = np.full(jobs.shape[1], np.inf)
    terms = priced(model, jobs, supply, False, free)
    search(model, options, space, (terms, caps, unit), NARROW, 0.0, best, outcome)
    if outcome[DROPPED] > outcome[BEST] + TOLERANCE:
        outcome[DROPPED] = -np.inf
        terms = priced(model, jobs, supplied(model, options, jobs, base, best)[0], False, free)
        search(model, options, space, (terms, caps, unit), WIDE * effort, 0.0, best, outcome)


@compiled
def _constructive_optimum(
    model: Any, options: Any, space: Any, unit: float, effort: int, best: Any, outcome: Any
) -> None:
    """From a fluid optimum that no schedule serves to the best set that one does."""
    jobs, base, fixed, free, _ = space
    visits = float(VISITS_MOST * effort)
    terms = priced(model, jobs, supplied(model, options, jobs, base, best)[0], False, free)
    caps = _caps(model, jobs, base)
    if base.sum() > 0:
        terms = np.concatenate((terms, priced(model, jobs, caps, True, free)), axis=1)
    fill(model, jobs, fixed, free, visits, best, outcome)
    outcome[BEST] = (jobs[VALUE] * best).sum()
    outcome[DROPPED] = -np.inf
    search(model, options, space, (terms, caps, unit), PROVED * effort, visits, best, outcome)


@compiled
def _solved(model: Any, requests: Any, now: float, free: float, constructive: bool, effort: int) -> Any:
    """The rows accepted, and (value, bound, exact, kept, states made); see `AdmissionResult`."""
    perf, most, gain, paces = model
    jobs, base, fixed, rows, first = classified(requests, now, free, paces.size)
    scale, unit = _scaled(jobs)
    options = fluid_options(perf, most, gain, paces)
    best = (jobs[FORCED] * jobs[COPIES]).astype(np.int64)
    effort *= min(4, max(1, FEW // max(jobs.shape[1], 1)))
    outcome = np.zeros(OUTCOMES)
    outcome[DROPPED] = -np.inf
    supply, rate = supplied(model, options, jobs, base, best)
    kept = rate >= 0.0 and (np.cumsum(jobs[PROMPT] * best) <= supply + TOLERANCE).all()
    if not kept or (constructive and not constructed(model, jobs, fixed, best, 0.0, outcome)):
        return rows[:0], (0.0, 0.0, True, False, 0)
    space = (jobs, base, fixed, free, paces)
    _fluid_optimum(model, options, space, supply, unit, effort, best, outcome)
    bound = max(outcome[BEST], outcome[DROPPED]) * scale
    if constructive and not constructed(model, jobs, fixed, best, 0.0, outcome):
        _constructive_optimum(model, options, space, unit, effort, best, outcome)
    chosen = np.zeros(rows.size, np.bool_)
    for g in range(best.size):
        if jobs[FORCED, g] == 0.0:
            chosen[first[g] : first[g] + best[g]] = True
    exact = outcome[DROPPED] <= outcome[BEST] + TOLERANCE
    return np.sort(rows[chosen]), (outcome[BEST] * scale, bound, exact, True, int(outcome[MADE]))


def warm() -> None:
    """Compile, or load, everything that `admit_exact` calls: seconds that no plan should wait for."""
    prompts = np.array([0, 520])  # fits the fluid bound beside one decode, not a schedule: every pass runs
    columns = (np.array([0.0, 0.09]), prompts, prompts, np.zeros(2, np.int64), np.ones(2), np.array([True, False]))
    admit_exact(AdmissionProblem(0.0, ((1e-4, 0.0, 0.02),), 16384, (0.05,), 1000, *columns))


def admit_exact(problem: AdmissionProblem, *, constructive: bool = True, effort: int = 1) -> AdmissionResult:
    """The new requests to accept, of the highest summed value.

    Without `constructive`, the optimum under the fluid bound alone, which a real schedule may not reach.
    `effort` multiplies the bounds on work of the passes that prove. Raises ValueError when it is below 1.
    """
    _check(effort >= 1, "effort: must be >= 1", effort)
    model = (problem.perf, float(problem.max_batch_tokens), problem.gain, problem.paces)
    requests = (problem.deadlines, problem.prompts, problem.blocks, problem.tiers, problem.values, problem.running)
    rows, report = _solved(model, requests, float(problem.now), float(problem.free_blocks), constructive, effort)
    accepted = tuple(rows.tolist())
    return AdmissionResult(accepted, *report)
