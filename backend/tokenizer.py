"""Text to token ids and back, one request at a time.

What a client has been sent is never taken back: text is held until it can no longer change, so no response
ends in half a UTF-8 character or in the beginning of a stop string. Chat templates are not applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

REPLACEMENT: Final = "\ufffd"
_INCOMPLETE_BYTES: Final = 3
_WINDOW: Final = 8


class Codec(Protocol):
    """What the backend needs of a tokenizer; `Tokenizer` is the one it has."""

    def encode(self, text: str, *, start: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def least_tokens(self, text: str) -> int: ...


class Tokenizer:
    """The tokenizer of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self._longest = max(map(len, self._vocabulary))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._vocabulary.values()) + 1

    def token_id(self, token: str) -> int | None:
        """The id of one token of the vocabulary, None where it has no such token."""
        return self._vocabulary.get(token)

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Token ids; `start` adds what the model wants at the beginning of a sequence, if anything."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=start)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def least_tokens(self, text: str) -> int:
        """A lower bound on the tokens of `text` that costs nothing: every token is the longest one."""
        return -(-len(text) // self._longest)


class IncrementalDecoder:
    """Token ids to text, one at a time: the concatenation of what `push` and `flush` return.

    A token's text may depend on the tokens before it (a leading space, the bytes of one character), so the
    last few are decoded together. Only the end of their text can still change, by at most the bytes of an
    incomplete character; so positions are counted from the end and the window may be cut anywhere.
    """

    def __init__(self, codec: Codec, context: Sequence[int] = ()) -> None:
        self._codec = codec
        self._window = list(context[-_WINDOW:])
        self._text = codec.decode(self._window) if self._window else ""
        self._sent = len(self._text)

    def push(self, token_id: int) -> str:
        """New text, or "" while the token leaves a character incomplete."""
        self._window.append(token_id)
        self._text = self._codec.decode(self._window)
        incomplete = len(self._text) - len(self._text.rstrip(REPLACEMENT))
        new = self._take(len(self._text) - min(incomplete, _INCOMPLETE_BYTES))
        if len(self._window) > 2 * _WINDOW:
            self._cut()
        return new

    @property
    def is_settled(self) -> bool:
        """Whether all text of the tokens so far is out."""
        return self._sent >= len(self._text)

    def flush(self) -> str:
        """What is still held, once no token will follow."""
        return self._take(len(self._text))

    def _take(self, end: int) -> str:
        new = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return new

    def _cut(self) -> None:
        unsent = len(self._text) - self._sent
        del self._window[:-_WINDOW]
        self._text = self._codec.decode(self._window)
        self._sent = max(0, len(self._text) - unsent)


class StopText:
    """The text of one answer up to the first stop string, which is not part of it.

    A stop string counts only when it ends after the first `min_tokens` tokens.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is final now; "" after the stop string."""
        self._tokens += 1
        return "" if self.stopped else self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """The rest, once no token will follow."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.flush())
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        if not self._stop:
            return new
        held = len(self._held)
        text = self._held + new
        found = [at for at in (self._find(text, stop, held) for stop in self._stop) if at >= 0]
        if found and self._tokens > self._min_tokens:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _find(text: str, stop: str, held: int) -> int:
        return text.find(stop, max(0, held - len(stop) + 1))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
