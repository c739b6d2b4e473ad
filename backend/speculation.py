"""Guesses about the next tokens, and the test that keeps only what the model would have said itself.

Greedy output is token for token what it is without guesses; sampled output has the same distribution
(speculative sampling: Leviathan, Kalman and Matias, 2023). Every random number is a hash of the request's
seed and the output position. A drafter proposes at most what it is asked for, and may propose less.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from .attention import Ints, Span
from .hf_model import PagedModel
from .sampling import FAILED, PLAIN, Row, draw, largest, next_tokens, uniform
from .sequence import Sequence

_ACCEPT, _REDRAW, _PROPOSE = 1, 2, 3  # purposes of random numbers; 0 is drawing without guesses

NGRAMS: Final = (3, 2)


@dataclass(frozen=True, slots=True)
class Ask:
    """Propose `count` tokens after the known ones of `sequence`; 0: only compute its KV up to `end`."""

    sequence: Sequence
    end: int
    count: int


@dataclass(frozen=True, slots=True)
class Guess:
    """Proposed tokens [count], and what each was drawn from [count, vocabulary]; None: they were certain."""

    tokens: Ints
    chances: torch.Tensor | None = None


NO_GUESS: Final = Guess(np.empty(0, dtype=np.int64))


class Drafter(Protocol):
    """Proposes tokens. The engine says which blocks are fresh, and which a new request found in the cache."""

    def propose(self, asks: Many[Ask]) -> list[Guess]: ...
    def clear(self, blocks: Many[int]) -> None: ...
    def adopt(self, sequence: Sequence) -> None: ...


class NgramDrafter:
    """Proposes what followed the latest earlier occurrence of the last tokens (prompt lookup). No model."""

    def propose(self, asks: Many[Ask]) -> list[Guess]:
        return [Guess(_continuation(ask.sequence.tokens[: ask.sequence.known], ask.count)) for ask in asks]

    def clear(self, blocks: Many[int]) -> None:
        """It has no KV."""

    def adopt(self, sequence: Sequence) -> None:
        """It has no KV."""


def _continuation(tokens: Ints, count: int) -> Ints:
    for size in NGRAMS:
        starts = len(tokens) - size
        if count < 1 or starts < 1:
            continue
        hits = np.ones(starts, dtype=bool)
        for offset in range(size):
            hits &= tokens[offset : offset + starts] == tokens[starts + offset]
        found = np.flatnonzero(hits)
        if len(found):
            after = int(found[-1]) + size
            return tokens[after : after + count].copy()
    return NO_GUESS.tokens


class ModelDrafter:
    """Proposes with a smaller model of the same vocabulary, whose KV lives in the same block ids.

    It follows prompts as the engine computes them and catches up on tokens that were decoded without it.
    """

    def __init__(self, model: PagedModel, num_blocks: int) -> None:
        self._model = model
        self._block_tokens = model.cache.block_tokens
        self._filled = np.zeros(num_blocks, dtype=bool)  # blocks whose every token has draft KV

    def clear(self, blocks: Many[int]) -> None:
        self._model.cache.clear(blocks)
        self._filled[blocks] = False

    def adopt(self, sequence: Sequence) -> None:
        filled = self._filled[sequence.blocks]
        leading = len(filled) if filled.all() else int(filled.argmin())
        sequence.draft_computed = leading * self._block_tokens

    def propose(self, asks: Many[Ask]) -> list[Guess]:
        drawn: list[list[int]] = [[] for _ in asks]
        chances: list[list[torch.Tensor]] = [[] for _ in asks]
        for turn in range(max((ask.count for ask in asks), default=0) or 1):
            # a row that failed ends its guesses; the target decides what the request makes of that
            active = [
                index for index, ask in enumerate(asks)
                if turn == 0 or (turn < ask.count and len(drawn[index]) == turn)
            ]  # fmt: skip
            self._turn(asks, active, turn, drawn, chances)
        for ask in asks:
            self._mark(ask.sequence)
        return [_guess(tokens, rows) for tokens, rows in zip(drawn, chances, strict=True)]

    def _turn(
        self, asks: Many[Ask], active: Many[int], turn: int, drawn: list[list[int]], chances: list[list[torch.Tensor]]
    ) -> None:
        """Compute what the draft model has not, and draw the next guess of every request that wants one."""
        spans: dict[int, Span] = {}
        for index in active:
            sequence, end = asks[index].sequence, asks[index].end + turn
            if sequence.draft_computed < end:
                tokens = sequence.tokens[sequence.draft_computed : end]
                spans[index] = Span(tokens, sequence.draft_computed, sequence.blocks)
                sequence.draft_computed = end
        wanting = [index for index in spans if asks[index].count > turn]
        if not spans:
            return
        ends = dict(zip(spans, np.cumsum([len(span.tokens) for span in spans.values()]).tolist(), strict=True))
        logits = self._model.forward(list(spans.values()), [ends[index] - 1 for index in wanting])
        rows = [asks[index].sequence.row(turn) for index in wanting]
        draws = next_tokens(logits, rows, _PROPOSE)
        for index, token in zip(wanting, draws.tokens.tolist(), strict=True):
            if token != FAILED:
                drawn[index].append(token)
                asks[index].sequence.guess(np.array(drawn[index]))
        for at, chance in zip(draws.sampled, draws.chances if draws.chances is not None else (), strict=True):
            chances[wanting[at]].append(chance)

    def _mark(self, sequence: Sequence) -> None:
        full = min(sequence.draft_computed, sequence.known) // self._block_tokens
        self._filled[sequence.blocks[:full]] = True


def _guess(tokens: list[int], chances: list[torch.Tensor]) -> Guess:
    return Guess(np.array(tokens, dtype=np.int64), torch.stack(chances[: len(tokens)]) if chances and tokens else None)


def verify(logits: torch.Tensor, rows: Many[Row], guesses: Many[Guess]) -> list[list[int]]:
    """The tokens that each request gains: its accepted guesses and one more.

    `logits` [rows, vocabulary] and `rows` hold, request after request, one row for each guess and one for
    the token after all of them. The last token may be FAILED.
    """
    tokens = largest(logits) if all(row is PLAIN for row in rows) else _chosen(logits, rows, guesses)
    if len(rows) == len(guesses):  # nobody guessed
        return [[token] for token in tokens]
    said = iter(tokens)
    return [_gained([next(said) for _ in range(len(guess.tokens) + 1)], guess) for guess in guesses]


def _chosen(logits: torch.Tensor, rows: Many[Row], guesses: Many[Guess]) -> list[int]:
    """The token of each row; where it decides on a guess that is the guess, if it is accepted."""
    draws = next_tokens(logits, rows)
    tokens = draws.tokens
    decisions, drafts = _sampled_guesses(rows, guesses)
    if decisions and draws.chances is not None:
        at = torch.tensor(decisions, device=logits.device)
        drawn_at = {index: at for at, index in enumerate(draws.sampled)}
        target = draws.chances[[drawn_at[index] for index in decisions]]
        decided = _accept_or_redraw(target, [rows[index] for index in decisions], drafts)
        tokens[at] = torch.where(tokens[at] == FAILED, FAILED, decided)
    chosen: list[int] = tokens.tolist()
    return chosen


def _gained(said: list[int], guess: Guess) -> list[int]:
    for count, token in enumerate(guess.tokens.tolist()):
        if said[count] != token:
            return said[: count + 1]
    return said


def _sampled_guesses(rows: Many[Row], guesses: Many[Guess]) -> tuple[list[int], list[Guess]]:
    """Indexes of the rows that decide on a guess of a request that samples, and these requests' guesses."""
    indexes: list[int] = []
    drafts: list[Guess] = []
    first = 0
    for guess in guesses:
        count = len(guess.tokens)
        if count and not rows[first].params.is_greedy:
            indexes += range(first, first + count)
            drafts.append(guess)
        first += count + 1
    return indexes, drafts


