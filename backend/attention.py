"""Attention over a paged KV cache, as a function that Hugging Face model code calls.

The way that needs nothing but PyTorch: where a GPU has no kernel for the type or the block size, and on a CPU for
block sizes that are no multiple of 16 and for float16 (`cpu_decoder` computes the rest).

A batch packs the tokens of many requests into one row of tokens. What a token attends to, and the bits of
the result, do not depend on what else is in the batch or on how a prompt was cut into chunks: each query
row sees its own keys in order, padded only with keys of weight zero; the sum over keys is taken in fixed
steps; and every matrix product has a multiple of `ROWS` rows or many, since BLAS libraries round a few odd
rows differently (measured with MKL, 1 to 16 threads). Scores, softmax and sums are float32 whatever the
model's type. Never allocates or frees blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

NAME: Final = "slos_paged"
ROWS: Final = 4
_LONG: Final = 32  # chunks of more tokens attend one by one, in tiles; shorter ones many at once
_TILE: Final = 128  # query rows times query heads per KV head in a tile of a long chunk
_KEY_STEP: Final = 16  # key lengths are padded to a multiple of this
_SUM_STEP: Final = 192  # keys summed in one product: BLAS splits more, where depends on the padded length
_GROUP_BYTES: Final = 2 << 20  # keys gathered for one group of short chunks: about what stays in a core's cache

Ints = npt.NDArray[np.int64]
# layer, query [tokens, heads, head dim], key and value [tokens, kv heads, head dim], scaling
# to [tokens, heads * head dim]
Attend: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one request to compute: ids [length] from position `start`; `blocks` hold them and all before."""

    tokens: Ints
    start: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class KvCache:
    """Keys and values of all layers: [layers, num_blocks + 2, kv heads, block tokens, head dim] each.

    Two more blocks than the pool has: padding tokens write to `scratch`, padding keys are read from `zeros`,
    which nobody writes. Fresh blocks must be passed to `clear`, so that a broken request's NaN values do
    not outlive it (weight zero times NaN is NaN; stale keys are masked after the product and do no harm).
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, num_blocks: int, block_tokens: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        shape = (layers, num_blocks + 2, kv_heads, block_tokens, head_dim)
        self.kv_heads, self.head_dim, self.block_tokens = kv_heads, head_dim, block_tokens
        self.scratch, self.zeros = num_blocks, num_blocks + 1
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        # views made once: of each layer's tokens and of its blocks, keys and values
        self._tokens = [
            (k.view(-1, head_dim), v.view(-1, head_dim)) for k, v in zip(self.keys, self.values, strict=True)
        ]
        size = block_tokens * head_dim
        self._blocks = [(k.view(-1, size), v.view(-1, size)) for k, v in self._tokens]
        self._gathered = torch.empty(0, dtype=dtype, device=device)

    def clear(self, blocks: Sequence[int]) -> None:
        self.values.index_fill_(1, torch.tensor(blocks, device=self.values.device), 0)

    def write(self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key` and `value` [tokens, kv heads, head dim] at `rows` [tokens * kv heads]."""
        keys, values = self._tokens[layer]
        keys.index_copy_(0, rows, key.reshape(-1, self.head_dim))
        values.index_copy_(0, rows, value.reshape(-1, self.head_dim))

    def read(self, layer: int, rows: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [-1, length, head dim] of `rows` (block * kv heads + head), valid until the next read."""
        keys, values = self._blocks[layer]
        half = len(rows) * keys.shape[1]
        if self._gathered.numel() < 2 * half:
            self._gathered = self.keys.new_empty(2 * half)
        key, value = self._gathered[:half], self._gathered[half : 2 * half]
        torch.index_select(keys, 0, rows, out=key.view(len(rows), -1))
        torch.index_select(values, 0, rows, out=value.view(len(rows), -1))
        shape = (-1, length, self.head_dim)
        return key.view(shape).float(), value.view(shape).float()


@dataclass(frozen=True, slots=True)
class _Group:
    """Short chunks computed together: `members` of them, `height` query rows each, `length` keys each."""

    members: int
    height: int
    length: int
    queries: torch.Tensor  # [members * height]: packed rows; a shorter chunk repeats its last
    kv_rows: torch.Tensor  # [kv heads * members * blocks]
    sure: int  # keys that every query of the group sees
    masked: torch.Tensor  # [members, height, 1, length - sure]: keys after the query


@dataclass(frozen=True, slots=True)
class _Long:
    """One long chunk: packed rows from `first`, positions from `start`."""

    first: int
    start: int
    tiles: tuple[int, ...]  # positions at which its tiles begin and the last ends; all about the same size
    length: int  # keys gathered: the end, padded
    kv_rows: torch.Tensor  # [kv heads * blocks]


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed tokens and, computed once for all layers, where each finds its keys and values."""

    cache: KvCache
    input_ids: torch.Tensor  # [1, tokens]
    position_ids: torch.Tensor  # [1, tokens]
    last_rows: Ints  # [spans]: the packed row of each span's last token
    kv_writes: torch.Tensor  # [tokens * kv heads]
    groups: tuple[_Group, ...]
    longs: tuple[_Long, ...]
    causal: torch.Tensor  # [tile, 1, tile + key step]: keys after the query, from a tile's first position on


def pack(spans: Sequence[Span], cache: KvCache, heads_per_kv: int) -> Batch:
    """The batch of `spans`, padded to a multiple of `ROWS` tokens."""
    device, size = cache.keys.device, cache.block_tokens
    lengths = np.array([len(span.tokens) for span in spans])
    starts = np.array([span.start for span in spans])
    firsts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(spans)), lengths)
    positions = np.arange(len(owner)) - (firsts - starts)[owner]
    blocks = _block_table(spans, cache)
    written = blocks[owner, positions // size]
    tokens, positions, written = (
        _padded(array, fill)
        for array, fill in ((np.concatenate([s.tokens for s in spans]), 0), (positions, 0), (written, cache.scratch))
    )
    writes = (written[:, None] * cache.kv_heads + np.arange(cache.kv_heads)) * size + (positions % size)[:, None]
    tile = max(1, _TILE // heads_per_kv)
    layout = _Layout(cache, heads_per_kv, tile, lengths, starts, firsts, blocks)
    return Batch(
        cache=cache,
        input_ids=torch.from_numpy(tokens)[None].to(device),
        position_ids=torch.from_numpy(positions)[None].to(device),
        last_rows=firsts + lengths - 1,
        kv_writes=torch.from_numpy(writes.reshape(-1)).to(device),
        groups=tuple(layout.groups()),
        longs=tuple(layout.longs()),
        causal=_after(tile, tile + _KEY_STEP, device),
    )


@lru_cache(maxsize=8)
def _after(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(columns, device=device) > torch.arange(rows, device=device)[:, None])[:, None]


def _padded(array: Ints, fill: int) -> Ints:
    return np.concatenate([array, np.full(-len(array) % ROWS, fill)])


def _block_table(spans: Sequence[Span], cache: KvCache) -> Ints:
    """[spans, blocks]: block ids of each span up to its end, then `zeros` for every key length it may be padded to."""
    most = max(_key_length(span.end, cache.block_tokens) for span in spans) // cache.block_tokens
    table = np.full((len(spans), most), cache.zeros)
    for row, span in zip(table, spans, strict=True):
        used = -(-span.end // cache.block_tokens)
        row[:used] = span.blocks[:used]
    return table


def _key_length(end: int, block_tokens: int) -> int:
    step = np.lcm(_KEY_STEP, block_tokens)
    return int(-(-end // step) * step)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Sorts the chunks of a batch into groups of short ones and single long ones."""

    cache: KvCache
    heads_per_kv: int
    tile: int
    lengths: Ints
    starts: Ints
    firsts: Ints
    blocks: Ints

    def longs(self) -> Iterator[_Long]:
        for index in np.flatnonzero(self.lengths > _LONG).tolist():
            start, size = int(self.starts[index]), int(self.lengths[index])
            count = -(-size // self.tile)
            tiles = tuple(start + size * part // count for part in range(count + 1))
            length = _key_length(start + size, self.cache.block_tokens)
            yield _Long(int(self.firsts[index]), start, tiles, length, self._kv_rows(np.array([index]), length))

    def groups(self) -> Iterator[_Group]:
        """Groups of like height and length, so that little is padded, and small enough to stay in the cache."""
        short = np.flatnonzero(self.lengths <= _LONG)
        heights = np.maximum(self.lengths[short], ROWS // math.gcd(ROWS, self.heads_per_kv))
        heights = 1 << np.ceil(np.log2(heights)).astype(int)
        ends = (self.starts + self.lengths)[short]
        order = np.lexsort((-ends, heights))
        members: list[int] = []
        height = length = 0
        for at in order.tolist():
            fits = len(members) < _GROUP_BYTES // (length * self.cache.kv_heads * self.cache.head_dim * 4 or 1)
            near = ends[at] >= length * 0.75 or length <= 128
            if members and not (heights[at] == height and near and fits):
                yield self._group(np.array(members), height, length)
                members = []
            if not members:
                height, length = int(heights[at]), _key_length(int(ends[at]), self.cache.block_tokens)
            members.append(int(short[at]))
        if members:
            yield self._group(np.array(members), height, length)

    def _group(self, members: Ints, height: int, length: int) -> _Group:
        device = self.cache.keys.device
        within = np.minimum(np.arange(height), self.lengths[members][:, None] - 1)
        positions = self.starts[members][:, None] + within
        sure = int(positions.min()) + 1
        masked = np.arange(sure, length) > positions[:, :, None, None]
        queries = (self.firsts[members][:, None] + within).reshape(-1)
        return _Group(
            len(members), height, length, torch.from_numpy(queries).to(device),
            self._kv_rows(members, length), sure, torch.from_numpy(masked).to(device),
        )  # fmt: skip

    def _kv_rows(self, members: Ints, length: int) -> torch.Tensor:
        blocks = self.blocks[members, : length // self.cache.block_tokens]
        rows = blocks * self.cache.kv_heads + np.arange(self.cache.kv_heads)[:, None, None]
        return torch.from_numpy(rows.reshape(-1)).to(self.cache.keys.device)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    slos_attend: Attend,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """`slos_attend` as transformers calls it: query [1, heads, tokens, head dim] to [1, tokens, heads, head dim].

    The mask is not used: a token sees the tokens of its own request up to itself.
    """
    layer = cast(int, module.layer_idx)
    _, heads, tokens, head_dim = query.shape
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    return slos_attend(layer, query, key, value, scaling).view(1, tokens, heads, head_dim), None


def attend(
    batch: Batch, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of all tokens of `batch`: query [tokens, heads, head dim] to [tokens, heads * head dim].

    Stores the batch's keys and values [tokens, kv heads, head dim] first.
    """
    cache = batch.cache
    cache.write(layer, batch.kv_writes, key, value)
    rows = (query * scaling).reshape(len(query), -1).float()
    out = torch.zeros_like(rows)
    for group in batch.groups:
        out.index_copy_(0, group.queries, _attend_group(cache, layer, group, rows))
    for chunk in batch.longs:
        _attend_long(cache, layer, chunk, batch.causal, rows, out)
    return out.to(query.dtype)


def _attend_group(cache: KvCache, layer: int, group: _Group, rows: torch.Tensor) -> torch.Tensor:
    key, value = cache.read(layer, group.kv_rows, group.length)
    kv_heads, dim = cache.kv_heads, cache.head_dim
    shape = (group.members, group.height, kv_heads, -1, dim)
    query = rows.index_select(0, group.queries).view(shape).permute(2, 0, 1, 3, 4)
    scores = torch.bmm(query.reshape(len(key), -1, dim), key.transpose(1, 2))
    unsure = scores.view(kv_heads, group.members, group.height, -1, group.length)[..., group.sure :]
    unsure.masked_fill_(group.masked, -torch.inf)
    out = _weighted_sum(torch.softmax(scores, dim=-1), value)
    out = out.view(kv_heads, group.members, group.height, -1, dim).permute(1, 2, 0, 3, 4)
    return out.reshape(group.members * group.height, -1)


def _attend_long(
    cache: KvCache, layer: int, chunk: _Long, causal: torch.Tensor, rows: torch.Tensor, out: torch.Tensor
) -> None:
    key, value = cache.read(layer, chunk.kv_rows, chunk.length)
    kv_heads, dim = cache.kv_heads, cache.head_dim
    for start, end in pairwise(chunk.tiles):
        length = min(-(-end // _KEY_STEP) * _KEY_STEP, chunk.length)
        at = slice(chunk.first + start - chunk.start, chunk.first + end - chunk.start)
        query = rows[at].view(end - start, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
        scores = torch.bmm(query, key[:, :length].transpose(1, 2))
        future = scores.view(kv_heads, end - start, -1, length)[..., start:]
        future.masked_fill_(causal[: end - start, :, : length - start], -torch.inf)
        part = _weighted_sum(torch.softmax(scores, dim=-1), value[:, :length])
        out[at] = part.view(kv_heads, end - start, -1, dim).transpose(0, 1).reshape(end - start, -1)


def _weighted_sum(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`weights` [batch, rows, keys] times `value` [batch, keys, head dim], in steps of `_SUM_STEP` keys."""
    out = torch.bmm(weights[:, :, :_SUM_STEP], value[:, :_SUM_STEP])
    for first in range(_SUM_STEP, weights.shape[-1], _SUM_STEP):
        keys = slice(first, first + _SUM_STEP)
        out = torch.baddbmm(out, weights[:, :, keys], value[:, keys], out=out)
    return out


def register() -> None:
    """Make `paged_attention` known to transformers as `NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)
