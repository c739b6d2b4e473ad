"""How many tokens to guess ahead in a step: by what it costs, or by the published rule per tier.

With acceptance a, n guesses yield (1 - a^(n+1)) / (1 - a) tokens on average, the bonus token included
(Leviathan et al., 2023). Both rules may answer zero.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .jit import compiled
from .table import ACCEPT, LEFT, TPOT
from .timemodel import MARGIN, batch_seconds, tokens_within

RULES: Final = ("cost", "tiers")
TIERS: Final = 8  # distinct TPOTs told apart; more share the next tighter tier
CLEAR_GAIN: Final = 1.05  # guesses must win clearly: their cost is better known than their gain


@compiled
def tier_of(tpots: Any, count: int, tpot: float) -> int:
    """The loosest tier not looser than `tpot`; `tpots[:count]` ascend."""
    tier = 0
    for i in range(count):
        if tpots[i] <= tpot + 1e-12:
            tier = i
    return tier


@compiled
def tiers_of(real: Any, slots: Any, tpots: Any) -> int:
    """The distinct TPOTs of `slots`, tightest first, in `tpots`; returns how many."""
    count = 0
    for tpot in np.sort(real[TPOT][slots]):
        if count < tpots.size and (count == 0 or tpot > tpots[count - 1] + 1e-12):
            tpots[count] = tpot
            count += 1
    return count


@compiled
def tokens_per_guesses(accept: float, guesses: int) -> float:
    """Expected tokens of one verification of `guesses`, the bonus token included (Leviathan et al., 2023)."""
    return float((1.0 - accept ** (guesses + 1)) / (1.0 - accept))


@compiled
def tier_drafts(
    perf: Any, tpots: Any, numbers: Any, accept: float, context: float, most: int, cap: float, drafts: Any
) -> tuple[float, float]:
    """The iteration and the draft length of each tier that leave most prefill tokens per second.

    `numbers[l]` decodes in tier l; returns (seconds, prefill tokens per iteration), the lengths in `drafts`.
    Where nothing keeps every pace, the tightest TPOT without guesses and no prefill.
    """
    margin = 1.0 + perf[MARGIN]
    lengths = np.zeros(numbers.size, np.int64)
    best_period, best_room, best_rate = cap, 0.0, -1.0
    tightest = cap
    for tier in range(numbers.size):
        if numbers[tier] > 0:
            tightest = min(tightest, tpots[tier])
    for tier in range(numbers.size):
        if numbers[tier] == 0:
            continue
        for guesses in range(most + 1):
            period = min(tpots[tier] * tokens_per_guesses(accept, guesses), cap)
            tokens, longest, fits = 0.0, 0, True
            for other in range(numbers.size):
                if numbers[other] == 0:
                    continue
                own = 0
                while own < most and tokens_per_guesses(accept, own) * tpots[other] < period - 1e-12:
                    own += 1
                fits = fits and tokens_per_guesses(accept, own) * tpots[other] >= period - 1e-12
                lengths[other] = own
                tokens += numbers[other] * (own + 1.0)
                longest = max(longest, own)
            if not fits:
                continue
            room = tokens_within(perf, period / margin, context, 0.0, float(longest)) - tokens
            if room >= 0.0 and room / period > best_rate:
                best_period, best_room, best_rate = period, room, room / period
                drafts[: lengths.size] = lengths
    if best_rate < 0.0:
        drafts[: numbers.size] = 0
        return tightest, 0.0
    return best_period, best_room


@compiled
def draft_steps(real: Any, whole: Any, decodes: Any, context: float, perf: Any, limit: int, longest: float) -> int:
    """Guesses per decode that give most tokens per second within `longest` seconds; 0 when none pays.

    The cost is the model's: n + 1 verified tokens each and n draft steps.
    """
    best = 0
    best_rate = CLEAR_GAIN * decodes.size / batch_seconds(perf, decodes.size, context, 0.0, 0.0)
    for steps in range(1, limit + 1):
        gain = 0.0
        for slot in decodes:
            accept = min(real[ACCEPT, slot], 0.999)
            own = min(steps, int(whole[LEFT, slot]) - 1)
            gain += tokens_per_guesses(accept, own)
        seconds = batch_seconds(perf, decodes.size * (steps + 1.0), context, 0.0, steps)
        if seconds > longest:
            break
        if gain / seconds > best_rate:
            best, best_rate = steps, gain / seconds
    return best


@compiled
def own_steps(real: Any, decodes: Any, context: float, perf: Any, most: int, steps: Any) -> None:
    """`steps[slot]`: `most` guesses, fewer where the last is less likely right than the time to verify it is worth."""
    tokens = decodes.size * (most + 1.0)
    seconds = batch_seconds(perf, tokens, context, 0.0, float(most))
    each = seconds - batch_seconds(perf, tokens - 1.0, context, 0.0, float(most))
    gain = 0.0
    for slot in decodes:
        gain += tokens_per_guesses(min(real[ACCEPT, slot], 0.999), most)
    for slot in decodes:
        guesses = most
        while guesses > 0 and min(real[ACCEPT, slot], 0.999) ** guesses < gain / seconds * each:
            guesses -= 1
        steps[slot] = guesses


@compiled
def tier_steps(
    real: Any, decodes: Any, context: float, perf: Any, limit: int, longest: float, each_its_own: bool, steps: Any
) -> None:
    """The published rule for `decodes` alone: `steps[slot]` for each, one for all where the engine wants that."""
    tpots = np.full(TIERS, np.inf)
    count = tiers_of(real, decodes, tpots)
    numbers, drafts = np.zeros(count, np.int64), np.zeros(count, np.int64)
    accept = 0.0
    for slot in decodes:
        numbers[tier_of(tpots, count, real[TPOT, slot])] += 1
        accept += min(real[ACCEPT, slot], 0.999) / decodes.size
    tier_drafts(perf, tpots, numbers, accept, context, limit, longest, drafts)
    for slot in decodes:
        steps[slot] = drafts[tier_of(tpots, count, real[TPOT, slot])] if each_its_own else drafts.min()