def _draft_chances(target: torch.Tensor, drafts: Many[Guess]) -> torch.Tensor:
    """What each guess was drawn from, [guesses, vocabulary]; a certain guess has all its mass on itself."""
    parts = []
    for guess in drafts:
        if guess.chances is not None:
            parts.append(guess.chances)
        else:
            ids = torch.from_numpy(guess.tokens).to(target.device)[:, None]
            parts.append(target.new_zeros(len(ids), target.shape[-1]).scatter_(1, ids, 1.0))
    return torch.cat(parts)


def _accept_or_redraw(target: torch.Tensor, rows: Many[Row], drafts: Many[Guess]) -> torch.Tensor:
    """Each guess with chance min(1, target / draft), else a token drawn from what target has more than draft."""
    draft = _draft_chances(target, drafts)
    guessed = torch.from_numpy(np.concatenate([guess.tokens for guess in drafts])).to(target.device)
    numbers = torch.tensor([uniform(row.seed, row.position, _ACCEPT) for row in rows], dtype=torch.float64)
    at = guessed[:, None]
    is_accepted = numbers.to(target.device) * draft.gather(1, at)[:, 0] < target.gather(1, at)[:, 0]
    rest = (target - draft).clamp(min=0).scatter(1, at, 0.0)
    # nothing is left when both say the same up to rounding
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, target)
    redrawn = draw(rest, [uniform(row.seed, row.position, _REDRAW) for row in rows])
    return torch.where(is_accepted, guessed, redrawn)
