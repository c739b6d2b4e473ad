"""What recent sessions said, so that the next round's prompt is the very tokens whose KV is cached.

Text encoded afresh may split differently from the tokens that were generated, and then no prefix of it is
in the KV cache beyond the first difference. A session remembers the ids of its last finished round.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from .generation import Generation
from .tokenizer import Codec, IncrementalDecoder


@dataclass(frozen=True, slots=True)
class Round:
    """One finished round: its prompt as text and ids, and the ids it answered."""

    prompt: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]


def round_of(prompt: str, generation: Generation, output_ids: Sequence[int]) -> Round:
    """What a finished generation said; tokens that another instance generated are part of the answer."""
    asked = len(generation.token_ids) - generation.resumed
    ids = (*generation.token_ids, *output_ids)
    return Round(prompt, ids[:asked], ids[asked:])


class Sessions:
    """The last round of the most recently used sessions, at most `max_tokens` ids in all.

    Written by the engine thread and read by Triton's, hence the lock; it is held for dictionary work only.
    """

    def __init__(self, codec: Codec, max_tokens: int) -> None:
        self._codec = codec
        self._max_tokens = max_tokens
        self._rounds: OrderedDict[str, Round] = OrderedDict()
        self._tokens = 0
        self._lock = threading.Lock()

    def remember(self, session: str, last: Round) -> None:
        """Replace the session's last round and forget the longest unused ones beyond the bound."""
        with self._lock:
            self._forget(session)
            self._rounds[session] = last
            self._tokens += _size(last)
            while self._tokens > self._max_tokens:
                self._forget(next(iter(self._rounds)))

    def encode(self, session: str, text: str) -> list[int]:
        """The ids of a prompt of this session: those of the last round as far as `text` repeats it."""
        with self._lock:
            last = self._rounds.get(session)
            if last is not None:
                self._rounds.move_to_end(session)
        if last is None or not text.startswith(last.prompt):
            return self._codec.encode(text)
        kept, rest = self._repeated(last, text[len(last.prompt) :])
        ids = [*last.prompt_ids, *last.output_ids[:kept]]
        return ids + (self._codec.encode(rest, start=False) if rest else [])

    def _repeated(self, last: Round, text: str) -> tuple[int, str]:
        """How many answered tokens `text` begins with, and the text after them; end tokens have no text."""
        decoder = IncrementalDecoder(self._codec, last.prompt_ids)
        kept, end, position = 0, 0, 0
        for count, token_id in enumerate(last.output_ids, start=1):
            new = decoder.push(token_id)
            if not text.startswith(new, position):
                break
            position += len(new)
            if decoder.is_settled and position > end:
                kept, end = count, position
        return kept, text[end:]

    def _forget(self, session: str) -> None:
        dropped = self._rounds.pop(session, None)
        self._tokens -= _size(dropped) if dropped else 0


def _size(last: Round) -> int:
    return len(last.prompt_ids) + len(last.output_ids)
