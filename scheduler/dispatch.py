"""Which instance gets a request: a pure ranking of what is known about each, best first.

An instance tells its `Load`; a `Fleet` keeps the latest of each as columns; `rank` orders them for one `Ask`.
The router and the simulator call the same code. Nothing here sends, waits or reads a clock: the age of what
an instance told is an argument.

An instance can keep a promise when it has the memory, when one more decode fits within the tightest pace
there, and when the prompt would be computed in time behind the promised prompts that wait. Among those the
one goes first whose first token is expected earliest for its slack. What has to be computed counts beyond that: where
many wait, a prefix that is computed once more elsewhere makes all of them later, so a session stays at its home
unless another instance is much better. Equal ones take turns.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .core import Capabilities, Ints, Snapshot
from .jit import compiled
from .perf import BatchShape

Floats: TypeAlias = NDArray[np.float64]
Order: TypeAlias = NDArray[np.int64]

CAP_SECONDS: Final = 0.08  # the longest iteration that a planner makes while anything is promised
STALE_SECONDS: Final = 1.0  # a load this old counts half as much again as it said
LATE: Final = 1e3  # keeps every instance that cannot keep the promise behind all that can
UNFIT: Final = 1e6  # and those without memory or pace behind those that are only late
NOTICED_SECONDS: Final = 0.05  # differences of this size say nothing about an instance's speed
FORGIVING: Final = 0.98  # of an instance's slowness, what is left at the next load
BALANCE: Final = 0.3  # cost of having twice as many requests as the others
WORK: Final = 5.0  # what a second of prefill costs all that come later, in seconds of this request
PROBABLY_CACHED: Final = 0.5  # share of a session's prompt assumed cached at its home by name
AFFINITY: Final = 0.25  # cost of making a loose instance run at a tight pace, at worst


@dataclass(frozen=True, slots=True)
class Load:
    """What one instance has to do, as it says itself. Seconds, tokens, blocks, requests.

    `queued_tokens` are promised prompt tokens not computed yet, `idle_tokens` those of best effort. An iteration
    of the present decodes takes `step` seconds and each further token `per_token`. `tightest` is the smallest
    TPOT promised to anybody here. A batch has room for `slots` requests.
    """

    queued_tokens: float = 0.0
    idle_tokens: float = 0.0
    requests: float = 0.0
    decodes: float = 0.0
    step: float = 0.005
    per_token: float = 0.0001
    tightest: float = math.inf
    free_blocks: float = math.inf
    num_blocks: float = math.inf
    block_tokens: float = 16.0
    slots: float = math.inf

    def to_json(self) -> dict[str, float | None]:
        """JSON has no infinity: null stands for it."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Load:
        """Inverse of `to_json`; unknown keys are left out. Raises ValueError naming an absurd field."""
        values: dict[str, float] = {}
        for each in fields(Load):
            value = data.get(each.name, each.default)
            number = math.inf if value is None else value
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not number >= 0:
                raise ValueError(f"load {each.name}: must be a number of at least 0, got {value!r}")
            values[each.name] = float(number)
        for name in ("step", "per_token", "block_tokens"):
            if not 0 < values[name] < math.inf:
                raise ValueError(f"load {name}: must be above 0 and finite, got {values[name]!r}")
        return Load(**values)


