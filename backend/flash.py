"""Attention over a paged KV cache by one variable-length kernel call a layer: the way of a GPU.

The kernel is PyTorch's `varlen_attn` with a block table (from 2.12 on; flash attention 2, which is built in,
wants pages of a multiple of 256 tokens). It is tried against `reference` before it is used: that computes the
same on any device, one request after another, and takes the kernel's place in tests. A batch reaches the
device in one copy. Same cache contract as `attention.KvCache`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias, cast

import numpy as np
import torch

from .attention import Ints, Span

log = logging.getLogger(__name__)

PAGE_TOKENS: Final = 256  # what flash attention 2 can page by
HALF: Final = (torch.bfloat16, torch.float16)


class FlashCache:
    """Keys and values of all layers: [layers, num_blocks + 1, block tokens, kv heads, head dim] each.

    Padding tokens write to the extra block, `scratch`, and padding rows read it.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, num_blocks: int, block_tokens: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        shape = (layers, num_blocks + 1, block_tokens, kv_heads, head_dim)
        self.block_tokens, self.scratch = block_tokens, num_blocks
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(self.keys, self.values, strict=True)]

    def clear(self, blocks: Sequence[int]) -> None:
        """Fresh blocks must hold numbers: a broken request's NaN values must not outlive it."""
        self.values.index_fill_(1, torch.tensor(blocks, device=self.values.device), 0)

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key` and `value` [tokens, kv heads, head dim] at `slots` [tokens]: block * block tokens + offset."""
        keys, values = self._rows[layer]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)


@dataclass(frozen=True, slots=True)
class FlashBatch:
    """Packed tokens and where each request finds its keys; all tensors on the device."""

    cache: FlashCache
    input_ids: torch.Tensor  # [tokens]
    position_ids: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens]
    starts: torch.Tensor  # [requests + 1] int32: packed rows at which requests begin, and the end
    lengths: torch.Tensor  # [requests] int32: keys of each
    key_starts: torch.Tensor  # [requests + 1] int32: their running sum
    table: torch.Tensor  # [requests, blocks] int32
    most_queries: int
    most_keys: int


Kernel: TypeAlias = Callable[[torch.Tensor, FlashBatch, int, float], torch.Tensor]


def choose_kernel(
    dtype: torch.dtype, device: torch.device, block_tokens: int, heads: int, kv_heads: int, head_dim: int
) -> Kernel | None:
    """PyTorch's paged kernel in the first form that computes what `reference` does here; None where none does.

    Which page sizes are taken, and whether the cumulative lengths of the keys must or must not be given, differs
    between the flash attentions behind it, so it is tried and not looked up.
    """
    if device.type != "cuda" or dtype not in HALF:
        return None
    cache = FlashCache(1, kv_heads, head_dim, 4, block_tokens, dtype, device)
    for each in (cache.keys, cache.values):
        each.normal_()
    spans = [Span(np.zeros(3, np.int64), block_tokens - 1, [2, 0]), Span(np.zeros(1, np.int64), 5, [1])]
    batch = pack(spans, cache)
    query = torch.randn(len(batch.input_ids), heads, head_dim, dtype=dtype, device=device)
    wanted = reference(query, batch, 0, head_dim**-0.5).float()
    for kernel in (partial(varlen, keyed=False), partial(varlen, keyed=True)):
        try:
            got = kernel(query, batch, 0, head_dim**-0.5).float()
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            log.info("paged attention with pages of %d tokens: %s", block_tokens, str(error).splitlines()[0])
            continue
        if torch.allclose(got, wanted, atol=0.03, rtol=0.03):
            return kernel
    log.warning(
        "no paged attention kernel takes pages of %d tokens: keys are gathered; try \"block_tokens\": %d",
        block_tokens, PAGE_TOKENS,
    )  # fmt: skip
    return None


def varlen(query: torch.Tensor, batch: FlashBatch, layer: int, scaling: float, *, keyed: bool) -> torch.Tensor:
    """PyTorch's kernel: query [tokens, heads, head dim], each row sees its request's keys up to its own.

    `keyed`: give it the cumulative lengths of the keys too.
    """
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query, batch.cache.keys[layer], batch.cache.values[layer], batch.starts, batch.key_starts if keyed else None,
        batch.most_queries, batch.most_keys, scale=scaling, window_size=(-1, 0), enable_gqa=True,
        seqused_k=batch.lengths, block_table=batch.table,
    )  # fmt: skip
    return cast(torch.Tensor, out)


def reference(query: torch.Tensor, batch: FlashBatch, layer: int, scaling: float) -> torch.Tensor:
    """The same in float32, request after request."""
    keys, values = batch.cache.keys[layer], batch.cache.values[layer]
    out = torch.zeros_like(query)
    ends = batch.starts.tolist()
    for index, (first, last) in enumerate(itertools.pairwise(ends)):
        length = int(batch.lengths[index])
        key, value = (each[batch.table[index].long()].flatten(0, 1)[:length].float() for each in (keys, values))
        group = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(group, dim=1).transpose(0, 1) for each in (key, value))
        scores = query[first:last].float().transpose(0, 1) @ key.transpose(1, 2) * scaling
        position = torch.arange(length, device=query.device)
        future = position > position[length - (last - first) :, None]
        weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
        out[first:last] = (weights @ value).transpose(0, 1).to(out.dtype)
    return out


def attend(
    batch: FlashBatch, kernel: Kernel,
    layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """Store the batch's keys and values, then attention: [tokens, heads, head dim] to [tokens, heads * head dim]."""
    batch.cache.write(layer, batch.slots, key, value)
    return kernel(query.contiguous(), batch, layer, scaling).reshape(len(query), -1)


@dataclass(frozen=True, slots=True)
class Columns:
    """A batch as the numbers that go to the device, in one array: its parts are views of `numbers`."""

    numbers: Ints
    tokens: int
    requests: int
    width: int  # blocks in a row of the table

    @staticmethod
    def empty(tokens: int, requests: int, width: int, out: Ints | None = None) -> Columns:
        size = 3 * tokens + 2 * requests + 1 + requests * width
        return Columns(np.zeros(size, np.int64) if out is None else out[:size], tokens, requests, width)

    def split(self, flat: Any) -> tuple[Any, ...]:
        """ids, positions, slots, starts, lengths and table of `flat`, an array or a tensor of this size."""
        tokens, requests = self.tokens, self.requests
        ends = np.cumsum([tokens, tokens, tokens, requests + 1, requests]).tolist()
        parts = [flat[start:end] for start, end in zip([0, *ends], [*ends, len(flat)], strict=True)]
        return (*parts[:5], parts[5].reshape(requests, self.width))


def fill(spans: Sequence[Span], cache: FlashCache, columns: Columns) -> None:
    """Write `spans` into `columns`; what is left over becomes one-token requests that nobody asked for."""
    ids, positions, slots, starts, lengths, table = columns.split(columns.numbers)
    count, size = len(spans), cache.block_tokens
    queries = np.ones(columns.requests, np.int64)
    queries[:count] = [len(span.tokens) for span in spans]
    if count < columns.requests:
        queries[count:] = (columns.tokens - int(queries[:count].sum())) // (columns.requests - count)
    np.cumsum(queries, out=starts[1:])
    starts[0] = 0
    used = int(starts[count])
    lengths[:count] = [span.end for span in spans]
    lengths[count:] = queries[count:]
    table[:] = cache.scratch
    for row, span in zip(table, spans, strict=False):
        blocks = -(-span.end // size)
        row[:blocks] = span.blocks[:blocks]
    owner = np.repeat(np.arange(count), queries[:count])
    ids[:used] = np.concatenate([span.tokens for span in spans])
    positions[:used] = np.arange(used) - starts[owner] + np.array([span.start for span in spans])[owner]
    slots[:used] = table[owner, positions[:used] // size] * size + positions[:used] % size
    ids[used:], positions[used:], slots[used:] = 0, 0, cache.scratch * size


def batch_of(flat: torch.Tensor, columns: Columns, cache: FlashCache, most_queries: int, most_keys: int) -> FlashBatch:
    """The batch whose numbers lie on the device in `flat`, int64."""
    ids, positions, slots, starts, lengths, table = columns.split(flat)
    starts, lengths, table = (each.to(torch.int32) for each in (starts, lengths, table))
    key_starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return FlashBatch(cache, ids, positions, slots, starts, lengths, key_starts, table, most_queries, most_keys)


def pack(spans: Sequence[Span], cache: FlashCache) -> FlashBatch:
    """The batch of `spans`, without padding."""
    longest = max(span.end for span in spans)
    width = -(-longest // cache.block_tokens)
    columns = Columns.empty(sum(len(span.tokens) for span in spans), len(spans), width)
    fill(spans, cache, columns)
    flat = torch.from_numpy(columns.numbers)
    if cache.keys.is_cuda:
        flat = flat.pin_memory().to(cache.keys.device, non_blocking=True)
    most = max(len(span.tokens) for span in spans)
    return batch_of(flat, columns, cache, most, longest)
