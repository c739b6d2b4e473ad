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
WIDE = [384]  # states kept per class of requests in the pass that has to be exact
EXPANSIONS: Final = 20_000  # states made by one pass, at most
CONSTRUCTIONS: Final = 60_000  # stream visits of the earliest-deadline construction in one search, at most
PROVEN = [16, 60000.0]
PRICE_STEPS: Final = 10  # bisections of the price of memory
SPLITS: Final = 256  # how often the construction may serve only a part of identical streams
SETTLE: Final = 128  # batches after the last prompt within which a schedule must have become periodic
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
BUCKETS: Final = 1024

# Rows of `nodes`: the trail of what was taken.
PARENT: Final = 0
CLASS: Final = 1
TAKEN: Final = 2

# What a search reports.
BEST: Final = 0  # the value of the best set
DROPPED: Final = 1  # the highest bound among states that were dropped for want of room
MADE: Final = 2  # states
VISITS: Final = 3  # streams visited by the construction
OUTCOMES: Final = 4


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
    """Whether pure decoding, from here on, surely meets every deadline for ever.

    Either one batch holds a token of everybody, is no longer than the tightest pace and in time for all: then
    so is the next one. Or every stream has at least the slack it had before (`MARK`): then the batches since
    can be repeated for ever.
    """
    perf, most, _, paces = model
    alive = 0.0
    slack = np.inf
    cyclic = True
    for i in range(size):
        alive += streams[MANY, i]
        slack = min(slack, due[i] - now, paces[int(streams[KIND, i])])
        cyclic = cyclic and due[i] - now >= streams[MARK, i] - TOLERANCE
    return cyclic or (alive <= most and batch_seconds(perf, alive, 0.0, 0.0, 0.0) <= slack + TOLERANCE)


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
    """The longest item up to `longest` whose batch holds all that is due when it must end; 0 when none does."""
    perf, most, _, _ = model
    end = due[order[0]]
    for v in range(longest, 0, -1):
        must = 0.0
        for k in range(size):
            i = order[k]
            if due[i] > end + TOLERANCE:
                break
            must += streams[LEFT, i] if streams[LEFT, i] > 0.0 else v * streams[MANY, i]
        steps = float(v) if v > 1 else 0.0
        if must <= min(most, np.floor(tokens_within(perf, end - now, 0.0, 0.0, steps) + 1e-6)):
            return v
    return 0


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
        if settling > SETTLE or visits > CONSTRUCTIONS:
            return -visits - 1
        v = _draft_length(model, streams, due, order, size, now, longest)
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
        if jobs[FORCED, g] > 0.0:
            gained = -cost
        else:
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
        caps[g] = max(tokens, 0.0)
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
def _bound(terms: Any, g: int, state: Any, free: float, unit: float) -> float:
    """The most a state can still be worth when the classes from `g` on are open; a multiple of `unit`."""
    best = np.inf
    for k in range(terms.shape[0]):
        more = terms[k, REST, g] + terms[k, MEMORY, g] * (free - state[SPENT])
        more += terms[k, CAPPED, g] - terms[k, USES, g] * state[USED]
        if state[RATE] < 0.0:
            more += terms[k, IDLE, g]
        else:
            more += terms[k, PRICE, g] * state[ROOM] + terms[k, PACED, g] * state[RATE]
        best = min(best, state[WORTH] + more)
    if unit > 0.0:
        best = np.floor(best / unit + 1e-6) * unit
    return float(best)


