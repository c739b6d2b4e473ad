"""From logits to the next token: penalties, filters, and draws that anybody can repeat.

Every operation works on each row by itself and the random number of an output position is a hash of the
request's seed and that position. So the tokens of a request depend on its own logits and seed, never on
the batch it ran in, on the order of batches, or on being preempted. Greedy rows without penalties cost
one maximum. Never keeps state between calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from .generation import SamplingParams

FAILED: Final = -1
"""Stands for the token of a row whose logits are not numbers."""

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits and what its token depends on.

    `tokens` are all tokens before it, `prompt_tokens` of them the prompt; `seed` is the request's own, also
    when its parameters have none; `end_ids` are masked while fewer than `min_tokens` tokens are out.
    """

    params: SamplingParams
    seed: int
    tokens: npt.NDArray[np.int64]
    prompt_tokens: int
    end_ids: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        """How many output tokens come before this one."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def masks_end(self) -> bool:
        return bool(self.end_ids) and self.position < self.params.min_tokens


PLAIN: Final = Row(SamplingParams(), 0, np.empty(0, dtype=np.int64), 0)
"""The row of any token that is just the one with the largest logit."""


def uniform(seed: int, position: int, purpose: int = 0) -> float:
    """A number in [0, 1) that looks random and depends on the arguments alone (splitmix64; seeds modulo 2**64)."""
    state = seed & _MASK64
    for word in (position, purpose, 0):
        state = (state + 0x9E3779B97F4A7C15 * (word + 1)) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Draws:
    """The `tokens` [rows] chosen from logits, FAILED where those are not numbers.

    `sampled` are the rows that are not greedy, `chances` [sampled, vocabulary] what each was drawn from.
    """

    tokens: torch.Tensor
    sampled: tuple[int, ...] = ()
    chances: torch.Tensor | None = None


def next_tokens(logits: torch.Tensor, rows: Sequence[Row], purpose: int = 0) -> Draws:
    """Choose a token for each row of `logits` [rows, vocabulary]; `purpose` picks the stream of random numbers."""
    logits = penalised(logits, rows)
    tokens = _largest(logits)
    sampled = tuple(index for index, row in enumerate(rows) if not row.params.is_greedy)
    if not sampled:
        return Draws(tokens)
    where = torch.tensor(sampled, device=logits.device)
    chosen = [rows[index] for index in sampled]
    chances = probabilities(logits[where], chosen)
    drawn = draw(chances, [uniform(row.seed, row.position, purpose) for row in chosen])
    tokens[where] = torch.where(tokens[where] == FAILED, FAILED, drawn)
    return Draws(tokens, sampled, chances)


def largest(logits: torch.Tensor) -> list[int]:
    """What `next_tokens` chooses for rows that are all `PLAIN`, at the least cost."""
    logits = logits.float()
    if logits.device.type != "cpu":
        tokens: list[int] = _largest(logits).tolist()
        return tokens
    numbers = logits.numpy()  # which finds the index ten times as fast, and a nan as the largest
    found = enumerate(numbers.argmax(axis=-1).tolist())
    return [token if math.isfinite(numbers.item(row, token)) else FAILED for row, token in found]


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """Where each row's largest value is first, FAILED where that is no number.

    It is nan for a row with any nan, and an infinity for one that no softmax survives.
    """
    if logits.device.type == "cpu":
        return torch.tensor(largest(logits), dtype=torch.int64)
    best, tokens = logits.max(dim=-1)
    return torch.where(torch.isfinite(best), tokens, FAILED)


def penalised(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Float32 logits with penalties applied and early end tokens masked; the input is left as it was."""
    changed = [index for index, row in enumerate(rows) if row.params.changes_logits or row.masks_end]
    logits = logits.float()
    if not changed:
        return logits
    logits = logits.clone()
    penalties = [index for index in changed if rows[index].params.changes_logits]
    if penalties:
        where = torch.tensor(penalties, device=logits.device)
        logits[where] = _penalise(logits[where], [rows[index] for index in penalties])
    masked = [(index, end) for index in changed if rows[index].masks_end for end in rows[index].end_ids]
    if masked:
        at, ends = torch.tensor(masked, device=logits.device).T
        logits[at, ends] = -torch.inf
    return logits


