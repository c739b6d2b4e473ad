"""What an engine is asked to generate and what it gives back, whichever engine it is: plain values, no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request chooses its tokens. Raises ValueError naming the field and what was got.

    `temperature` 0 is greedy. `top_k` 0 or -1 keeps all tokens. `min_p` drops tokens less likely than that
    share of the likeliest. The repetition penalty counts prompt and output, the other two only the output.
    Until `min_tokens` are out, no end token can be chosen. `ignore_eos`: the model's end tokens end nothing.
    `end_id` replaces the model's end tokens. `seed` None: a random one for each request.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    end_id: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not _is_within(value, low, high):
                raise ValueError(f"{name}: must be {_range_text(low, high)}, got {value!r}")
        for name, least in (("top_k", -1), ("seed", None), ("min_tokens", 0), ("end_id", 0)):
            number = getattr(self, name)
            if number is None and name in ("seed", "end_id"):
                continue
            if isinstance(number, bool) or not isinstance(number, int) or (least is not None and number < least):
                bound = "" if least is None else f" >= {least}"
                raise ValueError(f"{name}: must be an integer{bound}, got {number!r}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether penalties apply (end tokens before `min_tokens` are told apart by `Row`)."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


# name, least value (None: just above 0), greatest value (None: any finite)
_RANGES: Final[tuple[tuple[str, float | None, float | None], ...]] = (
    ("temperature", 0.0, None),
    ("top_p", None, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


def _is_within(value: object, low: float | None, high: float | None) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (value > 0 if low is None else value >= low) and (value < math.inf if high is None else value <= high)


def _range_text(low: float | None, high: float | None) -> str:
    lower = "> 0" if low is None else f">= {low:g}"
    return f"a finite number {lower}" if high is None else f"a finite number {lower} and <= {high:g}"


@dataclass(frozen=True, slots=True)
class Generation:
    """What to generate: a prompt, the most new tokens of each stage (several: thinking, then the answer), how.

    `stop` is called with every new token in order; True finishes the request, the token is kept. The last
    `resumed` of `token_ids` were generated elsewhere: the next token is drawn as the one after them.
    """

    request_id: str
    token_ids: Sequence[int]
    stage_limits: tuple[int, ...]
    sampling: SamplingParams
    stop: Callable[[int], bool] | None = None
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """What one request gained in a step. `finish_reason`: None, or "stop", "length" or "error" in its last one.

    Of `drafted` guesses that were really made, `accepted` are among the tokens.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    drafted: int = 0
    accepted: int = 0
