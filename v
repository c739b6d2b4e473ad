"""Attention over a paged KV cache on a CPU: every key and value is read once, where it lies.

Keys lie transposed, [blocks, kv heads, head dim, block tokens], so that sixteen keys meet a query at once; values
[blocks, kv heads, block tokens, head dim padded to 16]. Both are float32 or the upper halves of it (bfloat16).
A tile is a few query rows of one request and the query heads of one KV head: they share what is read. Scores,
softmax and sums are float32; each row sums over its own keys in their order, sixteen sums for the softmax, one
for each value: nothing that a row meets in a tile or a batch changes a bit of its result.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .lanes import WIDTH, add, compiled, exponential, first, fma, larger, largest, load, prefetch, splat, spread, store, sub, total

TILE: Final = 32  # query rows times query heads in a tile, about
_AHEAD: Final = 4  # how many steps of 16 keys ahead memory is asked for


@compiled
def place(
    qkv: Any, row_size: int, positions: Any, slots: Any, turns: Any, q_norm: Any, k_norm: Any, eps: float,
    scaling: float, keys: Any, values: Any, heads: int, kv_heads: int, head_dim: int, block_tokens: int,
    first_row: int, last_row: int,
) -> None:  # fmt: skip
    """Turn rows of `qkv` and store their keys and values.

    `qkv` holds queries, keys and values of all heads in rows of `row_size`, with 16 numbers to spare at the end;
    `turns` [positions, 2, head dim / 2] cosines and sines, or nothing; `q_norm` and `k_norm` [head dim], or
    nothing; `slots` [tokens]: block * block tokens + offset. Queries are left turned and scaled.
    """
    padded = -(-head_dim // WIDTH) * WIDTH
    stored = np.zeros(padded, keys.dtype)
    for row in range(first_row, last_row):
        block, offset = slots[row] // block_tokens, slots[row] % block_tokens
        for head in range(heads + kv_heads):
            at = row * row_size + head * head_dim
            part = qkv[at : at + head_dim]
            norm = q_norm if head < heads else k_norm
            if len(norm):
                _norm(part, norm, eps)
            if len(turns):
                _turn(part, turns[positions[row]])
            if head < heads:
                for index in range(head_dim):
                    part[index] *= np.float32(scaling)
            else:
                for index in range(0, padded, WIDTH):
                    store(stored, index, load(qkv, at + index))
                to = (block * kv_heads + head - heads) * head_dim * block_tokens + offset
                for index in range(head_dim):
                    keys[to + index * block_tokens] = stored[index]
        for head in range(kv_heads):
            at = row * row_size + (heads + kv_heads + head) * head_dim
            to = ((block * kv_heads + head) * block_tokens + offset) * padded
            nothing = splat(np.float32(0))
            for index in range(0, padded, WIDTH):
                store(values, to + index, first(head_dim - index, load(qkv, at + index), nothing))


@compiled
def _norm(part: Any, weight: Any, eps: float) -> None:
    squares = np.float32(0)
    for number in part:
        squares += number * number
    scale = np.float32(1) / np.sqrt(squares / np.float32(len(part)) + np.float32(eps))
    for index in range(len(part)):
        part[index] = part[index] * scale * weight[index]


@compiled
def _turn(part: Any, turn: Any) -> None:
    half = len(part) // 2
    for index in range(half):
        low, high, cosine, sine = part[index], part[half + index], turn[0, index], turn[1, index]
        part[index] = low * cosine - high * sine
        part[half + index] = high * cosine + low * sine


@compiled
def attend(
    qkv: Any, row_size: int, tiles: Any, table: Any, keys: Any, values: Any, out: Any,
    heads: int, kv_heads: int, head_dim: int, block_tokens: int, first_unit: int, last_unit: int,
) -> None:  # fmt: skip
    """Attention of the units (tile, KV head) in a range; `qkv` as `place` leaves it.

    `tiles` [tiles, 4]: packed row, row of `table`, position and number of query rows. `table` [requests, blocks].
    `out` [tokens, heads * head dim].
    """
    group = heads // kv_heads
    padded = -(-head_dim // WIDTH) * WIDTH
    most, longest = 0, 0
    for unit in range(first_unit, last_unit):
        tile = tiles[unit // kv_heads]
        most, longest = max(most, tile[3] * group), max(longest, tile[2] + tile[3])
    most += most % 2
    query = np.zeros(most * head_dim, np.float32)
    scores = np.empty(most * -(-longest // WIDTH) * WIDTH, np.float32)
    sums = np.empty(most * padded, np.float32)
    wholes = np.empty(most, np.float32)
    for unit in range(first_unit, last_unit):
        tile, head = tiles[unit // kv_heads], unit % kv_heads
        rows, end = tile[3] * group, tile[2] + tile[3]
        even = rows + rows % 2
        for row in range(rows):
            at = (tile[0] + row // group) * row_size + (head * group + row % group) * head_dim
            query[row * head_dim : (row + 1) * head_dim] = qkv[at : at + head_dim]
        query[rows * head_dim : even * head_dim] = 0
        sums[: even * padded] = 0
        blocks = table[tile[1]]
        _score(query, blocks, keys, scores, even, end, head, kv_heads, head_dim, block_tokens)
        for row in range(rows):
            seen = tile[2] + row // group + 1
            wholes[row] = _weigh(scores, row * (-(-end // WIDTH) * WIDTH), seen, end)
        _sum(scores, blocks, values, sums, even, end, head, kv_heads, padded, block_tokens)
        for row in range(rows):
            at = (tile[0] + row // group) * heads * head_dim + (head * group + row % group) * head_dim
            scale = np.float32(1) / wholes[row]
            for index in range(head_dim):
                out[at + index] = sums[row * padded + index] * scale


@compiled
def _score(
    query: Any, blocks: Any, keys: Any, scores: Any,
    rows: int, end: int, head: int, kv_heads: int, head_dim: int, block_tokens: int,
) -> None:  # fmt: skip
    """scores[rows, keys padded to 16] = query[rows, head dim] times keys; an even number of rows."""
    count = -(-end // WIDTH)
    stride = count * WIDTH
    for step in range(count):
        at = _key_at(blocks, step, head, kv_heads, head_dim, block_tokens)
        ahead = _key_at(blocks, min(step + _AHEAD, count - 1), head, kv_heads, head_dim, block_tokens)
        for row in range(0, rows, 4):
            a = b = c = d = splat(np.float32(0))
            from_0, to = row * head_dim, row * stride + step * WIDTH
            from_1, from_2, from_3 = from_0 + head_dim, from_0 + 2 * head_dim, from_0 + 3 * head_dim
            if rows - row == 2:
                for index in range(0, head_dim * block_tokens, block_tokens):
                    prefetch(keys, ahead + index)
                    key = load(keys, at + index)
                    a, b = fma(spread(query, from_0), key, a), fma(spread(query, from_1), key, b)
                    from_0, from_1 = from_0 + 1, from_1 + 1
            else:
                for index in range(0, head_dim * block_tokens, block_tokens):
                    prefetch(keys, ahead + index)
                    key = load(keys, at + index)
                    a, b = fma(spread(query, from_0), key, a), fma(spread(query, from_1), key, b)
                    c, d = fma(spread(query, from_2), key, c), fma(spread(query, from_3), key, d)
                    from_0, from_1, from_2, from_3 = from_0 + 1, from_1 + 1, from_2 + 1, from_3 + 1
                store(scores, to + 2 * stride, c)
                store(scores, to + 3 * stride, d)
            store(scores, to, a)
            store(scores, to + stride, b)


@compiled
def _key_at(blocks: Any, step: int, head: int, kv_heads: int, head_dim: int, block_tokens: int) -> int:
    position = step * WIDTH
    block = blocks[position // block_tokens]
    return (block * kv_heads + head) * head_dim * block_tokens + position % block_tokens  # type: ignore[no-any-return]


@compiled
def _weigh(scores: Any, at: int, seen: int, end: int) -> Any:
    """Turn a row's scores into weights, those after the `seen` first into zero; the sum of the weights."""
    lowest, nothing = splat(np.float32(-np.inf)), splat(np.float32(0))
    most = lowest
    for key in range(0, seen, WIDTH):
        most = larger(most, first(seen - key, load(scores, at + key), lowest))
    top, sums = splat(largest(most)), nothing
    for key in range(0, seen, WIDTH):
        weight = first(seen - key, exponential(sub(load(scores, at + key), top)), nothing)
        store(scores, at + key, weight)
        sums = add(sums, weight)
    for key in range(-(-seen // WIDTH) * WIDTH, end, WIDTH):
        store(scores, at + key, nothing)
    return total(sums)


@compiled
def _sum(
    weights: Any, blocks: Any, values: Any, sums: Any,
    rows: int, end: int, head: int, kv_heads: int, padded: int, block_tokens: int,
) -> None:  # fmt: skip
    """sums[rows, head dim padded to 16] += weights[rows, keys padded to 16] times values; an even number of rows."""
    count = -(-end // WIDTH)
    stride = count * WIDTH
    for step in range(count):
        at = _value_at(blocks, step, head, kv_heads, padded, block_tokens)
        ahead = _value_at(blocks, min(step + _AHEAD, count - 1), head, kv_heads, padded, block_tokens) - at
        keys = min(WIDTH, end - step * WIDTH)
        for row in range(0, rows, 4):
            from_0 = row * stride + step * WIDTH
            from_1, from_2, from_3 = from_0 + stride, from_0 + 2 * stride, from_0 + 3 * stride
            for lane in range(0, padded, WIDTH):
                here, to = at + lane, row * padded + lane
                a, b = load(sums, to), load(sums, to + padded)
                if rows - row == 2:
                    for key in range(keys):
                        prefetch(values, here + ahead)
                        value = load(values, here)
                        a, b = fma(spread(weights, from_0 + key), value, a), fma(spread(weights, from_1 + key), value, b)
                        here += padded
                else:
                    c, d = load(sums, to + 2 * padded), load(sums, to + 3 * padded)
                    for key in range(keys):
                        prefetch(values, here + ahead)
                        value = load(values, here)
                        a, b = fma(spread(weights, from_0 + key), value, a), fma(spread(weights, from_1 + key), value, b)
                        c, d = fma(spread(weights, from_2 + key), value, c), fma(spread(weights, from_3 + key), value, d)
                        here += padded
                    store(sums, to + 2 * padded, c)
                    store(sums, to + 3 * padded, d)
                store(sums, to, a)
                store(sums, to + padded, b)


@compiled
def _value_at(blocks: Any, step: int, head: int, kv_heads: int, padded: int, block_tokens: int) -> int:
    position = step * WIDTH
    block = blocks[position // block_tokens]
    return ((block * kv_heads + head) * block_tokens + position % block_tokens) * padded  # type: ignore[no-any-return]