def _penalise(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    everything = _counts(logits, [row.tokens for row in rows])
    output = _counts(logits, [row.tokens[row.prompt_tokens :] for row in rows])
    repetition = _column(logits, [row.params.repetition_penalty for row in rows])
    presence = _column(logits, [row.params.presence_penalty for row in rows])
    frequency = _column(logits, [row.params.frequency_penalty for row in rows])
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(everything > 0, repeated, logits)
    return logits - frequency * output - presence * (output > 0)


def _counts(logits: torch.Tensor, tokens: Sequence[npt.NDArray[np.int64]]) -> torch.Tensor:
    """How often each token of the vocabulary occurs in each row's `tokens`. [rows, vocabulary] float32."""
    vocabulary = logits.shape[-1]
    flat = np.concatenate([ids + index * vocabulary for index, ids in enumerate(tokens)])
    counts = torch.zeros(len(tokens) * vocabulary, device=logits.device)
    ones = torch.ones(len(flat), device=logits.device)
    return counts.index_add_(0, torch.from_numpy(flat).to(logits.device), ones).view(len(tokens), vocabulary)


def _column(logits: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]


def probabilities(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """What each row draws from, after temperature, top-k, top-p and min-p in this order. [rows, vocabulary] float32.

    A greedy row has all its mass on its largest logit.
    """
    params = [row.params for row in rows]
    # the largest logit is shifted to 0 and stays there, however small the temperature
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    temperature = _column(logits, [min(max(p.temperature, 1e-30), 1e30) for p in params])
    scaled = _keep_one(shifted / temperature, [p.is_greedy for p in params])
    scaled = _keep_top_k(scaled, [p.top_k for p in params])
    scaled = _keep_top_p(scaled, [p.top_p for p in params])
    chances = torch.softmax(scaled, dim=-1)
    if any(p.min_p > 0 for p in params):
        least = _column(logits, [p.min_p for p in params]) * chances.max(dim=-1, keepdim=True).values
        chances = torch.where(chances < least, 0.0, chances)
        chances = chances / chances.sum(dim=-1, keepdim=True)
    return chances


def _keep_one(scaled: torch.Tensor, is_greedy: Sequence[bool]) -> torch.Tensor:
    if not any(is_greedy):
        return scaled
    greedy = torch.tensor(is_greedy, device=scaled.device)[:, None]
    others = torch.ones_like(scaled, dtype=torch.bool).scatter_(1, scaled.argmax(dim=-1, keepdim=True), False)
    return scaled.masked_fill(greedy & others, -torch.inf)


def _keep_top_k(scaled: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    vocabulary = scaled.shape[-1]
    kept = [k if 0 < k < vocabulary else vocabulary for k in top_k]
    # rows without a limit must not make the others pay for sorting the vocabulary
    largest = max((k for k in kept if k < vocabulary), default=0)
    if not largest:
        return scaled
    values = torch.topk(scaled, largest, dim=-1).values
    at = torch.tensor([min(k, largest) - 1 for k in kept], device=scaled.device)[:, None]
    unlimited = torch.tensor([k == vocabulary for k in kept], device=scaled.device)[:, None]
    least = values.gather(1, at).masked_fill(unlimited, -torch.inf)
    return scaled.masked_fill(scaled < least, -torch.inf)


def _keep_top_p(scaled: torch.Tensor, top_p: Sequence[float], candidates: int = 512) -> torch.Tensor:
    """Keep the likeliest tokens until their chances reach `top_p`. Sorts all only where `candidates` fall short."""
    where = [index for index, p in enumerate(top_p) if p < 1.0]
    if not where:
        return scaled
    at = torch.tensor(where, device=scaled.device)
    part, wanted = scaled[at], _column(scaled, [top_p[index] for index in where])
    total = torch.logsumexp(part, dim=-1, keepdim=True)
    values = torch.topk(part, min(candidates, part.shape[-1]), dim=-1).values
    before = _mass_before(values, total)
    if values.shape[-1] < part.shape[-1] and bool((before[:, -1:] < wanted).any()):
        values = torch.sort(part, dim=-1, descending=True).values
        before = _mass_before(values, total)
    last = (before < wanted).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    part = part.masked_fill(part < values.gather(1, last), -torch.inf)
    return scaled.index_copy(0, at, part)


def _mass_before(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    chances = torch.exp(values - total)
    return torch.cumsum(chances, dim=-1) - chances


def draw(chances: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """The token at which each row's running sum of `chances` passes its number in [0, 1). [rows] int64.

    Rows need not sum to one.
    """
    running = torch.cumsum(chances.double(), dim=-1)
    target = torch.tensor(numbers, dtype=torch.float64, device=chances.device)[:, None] * running[:, -1:]
    # rounding may lift the target to the sum itself: stay on the last token that has a chance
    last = torch.searchsorted(running, running[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(running, target, right=True), last).squeeze(1)