def load_of(
    snapshot: Snapshot,
    capabilities: Capabilities,
    seconds: Callable[[BatchShape], float],
    *,
    queued_tokens: int,
    decode_context: int,
    tightest: float,
) -> Load:
    """The load of a planner whose state is `snapshot`. `seconds` is the time of a batch as learned so far."""
    decodes = snapshot.decoding
    step = seconds(BatchShape(max(decodes, 1), decode_context, 0.0, 0))
    room = max(capabilities.max_batch_tokens - decodes, 1)
    full = seconds(BatchShape(decodes + room, decode_context, 0.5 * room * room, 0))
    queued = min(queued_tokens, snapshot.waiting_tokens)
    return Load(
        queued_tokens=float(queued),
        idle_tokens=float(snapshot.waiting_tokens - queued),
        requests=float(snapshot.waiting + snapshot.prefilling + decodes),
        decodes=float(decodes),
        step=max(step, 1e-6),
        per_token=max((full - step) / room, 1e-9),
        tightest=tightest,
        free_blocks=float(snapshot.free_blocks),
        num_blocks=float(snapshot.num_blocks),
        block_tokens=float(capabilities.block_tokens),
        slots=float(capabilities.max_batch_requests),
    )


@dataclass(frozen=True, slots=True)
class Ask:
    """What a dispatcher knows of a request. `ttft` is what is left until its first token is due; infinite `ttft`
    or `tpot`: nothing promised. `cached` names instances that have so many of its prompt tokens in their cache."""

    prompt_tokens: float
    new_tokens: float = 0.0
    ttft: float = math.inf
    tpot: float = math.inf
    cached: Mapping[str, float] | None = None


# Rows of `Fleet.table`: the fields of Load, then what the dispatcher observed itself.
_ROW: Final[Mapping[str, int]] = {each.name: row for row, each in enumerate(fields(Load))}
_QUEUED: Final = _ROW["queued_tokens"]
_IDLE: Final = _ROW["idle_tokens"]
_REQUESTS: Final = _ROW["requests"]
_STEP: Final = _ROW["step"]
_PER_TOKEN: Final = _ROW["per_token"]
_TIGHTEST: Final = _ROW["tightest"]
_FREE: Final = _ROW["free_blocks"]
_BLOCK: Final = _ROW["block_tokens"]
_SLOTS: Final = _ROW["slots"]
_SLOWNESS: Final = len(_ROW)
_TOLD: Final = len(_ROW) + 1  # when it told its load


