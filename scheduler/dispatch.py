"""Which instance gets a request: a pure ranking of what is known about each, best first.

An instance tells its `Load`; a `Fleet` keeps the latest of each as columns; `rank` orders them for one `Ask`.
The router and the simulator call the same code. Nothing here sends, waits or reads a clock: the age of what
an instance told is an argument.

An instance can keep a promise when it has the memory, when one more decode fits within the tightest pace
there, and when the prompt would be computed in time behind the promised prompts that wait. Among those the
one goes first whose first token is expected earliest for its slack, a session's home credited with the prefix
it has in its cache. Equal ones take turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .core import Capabilities, Snapshot
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
_SLOWNESS: Final = len(_ROW)


class Fleet:
    """The latest loads of the instances that may be chosen, as columns in the order of `names`."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names: tuple[str, ...] = ()
        self.index: dict[str, int] = {}
        self.table: Floats = np.zeros((_SLOWNESS + 1, 0))
        self.resize(names)

    def resize(self, names: Sequence[str]) -> None:
        """Keep what is known of those that stay; the others start empty. Raises ValueError for a duplicate."""
        if len(set(names)) < len(names):
            raise ValueError(f"instances must be named once each, got {', '.join(names)}")
        table = np.repeat(np.array([[*asdict(Load()).values(), 1.0]]).T, len(names), axis=1)
        for column, name in enumerate(names):
            if name in self.index:
                table[:, column] = self.table[:, self.index[name]]
        self.names, self.table = tuple(names), table
        self.index = {name: column for column, name in enumerate(names)}

    def tell(self, name: str, load: Load) -> None:
        """An instance told its load. What made it look slow is slowly forgiven, or nobody would try it again."""
        column = self.table[:, self.index[name]]
        column[:_SLOWNESS] = [getattr(load, field) for field in _ROW]
        column[_SLOWNESS] = 1.0 + FORGIVING * (column[_SLOWNESS] - 1.0)

    def sent(self, name: str, ask: Ask) -> None:
        """A request went there: it is part of the load until the instance tells its own."""
        column = self.index[name]
        kind = "queued_tokens" if math.isfinite(ask.ttft) else "idle_tokens"
        self.table[_ROW[kind], column] += max(ask.prompt_tokens - (ask.cached or {}).get(name, 0.0), 1.0)
        self.table[_ROW["requests"], column] += 1.0
        self.table[_ROW["step"], column] += self.table[_ROW["per_token"], column]
        blocks = math.ceil(ask.prompt_tokens / self.table[_ROW["block_tokens"], column])
        self.table[_ROW["free_blocks"], column] -= blocks
        self.table[_ROW["tightest"], column] = min(self.table[_ROW["tightest"], column], ask.tpot)

    def observed(self, name: str, predicted: float, measured: float, weight: float = 0.2) -> None:
        """A first token came after `measured` seconds where `predicted` were expected: slow ones stand out."""
        column = self.index.get(name)
        if column is not None and 0 < predicted < math.inf:
            ratio = min((measured + NOTICED_SECONDS) / (predicted + NOTICED_SECONDS), 10.0)
            self.table[_SLOWNESS, column] += weight * (ratio - self.table[_SLOWNESS, column])

    @property
    def per_token(self) -> float:
        """Seconds per prompt token, the median; 0 without instances."""
        return float(np.median(self.table[_ROW["per_token"]])) if self.names else 0.0

    def slowness(self, name: str) -> float:
        """How much later than predicted its first tokens come, as a factor."""
        return float(self.table[_SLOWNESS, self.index[name]])


