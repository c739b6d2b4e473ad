"""The Lagrangian bound of `exact`: what a state can still be worth, at a price for tokens and for memory."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .exact_jobs import BLOCKS, COPIES, DUE, FORCED, PROMPT, ROUNDING, TIER, TOLERANCE, VALUE
from .jit import compiled
from .timemodel import tokens_within

PRICE_STEPS: Final = 10  # bisections of the price of memory

# Rows of `terms` for each set of prices (see `_terms`).
PRICE: Final = 0
PACED: Final = 1
REST: Final = 2
IDLE: Final = 3
MEMORY: Final = 4
USES: Final = 5
CAPPED: Final = 6
TERM_ROWS: Final = 7


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
def capped_tokens(model: Any, jobs: Any, base: Any) -> Any:
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
def best_worth(
    terms: Any, g: int, worth: float, room: float, rate: float, used: float, spare: float, unit: float
) -> float:
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