class Fleet:
    """The latest loads of the instances that may be chosen, as columns in the order of `names`."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names: tuple[str, ...] = ()
        self.index: dict[str, int] = {}
        self.codes: Ints = np.zeros(0, np.int64)  # of the names
        self.table: Floats = np.zeros((_TOLD + 1, 0))
        self.resize(names)

    def resize(self, names: Sequence[str]) -> None:
        """Keep what is known of those that stay; the others start empty. Raises ValueError for a duplicate."""
        if len(set(names)) < len(names):
            raise ValueError(f"instances must be named once each, got {', '.join(names)}")
        table = np.repeat(np.array([[*asdict(Load()).values(), 1.0, 0.0]]).T, len(names), axis=1)
        for column, name in enumerate(names):
            if name in self.index:
                table[:, column] = self.table[:, self.index[name]]
        self.names, self.table = tuple(names), table
        self.codes = np.array([zlib.crc32(name.encode()) for name in names], np.int64)
        self.index = {name: column for column, name in enumerate(names)}

    def tell(self, name: str, load: Load, now: float = 0.0) -> None:
        """An instance told its load at `now`. What made it look slow is slowly forgiven, so that it is tried again."""
        column = self.table[:, self.index[name]]
        column[:_SLOWNESS] = [getattr(load, field) for field in _ROW]
        column[_SLOWNESS] = 1.0 + FORGIVING * (column[_SLOWNESS] - 1.0)
        column[_TOLD] = now

    def sent(self, name: str, ask: Ask) -> None:
        """A request went there: it is part of the load until the instance tells its own."""
        column = self.table[:, self.index[name]]
        kind = _QUEUED if math.isfinite(ask.ttft) else _IDLE
        column[kind] += max(ask.prompt_tokens - (ask.cached or {}).get(name, 0.0), 1.0)
        column[_REQUESTS] += 1.0
        column[_STEP] += column[_PER_TOKEN]
        column[_FREE] -= math.ceil(ask.prompt_tokens / column[_BLOCK])
        column[_TIGHTEST] = min(column[_TIGHTEST], ask.tpot)

    def observed(self, name: str, predicted: float, measured: float, weight: float = 0.2) -> None:
        """A first token came after `measured` seconds where `predicted` were expected: slow ones stand out."""
        column = self.index.get(name)
        if column is not None and 0 < predicted < math.inf:
            ratio = min((measured + NOTICED_SECONDS) / (predicted + NOTICED_SECONDS), 10.0)
            self.table[_SLOWNESS, column] += weight * (ratio - self.table[_SLOWNESS, column])

    @property
    def per_token(self) -> float:
        """Seconds per prompt token, the median; 0 without instances."""
        return float(np.median(self.table[_PER_TOKEN])) if self.names else 0.0

    def slowness(self, name: str) -> float:
        """How much later than predicted its first tokens come, as a factor."""
        return float(self.table[_SLOWNESS, self.index[name]])


def predict(fleet: Fleet, ask: Ask, now: float = 0.0, among: Order | None = None) -> Floats:
    """Expected seconds until the first token at each instance, infinite where the decodes fill every iteration.

    The older the load that an instance told, the more is assumed to wait there. Of the columns `among`, or of all.
    """
    return _weighed(fleet, ask, now, among)[0]


def rank(fleet: Fleet, ask: Ask, now: float = 0.0, turn: int = 0, among: Order | None = None) -> Order:
    """Column numbers of `fleet`, best first. Instances of equal cost take turns: `turn` counts the calls.

    `among` are the columns to choose from; all where it is None.
    """
    _, cost, columns = _weighed(fleet, ask, now, among)
    order: Order = _sorted(columns, cost, turn)
    return order


def drawn(fleet: Fleet, ask: Ask, count: int, turn: int) -> Order:
    """`count` columns drawn at random, another draw at every turn, and those with a cached prefix: what a choice
    costs then does not grow with the number of instances."""
    homes = [fleet.index[name] for name in ask.cached or () if name in fleet.index]
    order: Order = _draw(len(fleet.names), np.array(homes, np.int64), count, turn)
    return order


def is_hopeless(fleet: Fleet, ask: Ask, now: float = 0.0) -> bool:
    """Whether no instance is expected to keep the promise."""
    return bool(np.min(_weighed(fleet, ask, now, None)[1], initial=np.inf) >= LATE)


def _weighed(fleet: Fleet, ask: Ask, now: float, among: Order | None) -> tuple[Floats, Floats, Order]:
    """Expected seconds and cost at each of these columns, and the columns."""
    columns = np.arange(len(fleet.names), dtype=np.int64) if among is None else among
    tokens = np.full(len(fleet.names), float(ask.prompt_tokens))
    for name, cached in (ask.cached or {}).items():
        if name in fleet.index:
            tokens[fleet.index[name]] = max(ask.prompt_tokens - cached, 1.0)
    expected, cost = np.empty(columns.size), np.empty(columns.size)
    _weigh(fleet.table, columns, tokens, float(ask.new_tokens), float(ask.ttft), float(ask.tpot), now, expected, cost)
    return expected, cost, columns


@compiled
def _weigh(
    table: Any, columns: Any, tokens: Any, new_tokens: float, ttft: float, tpot: float, now: float,
    expected: Any, cost: Any,
) -> None:  # fmt: skip
    """Fill in `expected` and `cost`, an entry for each of `columns`; `tokens` are those not cached, by column."""
    promised = ttft < math.inf
    mean = 0.0
    for c in columns:
        mean += table[_REQUESTS, c] / columns.size
    for i in range(columns.size):
        c = columns[i]
        step, per_token, tightest = table[_STEP, c], table[_PER_TOKEN, c], table[_TIGHTEST, c]
        requests = table[_REQUESTS, c]
        waiting = table[_QUEUED, c] + (0.0 if promised else table[_IDLE, c])
        waiting *= 1.0 + 0.5 * min(max(now - table[_TOLD, c], 0.0) / STALE_SECONDS, 4.0)
        before = min(tightest, CAP_SECONDS)
        period = min(before, tpot)
        # What fits one iteration takes one; more than that takes whole ones, of which decodes have their share.
        seconds = step + tokens[c] * per_token
        if waiting > 0.0 or seconds > period:
            room = period - step
            seconds = (waiting + tokens[c]) * per_token * period / room + step if room > 0.0 else math.inf
        if requests > 0.0:
            seconds += 0.5 * step
        seconds *= max(table[_SLOWNESS, c], 1.0)
        expected[i] = seconds
        work = WORK * tokens[c] * per_token
        if not promised:
            # Best effort goes where the fewest wait for a promise and the least is left over for others.
            cost[i] = min(seconds, 1e3) + work + step / before + 0.01 * requests
            continue
        slack, pace = max(ttft, 1e-3), min(tightest, tpot)
        share = requests / (mean + 4.0) + requests / table[_SLOTS, c]
        # A tight request shortens every iteration of its instance: better where they are short already.
        other = abs(before - min(tpot, CAP_SECONDS)) / CAP_SECONDS
        value = (min(seconds, 1e3) + work) / slack + step / pace + BALANCE * share + AFFINITY * other
        blocks = (tokens[c] + new_tokens) / table[_BLOCK, c]
        if step + per_token > pace or blocks > table[_FREE, c] or requests >= table[_SLOTS, c]:
            value += UNFIT
        cost[i] = value + (LATE if seconds > ttft else 0.0)


@compiled
def _sorted(columns: Any, cost: Any, turn: int) -> Any:
    """The columns by cost, the cheapest first, equal ones from number `turn` on."""
    count = columns.size
    turned = (np.arange(count) + turn) % max(count, 1)
    return columns[turned[np.argsort(np.floor(cost[turned] * 1000.0), kind="mergesort")]]


@compiled
def _draw(instances: int, homes: Any, count: int, turn: int) -> Any:
    """`homes`, and others until there are `count` or no more: a random walk that `turn` begins."""
    picked = np.zeros(instances, np.bool_)
    found = np.empty(max(min(count, instances), homes.size), np.int64)
    size = 0
    for c in homes:
        picked[c] = True
        found[size] = c
        size += 1
    state = turn % 2147483646 + 1
    while size < found.size:
        state = state * 48271 % 2147483647  # the minimal standard generator, all of it within 64 bits
        c = (state >> 8) % instances
        if not picked[c]:
            picked[c] = True
            found[size] = c
            size += 1
    return found


def prefix(fleet: Fleet, session: str, known: tuple[str, int] | None, prompt_tokens: float) -> dict[str, float]:
    """Prompt tokens that an instance has in its cache: where the session was last (`known`, with its tokens then),
    or else probably at its home, where any other router would have sent it."""
    if known is not None and known[0] in fleet.index:
        return {known[0]: float(min(known[1], prompt_tokens - 1))}
    by_name = home(fleet, session)
    return {} if by_name is None else {by_name: PROBABLY_CACHED * prompt_tokens}


def home(fleet: Fleet, session: str) -> str | None:
    """The instance that a session belongs to by its name alone: every router that knows the same instances agrees.

    Rendezvous hashing: when an instance leaves, only its own sessions move. None when there is no instance.
    """
    column = _home(fleet.codes, zlib.crc32(session.encode()))
    return None if column < 0 else fleet.names[column]


@compiled
def _home(codes: Any, code: int) -> int:
    """The column whose code mixes with this one to the highest number; -1 when there is none."""
    best, found = -1, -1
    for c in range(codes.size):
        value = (codes[c] ^ code) % 2147483646 + 1
        for _ in range(4):
            value = (value ^ (value >> 15)) * 48271 % 2147483647
        if value > best:
            best, found = value, c
    return found
