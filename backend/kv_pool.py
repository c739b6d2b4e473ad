"""Which KV blocks are whose, and which hold a prefix that can be used again.

Counts and block ids only, no tensors. A full block is remembered under the hash of its tokens and of
everything before them, so that any later request with the same beginning shares it. A block that nobody
holds but that is remembered counts as free; it is forgotten, least recently used first, when a block is
needed and no empty one is left. Never loses or doubles a block: `check` proves it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

_ROOT = b""


class KvPool:
    """`num_blocks` blocks of `block_tokens` tokens each, ids 0 to `num_blocks` - 1."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, got {num_blocks} blocks of {block_tokens}")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._holders = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered, held by nobody; oldest first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._shared = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that `allocate` can give: the empty ones and the remembered ones that nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def shared_blocks(self) -> int:
        """The sum over all held blocks of (holders - 1)."""
        return self._shared

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def chain(self, token_ids: npt.NDArray[np.int64], parent: bytes = _ROOT) -> list[bytes]:
        """The key of each full block of `token_ids`, which follow the block whose key is `parent`."""
        keys = []
        data, size = token_ids.tobytes(), self.block_tokens * token_ids.itemsize
        for at in range(0, len(data) - size + 1, size):
            parent = hashlib.blake2b(parent + data[at : at + size], digest_size=16).digest()
            keys.append(parent)
        return keys

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Hold and return the remembered blocks of the longest known beginning of `keys`."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._hold(block)
            blocks.append(block)
        return blocks

    def allocate(self, count: int) -> list[int]:
        """Hold `count` blocks that nobody holds. Raises MemoryError, changing nothing, when there are too few."""
        if count > self.free_blocks:
            raise MemoryError(f"{count} KV blocks asked for, {self.free_blocks} of {self.num_blocks} are free")
        blocks = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._idle.popitem(last=False)[0]
            self._forget(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def remember(self, block: int, key: bytes) -> None:
        """Let later requests find `block`, held and full, under `key`. The first block of a key keeps it."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def free(self, blocks: Iterable[int], *, forget: bool = False) -> None:
        """Let go of `blocks`, first to last of one request; `forget` those that nobody else holds.

        The last block goes idle first: a chain is forgotten from its end, so that what stays can be matched.
        """
        for block in reversed(tuple(blocks)):
            if self._holders[block] < 1:
                raise AssertionError(f"KV block {block} is let go of, but nobody holds it")
            self._holders[block] -= 1
            if self._holders[block]:
                self._shared -= 1
                continue
            if forget:
                self._forget(block)
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def freed_by(self, tables: Iterable[Sequence[int]]) -> int:
        """Blocks that would become free if the holders of `tables` let go of them."""
        going = Counter(block for table in tables for block in table)
        return sum(self._holders[block] == count for block, count in going.items())

    def check(self) -> None:
        """Raise AssertionError unless every block is exactly one of empty, idle, held, and the maps agree."""
        held = {block for block, holders in enumerate(self._holders) if holders}
        parts = (set(self._empty), set(self._idle), held)
        if sum(map(len, parts)) != self.num_blocks or len(set().union(*parts)) != self.num_blocks:
            sizes = tuple(map(len, parts))
            raise AssertionError(f"empty, idle, held blocks {sizes} do not make up {self.num_blocks}")
        if len(self._empty) != len(parts[0]):
            raise AssertionError("an empty block is listed twice")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise AssertionError("the two directions of the prefix map disagree")
        if parts[1] - self._key_of.keys() or parts[0] & self._key_of.keys():
            raise AssertionError("idle blocks must be remembered and empty ones must not")
        if self._shared != sum(holders - 1 for holders in self._holders if holders):
            raise AssertionError(f"shared blocks are counted as {self._shared}, but holders are {self._holders}")

    def _hold(self, block: int) -> None:
        if self._holders[block]:
            self._shared += 1
        else:
            self._idle.pop(block)
        self._holders[block] += 1

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
