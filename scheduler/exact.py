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

    the arrays a problem becomes   exact_jobs.py
    the fluid bound                exact_fluid.py
    the construction               exact_schedule.py
    the Lagrangian bound           exact_prices.py
    the search                     exact_search.py

Never reads a clock, never changes its input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .exact_fluid import fluid_options, supplied
from .exact_jobs import BEST, COPIES, DROPPED, FORCED, MADE, OUTCOMES, PROMPT, TOLERANCE, VALUE, classified
from .exact_prices import capped_tokens, priced
from .exact_schedule import constructed
from .exact_search import fill, search
from .jit import compiled
from .perf import PerfModel, Piece
from .timemodel import pack

# Bounds on work, beside those of the search and the construction: about a millisecond for 32 waiting requests,
# two for 64.
NARROW: Final = 12  # states kept per class of requests in the first pass, which only has to be good
WIDE: Final = 32  # states kept in the second pass, which has to be exact; times the effort
PROVED: Final = 8  # states kept where every one of them has to pass the construction; times the effort
VISITS_MOST: Final = 8_000  # stream visits of the construction in that pass; times the effort
FEW: Final = 48  # with fewer classes the effort is multiplied, up to 4 times, at no more time in all


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
    caps = capped_tokens(model, jobs, base)
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