def predict(fleet: Fleet, ask: Ask, ages: Floats | float = 0.0) -> Floats:
    """Expected seconds until the first token at each instance, infinite where the decodes fill every iteration.

    `ages` are the seconds since each load was told: the older, the more is assumed to wait there.
    """
    t = fleet.table
    tokens = _new_tokens(fleet, ask)
    promised = math.isfinite(ask.ttft)
    waiting = t[_ROW["queued_tokens"]] + (0.0 if promised else t[_ROW["idle_tokens"]])
    waiting = waiting * (1.0 + 0.5 * np.minimum(np.asarray(ages) / STALE_SECONDS, 4.0))
    period = np.minimum(np.minimum(t[_ROW["tightest"]], ask.tpot), CAP_SECONDS)
    per_token, step = t[_ROW["per_token"]], t[_ROW["step"]]
    room = np.maximum(period - step, 0.0)
    with np.errstate(divide="ignore"):
        stretch = np.where(room > 0.0, period / room, np.inf)
    # What fits one iteration takes one; more than that takes whole ones, of which decodes have their share.
    alone = step + tokens * per_token
    seconds = np.where((waiting <= 0.0) & (alone <= period), alone, (waiting + tokens) * per_token * stretch + step)
    seconds = seconds + np.where(t[_ROW["requests"]] > 0, 0.5 * step, 0.0)
    result: Floats = seconds * np.maximum(t[_SLOWNESS], 1.0)
    return result


def rank(fleet: Fleet, ask: Ask, ages: Floats | float = 0.0, turn: int = 0) -> Order:
    """Column numbers of `fleet`, best first. Instances of equal cost take turns: `turn` counts the calls."""
    count = len(fleet.names)
    cost = _cost(fleet, ask, ages)
    rotated = (np.arange(count) - turn) % max(count, 1)
    order: Order = np.lexsort((rotated, np.round(cost, 3)))
    return order


def _cost(fleet: Fleet, ask: Ask, ages: Floats | float) -> Floats:
    t = fleet.table
    expected = predict(fleet, ask, ages)
    if not math.isfinite(ask.ttft):
        # Best effort goes where the fewest wait for a promise and the least is left over for others.
        busy = t[_ROW["step"]] / np.minimum(t[_ROW["tightest"]], CAP_SECONDS)
        idle: Floats = np.minimum(expected, 1e3) + busy + 0.01 * t[_ROW["requests"]]
        return idle
    slack = max(ask.ttft, 1e-3)
    requests = t[_ROW["requests"]]
    share = requests / (requests.mean() + 4.0) + requests / t[_ROW["slots"]]
    pace = np.minimum(t[_ROW["tightest"]], ask.tpot)
    late = expected > ask.ttft
    blocks = (_new_tokens(fleet, ask) + ask.new_tokens) / t[_ROW["block_tokens"]]
    unfit = (t[_ROW["step"]] + t[_ROW["per_token"]] > pace) | (blocks > t[_ROW["free_blocks"]])
    unfit |= requests >= t[_ROW["slots"]]
    cost = np.minimum(expected, 1e3) / slack + t[_ROW["step"]] / pace + BALANCE * share
    # A tight request shortens every iteration of its instance: better where they are short already.
    before = np.minimum(t[_ROW["tightest"]], CAP_SECONDS)
    shorter = np.maximum(before - np.minimum(before, ask.tpot), 0.0) / CAP_SECONDS
    longer = np.maximum(np.minimum(ask.tpot, CAP_SECONDS) - before, 0.0) / CAP_SECONDS
    result: Floats = cost + AFFINITY * (shorter + longer) + LATE * late + UNFIT * unfit
    return result


def _new_tokens(fleet: Fleet, ask: Ask) -> Floats:
    tokens = np.full(len(fleet.names), float(ask.prompt_tokens))
    for name, cached in (ask.cached or {}).items():
        if name in fleet.index:
            tokens[fleet.index[name]] = max(ask.prompt_tokens - cached, 1.0)
    return tokens


def home(session: str, names: Sequence[str]) -> str | None:
    """The instance that a session belongs to by its name alone: every router that knows the same instances agrees.

    Rendezvous hashing: when an instance leaves, only its own sessions move. None when there is no instance.
    """
    return max(names, key=lambda name: _mix(session, name), default=None)


def _mix(session: str, name: str) -> int:
    """FNV-1a over both names, 64 bits, with a finishing round so that the last letters count."""
    value = 0xCBF29CE484222325
    for byte in f"{session}\0{name}".encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 33)) * 0xFF51AFD7ED558CCD) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 33)