@compiled
def constructed(model: Any, jobs: Any, fixed: Any, taken: Any, outcome: Any) -> bool:
    """Whether an earliest-deadline schedule serves the `fixed` streams and `taken` [classes] copies of `jobs`.

    Tries every longest item, long ones first. Adds its work to `outcome`.
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
        visits = earliest_deadline(model, streams, size, longest)
        outcome[VISITS] += abs(visits)
        if visits > 0:
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
def _child(model: Any, job: Any, copies: int, parent: Any, child: Any) -> None:
    """The state after taking `copies` of a class, with a rate that is not too low: a decode costs a token per tpot."""
    child[:] = parent
    child[WORTH] += copies * job[VALUE]
    child[ROOM] -= copies * job[PROMPT]
    child[USED] += copies * job[PROMPT]
    child[SPENT] += copies * job[BLOCKS] * (1.0 - job[FORCED])
    child[COUNTS + int(job[TIER])] += copies
    if copies > 0 and parent[RATE] >= 0.0:
        child[RATE] = max(parent[RATE] - copies / model[3][int(job[TIER])], 0.0)


@compiled
def _hidden(states: Any, chain: Any, head: int, row: int) -> bool:
    """Whether a state of the bucket dominates `row`; one that `row` dominates gets the bound -inf."""
    at = head
    while at >= 0:
        same = True
        for k in range(COUNTS, states.shape[1]):
            same = same and states[at, k] == states[row, k]
        if same:
            worth = states[at, WORTH] - states[row, WORTH]
            room = states[at, ROOM] - states[row, ROOM]
            spent = states[at, SPENT] - states[row, SPENT]
            if worth >= 0.0 and room >= 0.0 and spent <= 0.0:
                return True
            if worth <= 0.0 and room <= 0.0 and spent >= 0.0:
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
def _survivors(states: Any, size: int, width: int, outcome: Any) -> Any:
    """The states that are not dominated, those of highest bound when there are more than `width`."""
    rank = np.argsort(-states[:size, BOUND], kind="mergesort")
    alive = 0
    while alive < size and states[rank[alive], BOUND] > -np.inf:
        alive += 1
    if alive > width:
        outcome[DROPPED] = max(outcome[DROPPED], states[rank[width], BOUND])
    return states[rank[: min(alive, width)]]


@compiled
def _passes(options: Any, terms: Any, g: int, copies: int, child: Any, free: float, unit: float, best: float) -> bool:
    """Whether a state is within the fluid bound after class `g` and may still beat `best`; sets RATE and BOUND."""
    child[BOUND] = _bound(terms, g + 1, child, free, unit)
    if child[BOUND] > best + TOLERANCE and copies > 0:
        child[RATE] = fluid_rate(options, child[COUNTS:])
        child[BOUND] = _bound(terms, g + 1, child, free, unit) if child[RATE] >= 0.0 else -np.inf
    return bool(child[BOUND] > best + TOLERANCE)


@compiled
def _root(options: Any, base: Any, terms: Any, free: float, unit: float) -> Any:
    """The one state before the first class, [1, columns]."""
    states = np.zeros((1, COUNTS + base.size))
    states[0, COUNTS:] = base
    states[0, NODE] = -1.0
    states[0, RATE] = fluid_rate(options, base) if base.sum() > 0 else -1.0
    states[0, BOUND] = _bound(terms, 0, states[0], free, unit)
    return states


@compiled
def search(
    model: Any,
    options: Any,
    jobs: Any,
    base: Any,
    fixed: Any,
    free: float,
    terms: Any,
    caps: Any,
    unit: float,
    width: int,
    visits: float,
    best: Any,
    outcome: Any,
) -> None:
    """One pass through the classes for a set worth more than `outcome[BEST]`; leaves it in `best` [classes].

    At most `width` states outlive a class. With `visits` > 0 every state must also pass the construction, and
    each class gets its share of so many visits of streams.
    """
    classes = jobs.shape[1]
    capacity = 4 * width
    states = _root(options, base, terms, free, unit)
    after = np.empty((capacity, states.shape[1]))
    chain = np.empty(capacity, np.int64)
    heads = np.empty(BUCKETS, np.int64)
    nodes = np.empty((3, EXPANSIONS), np.int64)
    taken = np.zeros(classes, np.int64)
    last = outcome[VISITS] + visits
    made = 0
    final = 0
    for g in range(classes):
        if jobs[FORCED, g] > 0.0:
            final = g
    for g in range(classes):
        heads[:] = -1
        new = 0
        limit = outcome[VISITS] + (last - outcome[VISITS]) / (classes - g)
        for parent in states:
            if parent[RATE] < 0.0:
                parent[ROOM] = idle_tokens(model, jobs[DUE, g])
            else:
                parent[ROOM] += parent[RATE] * (jobs[DUE, g] - (jobs[DUE, g - 1] if g > 0 else 0.0))
            least = int(jobs[COPIES, g] * jobs[FORCED, g])
            for copies in range(int(jobs[COPIES, g]), least - 1, -1):
                if new == capacity or made == EXPANSIONS:
                    outcome[DROPPED] = max(outcome[DROPPED], parent[BOUND])
                    break
                child = after[new]
                _child(model, jobs[:, g], copies, parent, child)
                if child[ROOM] < -TOLERANCE or child[SPENT] > free or child[USED] > caps[g]:
                    continue
                if not _passes(options, terms, g, copies, child, free, unit, outcome[BEST]):
                    continue
                bucket = _bucket(child)
                if _hidden(after, chain, heads[bucket], new):
                    continue
                if copies > 0:
                    prove = visits > 0.0 and least == 0
                    if prove and outcome[VISITS] > limit:
                        outcome[DROPPED] = max(outcome[DROPPED], child[BOUND])
                        continue
                    nodes[PARENT, made] = int(parent[NODE])
                    nodes[CLASS, made] = g
                    nodes[TAKEN, made] = copies
                    child[NODE] = made
                    made += 1
                    better = g >= final and child[WORTH] > outcome[BEST]
                    if prove or better:
                        _trace(nodes, made - 1, taken)
                    if prove and not constructed(model, jobs, fixed, taken, outcome):
                        continue
                    if better:
                        outcome[BEST] = child[WORTH]
                        best[:] = taken
                chain[new] = heads[bucket]
                heads[bucket] = new
                new += 1
        states = _survivors(after, new, width, outcome)
    outcome[MADE] += made


@compiled
def fill(model: Any, jobs: Any, fixed: Any, free: float, order: Any, best: Any, outcome: Any) -> None:
    """Make `best` [classes] a set that the construction serves, and try to add what it lacks.

    Moore-Hodgson on the real schedule: in order of deadlines, whenever the taken ones cannot be served, the
    one that comes first in `order` is set back; then the others are offered a place, last in `order` first.
    """
    wanted = best.copy()
    for g in range(best.size):
        if jobs[FORCED, g] == 0.0:
            best[g] = 0
    spent = 0.0
    for g in range(best.size):
        for _ in range(0 if jobs[FORCED, g] > 0.0 else wanted[g]):
            best[g] += 1
            spent += jobs[BLOCKS, g]
            while not constructed(model, jobs, fixed, best, outcome):
                for other in order:
                    if best[other] > 0 and jobs[FORCED, other] == 0.0:
                        best[other] -= 1
                        spent -= jobs[BLOCKS, other]
                        break
    for g in order[::-1]:
        while jobs[FORCED, g] == 0.0 and best[g] < jobs[COPIES, g] and spent + jobs[BLOCKS, g] <= free:
            best[g] += 1
            if not constructed(model, jobs, fixed, best, outcome):
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
def classified(
    now: float, free: float, deadlines: Any, prompts: Any, blocks: Any, tiers: Any, values: Any, running: Any, level: int
) -> Any:
    """Requests as (jobs, base, fixed, rows, first): identical ones merged, by due time.

    base [`level` tiers] counts the decodes that are in step, fixed [STREAM_COLUMNS, n] has the streams of all
    running requests, and class g consists of the requests `rows[first[g] : first[g + 1]]`.
    """
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
    """Terms of the Lagrangian bound, [1 or 3, TERM_ROWS, classes + 1], at prices where supply meets demand.

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
    terms = np.empty((sets, TERM_ROWS, jobs.shape[1] + 1))
    for k in range(sets):
        price = _token_prices(jobs, supply, prices[k], used)
        if capped:
            terms[k] = _cap_terms(jobs, price, supply, prices[k])
        else:
            terms[k] = _terms(model, jobs, price, prices[k])
    return terms


