"""One request as the engine sees it: its tokens, its KV blocks, and when it ends.

Counts positions; never touches a tensor or the block pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .attention import Ints
from .generation import SamplingParams
from .sampling import FAILED, PLAIN, Row


@dataclass(frozen=True, slots=True)
class Gain:
    """What new tokens did to a request: those that were kept, and whether they ended a stage or all of it."""

    token_ids: tuple[int, ...]
    stage_ended: bool = False
    finish_reason: str | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one request. `tokens` has room for the prompt and all tokens of `stage_limits`.

    The last `resumed` tokens of the prompt were generated before, by another engine.
    """

    request_id: str
    tokens: Ints
    prompt_tokens: int
    stage_limits: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    end_ids: tuple[int, ...]  # tokens that finish the request
    think_end_id: int | None  # the token that ends a stage before the last
    stop: Callable[[int], bool] | None
    resumed: int = 0
    known: int = 0  # tokens[:known] are the prompt and what was generated
    computed: int = 0  # tokens[:computed] have KV in `blocks`
    draft_computed: int = 0  # and so many have KV of the draft model there
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # prefix keys of the full blocks, as far as they are known
    remembered: int = 0  # leading blocks that were offered to the prefix cache
    stage: int = 0
    stage_tokens: int = 0
    is_plain: bool = field(init=False)  # every token is the one with the largest logit

    def __post_init__(self) -> None:
        self.known = self.prompt_tokens
        sampling = self.sampling
        self.is_plain = sampling.is_greedy and not sampling.changes_logits and not sampling.min_tokens

    @property
    def is_last_stage(self) -> bool:
        return self.stage == len(self.stage_limits) - 1

    @property
    def useful_guesses(self) -> int:
        """Guesses beyond these would pass the end of the stage, where generation stops or changes."""
        return self.stage_limits[self.stage] - self.stage_tokens - 1

    def row(self, guesses: int = 0) -> Row:
        """What the token after the known ones and `guesses` more (already in `tokens`) depends on."""
        if self.is_plain:
            return PLAIN
        asked = self.prompt_tokens - self.resumed
        return Row(self.sampling, self.seed, self.tokens[: self.known + guesses], asked, self.end_ids)

    def guess(self, ids: Ints) -> None:
        """Put guesses behind the known tokens; they become known only through `append`."""
        self.tokens[self.known : self.known + len(ids)] = ids

    def append(self, ids: Iterable[int]) -> Gain:
        """Take new tokens until one of them ends the stage or the request; the rest is dropped."""
        kept: list[int] = []
        for token in ids:
            if token == FAILED:
                return Gain(tuple(kept), finish_reason="error")
            token = self._forced(token)
            kept.append(token)
            self.tokens[self.known] = token
            self.known += 1
            self.stage_tokens += 1
            reason = self._finish_reason(token)
            if reason is not None:
                return Gain(tuple(kept), finish_reason=reason)
            if self._ends_stage(token):
                self.stage += 1
                self.stage_tokens = 0
                return Gain(tuple(kept), stage_ended=True)
        return Gain(tuple(kept))

    def _forced(self, token: int) -> int:
        """The last token that thinking may have is the one that ends it."""
        is_last = self.stage_tokens == self.stage_limits[self.stage] - 1
        if is_last and not self.is_last_stage and self.think_end_id is not None:
            return self.think_end_id
        return token

    def _finish_reason(self, token: int) -> str | None:
        is_stopped = self.stop is not None and self.stop(token)
        if is_stopped or token in self.end_ids:
            return "stop"
        if self.is_last_stage and self.stage_tokens == self.stage_limits[self.stage]:
            return "length"
        return None

    def _ends_stage(self, token: int) -> bool:
        if self.is_last_stage:
            return False
        return token == self.think_end_id or self.stage_tokens == self.stage_limits[self.stage]


def as_ids(request_id: str, token_ids: Iterable[int], vocab_size: int) -> Ints:
    """Token ids as an array. Raises ValueError for none, for what is no integer, and for ids out of range."""
    ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray | tuple | list) else list(token_ids))
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"request {request_id}: the prompt must be a list of at least one token id")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"request {request_id}: token ids must be integers, got {ids.dtype}")
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if len(bad):
        raise ValueError(f"request {request_id}: token ids must be in [0, {vocab_size}), got {bad[0]}")
    return ids.astype(np.int64)
