"""Was the promise kept? The one judge, used by receipts, reports, the simulator and the exam.

Strict rule: output token k of the first stage is due at arrival + TTFT + (k - 1) * TPOT; the tokens of a
later stage go on from the last due time at that stage's TPOT. Every token must be on time. The two milder
rules that papers use stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .core import Stage

Floats: TypeAlias = NDArray[np.float64]
Rule: TypeAlias = Literal["strict", "blocks", "mean"]

TOLERANCE: Final = 1e-9  # seconds: absorbs the rounding of sums, nothing else
BLOCK_TOKENS: Final = 10


def due_times(stages: Sequence[Stage], stage_tokens: Sequence[int], arrived_at: float) -> Floats:
    """When each output token was due, in absolute seconds; infinite where a stage promises nothing.

    `stage_tokens` are the tokens each stage really produced; a stage that ended early hands its pace over.
    """
    counts = list(stage_tokens)[: len(stages)]
    promises = [stage.slo is not None for stage in stages[: len(counts)]]
    steps = np.repeat([stage.slo.tpot if stage.slo else 0.0 for stage in stages[: len(counts)]], counts)
    first = next((stage for stage, count in zip(stages, counts, strict=False) if count), None)
    if first is not None:
        steps[0] = first.slo.ttft if first.slo else 0.0
    dues: Floats = arrived_at + np.cumsum(steps)
    dues[~np.repeat(promises, counts)] = np.inf
    return dues


def attained(stages: Sequence[Stage], stage_tokens: Sequence[int], arrived_at: float, token_times: ArrayLike) -> bool:
    """Whether every token came by its due time. A request without SLO or without a token attains nothing.

    Raises ValueError when the stages' tokens are not as many as `token_times`.
    """
    times = np.asarray(token_times, dtype=np.float64)
    if stages[0].slo is None or not times.size:
        return False
    dues = due_times(stages, stage_tokens, arrived_at)
    if dues.size != times.size:
        raise ValueError(f"stage_tokens: {list(stage_tokens)} do not add up to the {times.size} tokens of token_times")
    return bool((times <= dues + TOLERANCE).all())


def block_attained(
    stages: Sequence[Stage],
    stage_tokens: Sequence[int],
    arrived_at: float,
    token_times: ArrayLike,
    block: int = BLOCK_TOKENS,
) -> bool:
    """The first token by its TTFT, and in every block of `block` successive gaps of a stage (the last block
    may be shorter) a mean gap of at most the stage's TPOT: the rule of the SLOs-Serve paper."""
    times = np.asarray(token_times, dtype=np.float64)
    slo = stages[0].slo
    if slo is None or not times.size or times[0] > arrived_at + slo.ttft + TOLERANCE:
        return False
    for gaps, tpot in _paced_gaps(stages, stage_tokens, times):
        starts = np.arange(0, gaps.size, block)
        counts = np.minimum(gaps.size - starts, block)
        if (np.add.reduceat(gaps, starts) > tpot * counts + TOLERANCE).any():
            return False
    return True


def mean_attained(
    stages: Sequence[Stage], stage_tokens: Sequence[int], arrived_at: float, token_times: ArrayLike
) -> bool:
    """The first token by its TTFT, and in every stage a mean gap of at most its TPOT: DistServe's rule."""
    times = np.asarray(token_times, dtype=np.float64)
    return block_attained(stages, stage_tokens, arrived_at, times, block=max(times.size, 1))


RULES: Final[Mapping[Rule, Callable[..., bool]]] = {
    "strict": attained,
    "blocks": block_attained,
    "mean": mean_attained,
}


def _paced_gaps(stages: Sequence[Stage], stage_tokens: Sequence[int], times: Floats) -> Iterator[tuple[Floats, float]]:
    """Per stage that promises something and has a gap: the gaps before its tokens (none before the very first),
    its TPOT."""
    end = 0
    for stage, count in zip(stages, stage_tokens, strict=False):
        start, end = end, end + count
        gaps = np.diff(times[max(start - 1, 0) : end])
        if stage.slo is not None and gaps.size:
            yield gaps, stage.slo.tpot