@dataclass(frozen=True, slots=True)
class _Task:
    """A problem as the compiled functions take it; class g are the requests `rows[first[g] : first[g + 1]]`."""

    model: tuple[Any, float, Any, Any]  # perf, max batch tokens, gain, tpots
    options: tuple[Any, Any, Any]  # see `fluid_options`
    jobs: NDArray[np.float64]
    base: NDArray[np.int64]
    fixed: NDArray[np.float64]
    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    free: float
    unit: float

    def supply(self, taken: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
        supply, rate = supplied(self.model, self.options, self.jobs, self.base, taken)
        return supply, float(rate)

    def serves(self, taken: NDArray[np.int64], outcome: NDArray[np.float64]) -> bool:
        return bool(constructed(self.model, self.jobs, self.fixed, taken, outcome))


def _prepare(problem: AdmissionProblem) -> _Task:
    model = (problem.perf, float(problem.max_batch_tokens), problem.gain, np.array(problem.tpots))
    requests = (problem.deadlines, problem.prompts, problem.blocks, problem.tiers, problem.values, problem.running)
    free = float(problem.free_blocks)
    parts = classified(problem.now, free, *requests, len(problem.tpots))
    values = parts[0][VALUE]
    return _Task(model, fluid_options(*model), *parts, free, _unit(values[values > 0.0]))


def _unit(values: NDArray[np.float64]) -> float:
    """The largest integer that divides every value; 0 when they are not whole."""
    whole = values.astype(np.int64) if values.size and values.max() < 2**52 else values[:0]
    return float(np.gcd.reduce(whole)) if whole.size and (whole == values).all() else 0.0


def admit_exact(problem: AdmissionProblem, *, constructive: bool = True) -> AdmissionResult:
    """The new requests to accept; without `constructive` the optimum under the fluid bound alone."""
    task = _prepare(problem)
    kept = (task.jobs[FORCED] * task.jobs[COPIES]).astype(np.int64)
    outcome = np.array([0.0, -np.inf, 0.0, 0.0])
    supply, rate = task.supply(kept)
    possible = rate >= 0.0 and bool((np.cumsum(task.jobs[PROMPT] * kept) <= supply + TOLERANCE).all())
    if not possible or (constructive and not task.serves(kept, outcome)):
        return AdmissionResult((), 0.0, 0.0, True, False, 0)
    best = kept.copy()
    _fluid_optimum(task, supply, best, outcome)
    bound = float(max(outcome[BEST], outcome[DROPPED]))
    if constructive and not task.serves(best, outcome):
        _constructive_optimum(task, best, outcome)
    exact = bool(outcome[DROPPED] <= outcome[BEST] + TOLERANCE)
    taken = best - kept
    chosen = sorted(int(i) for g in np.flatnonzero(taken) for i in task.rows[task.first[g] :][: taken[g]])
    return AdmissionResult(tuple(chosen), float(problem.values[chosen].sum()), bound, exact, True, int(outcome[MADE]))


def _fluid_optimum(
    task: _Task, supply: NDArray[np.float64], best: NDArray[np.int64], outcome: NDArray[np.float64]
) -> None:
    """A narrow pass, and when that dropped anything a wide one with prices learnt from its result."""
    caps = np.full(best.size, np.inf)
    terms = priced(task.model, task.jobs, supply, False, task.free)
    _pass(task, terms, caps, NARROW, 0.0, best, outcome)
    if outcome[DROPPED] > outcome[BEST] + TOLERANCE:
        outcome[DROPPED] = -np.inf
        learnt = priced(task.model, task.jobs, task.supply(best)[0], False, task.free)
        _pass(task, np.concatenate([terms, learnt]), caps, WIDE[0], 0.0, best, outcome)


def _constructive_optimum(task: _Task, best: NDArray[np.int64], outcome: NDArray[np.float64]) -> None:
    """From a fluid optimum that no schedule serves to the best set that one does."""
    terms = priced(task.model, task.jobs, task.supply(best)[0], False, task.free)
    caps = _caps(task.model, task.jobs, task.base)
    if task.base.any():
        terms = np.concatenate([terms, priced(task.model, task.jobs, caps, True, task.free)])
    worth = task.jobs[VALUE] / np.maximum(task.jobs[PROMPT], 1.0)
    fill(task.model, task.jobs, task.fixed, task.free, np.argsort(worth, kind="stable"), best, outcome)
    outcome[BEST] = (task.jobs[VALUE] * best).sum()
    outcome[DROPPED] = -np.inf
    _pass(task, terms, caps, PROVEN[0], PROVEN[1], best, outcome)


def _pass(
    task: _Task,
    terms: NDArray[np.float64],
    caps: NDArray[np.float64],
    width: int,
    visits: float,
    best: NDArray[np.int64],
    outcome: NDArray[np.float64],
) -> None:
    given = (task.model, task.options, task.jobs, task.base, task.fixed, task.free)
    search(*given, terms, caps, task.unit, width, visits, best, outcome)
