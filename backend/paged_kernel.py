"""Attention over a paged KV cache on a CPU: every key and value is read once, where it lies.

Keys lie transposed, [blocks, kv heads, head dim, block tokens], so that sixteen keys meet a query at once; values
[blocks, kv heads, block tokens, head dim padded to 16]. Both are float32 or the upper halves of it (bfloat16).
A tile is a few query rows of one request; the query heads of one KV head share what is read. Where rows are few,
all KV heads go together through the blocks, so that memory is read in its order and in long runs. Scores, softmax
and sums are float32; each row sums over its own keys in their order, sixteen sums for the softmax, one for each
value: nothing that a row meets in a tile or a batch changes a bit of its result.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .lanes import (
    WIDTH,
    add,
    compiled,
    exponential,
    first,
    fma,
    larger,
    largest,
    load,
    prefetch,
    splat,
    spread,
    store,
    sub,
    total,
)

TILE: Final = 32  # query rows times query heads in a tile, about
_LONG: Final = 1 << 15  # bytes of a block that memory delivers on its own, faster than when asked for the next


@compiled
def lay_out(spans: Any, blocks: Any, block_tokens: int, height: int, few: int) -> Any:
    """Positions and slots [tokens] of requests' tokens, their tiles of at most `height` rows, the table of their blocks
    [requests, blocks], and about how many pairs of query and key there are.

    `spans` [2, requests]: lengths and starts; `blocks`: those in use, request after request. The tiles [tiles, 4]
    of at most `few` rows come apart from the others.
    """
    lengths, starts = spans[0], spans[1]
    tokens, counts, most = 0, np.zeros(2, np.int64), 0
    for request in range(len(lengths)):
        length, last = lengths[request], lengths[request] % height
        tokens, most = tokens + length, max(most, -(-(starts[request] + length) // block_tokens))
        counts[int(height > few)] += length // height
        counts[int(last > few)] += int(last > 0)
    positions, slots = np.empty(tokens, np.int64), np.empty(tokens, np.int64)
    table = np.zeros((len(lengths), most), np.int64)
    small, large = np.empty((counts[0], 4), np.int64), np.empty((counts[1], 4), np.int64)
    counts[:] = 0
    token, block, pairs = 0, 0, 0
    for request in range(len(lengths)):
        start, end = starts[request], starts[request] + lengths[request]
        for index in range(-(-end // block_tokens)):
            table[request, index] = blocks[block]
            block += 1
        for position in range(start, end):
            if (position - start) % height == 0:
                rows = min(height, end - position)
                kind = int(rows > few)
                tile = small[counts[kind]] if kind == 0 else large[counts[kind]]
                tile[0], tile[1], tile[2], tile[3] = token, request, position, rows
                counts[kind] += 1
                pairs += rows * (position + rows)
            positions[token] = position
            slots[token] = table[request, position // block_tokens] * block_tokens + position % block_tokens
            token += 1
    return positions, slots, small, large, table, pairs


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
    heads: int, kv_heads: int, head_dim: int, block_tokens: int, together: int, first_unit: int, last_unit: int,
) -> None:  # fmt: skip
    """Attention of the units (tile, `together` KV heads) in a range; `qkv` as `place` leaves it.

    `tiles` [tiles, 4]: packed row, row of `table`, position and number of query rows. `table` [requests, blocks].
    `out` [tokens, heads * head dim]. `together` divides the KV heads.
    """
    group = heads // kv_heads
    padded = -(-head_dim // WIDTH) * WIDTH
    shares = kv_heads // together
    most, longest = 0, 0
    for unit in range(first_unit, last_unit):
        tile = tiles[unit // shares]
        most, longest = max(most, tile[3] * group), max(longest, tile[2] + tile[3])
    most = (most + most % 2) * together
    query = np.zeros(most * head_dim, np.float32)
    scores = np.empty(most * -(-longest // WIDTH) * WIDTH, np.float32)
    sums = np.empty(most * padded, np.float32)
    wholes = np.empty(most, np.float32)
    for unit in range(first_unit, last_unit):
        tile, head = tiles[unit // shares], unit % shares * together
        rows, end = tile[3] * group, tile[2] + tile[3]
        even = rows + rows % 2
        query[: even * together * head_dim] = 0
        sums[: even * together * padded] = 0
        for row in range(rows * together):
            at = (tile[0] + row % rows // group) * row_size + ((head + row // rows) * group + row % group) * head_dim
            to = (row // rows * even + row % rows) * head_dim
            query[to : to + head_dim] = qkv[at : at + head_dim]
        blocks = table[tile[1]]
        _score(query, blocks, keys, scores, even, end, head, together, kv_heads, head_dim, block_tokens)
        for row in range(rows * together):
            at = (row // rows * even + row % rows) * (-(-end // WIDTH) * WIDTH)
            wholes[row] = _weigh(scores, at, tile[2] + row % rows // group + 1, end)
        _sum(scores, blocks, values, sums, even, end, head, together, kv_heads, padded, block_tokens)
        for row in range(rows * together):
            at = ((tile[0] + row % rows // group) * heads + (head + row // rows) * group + row % group) * head_dim
            begin, scale = (row // rows * even + row % rows) * padded, np.float32(1) / wholes[row]
            for index in range(head_dim):
                out[at + index] = sums[begin + index] * scale


@compiled
def _score(
    query: Any, blocks: Any, keys: Any, scores: Any,
    rows: int, end: int, first_head: int, together: int, kv_heads: int, head_dim: int, block_tokens: int,
) -> None:  # fmt: skip
    """scores[heads, rows, keys padded to 16] = query[heads, rows, head dim] times keys.

    Four rows at a time, and two that are left in both halves of the keys, which memory can deliver side by side.
    """
    last = -(-end // WIDTH) - 1
    stride = (last + 1) * WIDTH
    pair = rows - rows % 4
    asks = together * head_dim * block_tokens * keys.itemsize < _LONG
    for step in range(last + 1 if pair else 0):
        for local in range(together):
            at = _key_at(blocks, step, first_head + local, kv_heads, head_dim, block_tokens)
            ahead = at
            if asks:
                next_step, next_head = _next(step, local, together, last)
                ahead = _key_at(blocks, next_step, first_head + next_head, kv_heads, head_dim, block_tokens)
            for row in range(local * rows, local * rows + pair, 4):
                a = b = c = d = splat(np.float32(0))
                here = 0
                from_0, to = row * head_dim, row * stride + step * WIDTH
                from_1, from_2, from_3 = from_0 + head_dim, from_0 + 2 * head_dim, from_0 + 3 * head_dim
                for index in range(head_dim):
                    prefetch(keys, ahead + here)
                    key = load(keys, at + here)
                    a, b = fma(spread(query, from_0 + index), key, a), fma(spread(query, from_1 + index), key, b)
                    c, d = fma(spread(query, from_2 + index), key, c), fma(spread(query, from_3 + index), key, d)
                    here += block_tokens
                store(scores, to, a)
                store(scores, to + stride, b)
                store(scores, to + 2 * stride, c)
                store(scores, to + 3 * stride, d)
    half = (last + 2) // 2
    for step in range(half if pair < rows else 0):
        more = min(step + half, last)
        for local in range(together):
            row, head = local * rows + pair, first_head + local
            at = _key_at(blocks, step, head, kv_heads, head_dim, block_tokens)
            at_more = _key_at(blocks, more, head, kv_heads, head_dim, block_tokens)
            ahead, ahead_more = at, at_more
            if asks:
                next_step, next_head = _next(step, local, together, last)
                ahead = _key_at(blocks, next_step, first_head + next_head, kv_heads, head_dim, block_tokens)
                next_step, next_head = _next(more, local, together, last)
                ahead_more = _key_at(blocks, next_step, first_head + next_head, kv_heads, head_dim, block_tokens)
            a = b = c = d = splat(np.float32(0))
            here = 0
            for index in range(row * head_dim, (row + 1) * head_dim):
                prefetch(keys, ahead + here)
                prefetch(keys, ahead_more + here)
                key, key_more = load(keys, at + here), load(keys, at_more + here)
                one, two = spread(query, index), spread(query, index + head_dim)
                a, b, c, d = fma(one, key, a), fma(two, key, b), fma(one, key_more, c), fma(two, key_more, d)
                here += block_tokens
            store(scores, row * stride + step * WIDTH, a)
            store(scores, (row + 1) * stride + step * WIDTH, b)
            store(scores, row * stride + more * WIDTH, c)
            store(scores, (row + 1) * stride + more * WIDTH, d)


@compiled
def _next(step: int, local: int, together: int, last: int) -> tuple[int, int]:
    """Step and head that are read next."""
    return (step, local + 1) if local + 1 < together else (min(step + 1, last), 0)


@compiled
def _key_at(blocks: Any, step: int, head: int, kv_heads: int, head_dim: int, block_tokens: int) -> int:
    position = step * WIDTH
    block = blocks[position // block_tokens]
    return (block * kv_heads + head) * head_dim * block_tokens + position % block_tokens  # type: ignore[no-any-return]


@compiled
def _weigh(scores: Any, at: int, seen: int, end: int) -> Any:
    """Turn a row's scores into weights, those after the `seen` first into zero; the sum of the weights."""
    lowest, nothing = splat(np.float32(-np.inf)), splat(np.float32(0))
    whole, sums = at + seen // WIDTH * WIDTH, nothing
    most = first(seen % WIDTH, load(scores, whole), lowest) if seen % WIDTH else lowest
    for here in range(at, whole, WIDTH):
        most = larger(most, load(scores, here))
    top = splat(largest(most))
    for here in range(at, whole, WIDTH):
        weight = exponential(sub(load(scores, here), top))
        store(scores, here, weight)
        sums = add(sums, weight)
    if seen % WIDTH:
        weight = first(seen % WIDTH, exponential(sub(load(scores, whole), top)), nothing)
        store(scores, whole, weight)
        sums = add(sums, weight)
    for here in range(at - (-seen // WIDTH) * WIDTH, at + end, WIDTH):
        store(scores, here, nothing)
    return total(sums)


@compiled
def _sum(
    weights: Any, blocks: Any, values: Any, sums: Any,
    rows: int, end: int, first_head: int, together: int, kv_heads: int, padded: int, block_tokens: int,
) -> None:  # fmt: skip
    """sums[heads, rows, head dim padded to 16] += weights[heads, rows, keys padded to 16] times values."""
    last = -(-end // WIDTH) - 1
    stride = (last + 1) * WIDTH
    pair = rows - rows % 4
    asks = together * padded * block_tokens * values.itemsize < _LONG
    for step in range(last + 1):
        keys = min(WIDTH, end - step * WIDTH)
        for local in range(together):
            at = _value_at(blocks, step, first_head + local, kv_heads, padded, block_tokens)
            ahead = 0
            if asks:
                next_step, next_head = _next(step, local, together, last)
                ahead = _value_at(blocks, next_step, first_head + next_head, kv_heads, padded, block_tokens) - at
            for row in range(local * rows, local * rows + pair, 4):
                from_0 = row * stride + step * WIDTH
                from_1, from_2, from_3 = from_0 + stride, from_0 + 2 * stride, from_0 + 3 * stride
                for lane in range(0, padded, WIDTH):
                    here, to = at + lane, row * padded + lane
                    a, b = load(sums, to), load(sums, to + padded)
                    c, d = load(sums, to + 2 * padded), load(sums, to + 3 * padded)
                    for key in range(keys):
                        prefetch(values, here + ahead)
                        value = load(values, here)
                        one, two = spread(weights, from_0 + key), spread(weights, from_1 + key)
                        a, b = fma(one, value, a), fma(two, value, b)
                        one, two = spread(weights, from_2 + key), spread(weights, from_3 + key)
                        c, d = fma(one, value, c), fma(two, value, d)
                        here += padded
                    store(sums, to, a)
                    store(sums, to + padded, b)
                    store(sums, to + 2 * padded, c)
                    store(sums, to + 3 * padded, d)
            row = local * rows + pair
            for lane in range(0, padded if pair < rows else 0, 2 * WIDTH):
                from_0, here, to = row * stride + step * WIDTH, at + lane, row * padded + lane
                more = min(WIDTH, padded - lane - WIDTH)
                a, b = load(sums, to), load(sums, to + padded)
                c, d = load(sums, to + more), load(sums, to + more + padded)
                for key in range(keys):
                    prefetch(values, here + ahead)
                    prefetch(values, here + ahead + more)
                    value, value_more = load(values, here), load(values, here + more)
                    one, two = spread(weights, from_0 + key), spread(weights, from_0 + stride + key)
                    a, b = fma(one, value, a), fma(two, value, b)
                    c, d = fma(one, value_more, c), fma(two, value_more, d)
                    here += padded
                store(sums, to, a)
                store(sums, to + padded, b)
                store(sums, to + more, c)
                store(sums, to + more + padded, d)


@compiled
def _value_at(blocks: Any, step: int, head: int, kv_heads: int, padded: int, block_tokens: int) -> int:
    position = step * WIDTH
    block = blocks[position // block_tokens]
    return ((block * kv_heads + head) * block_tokens + position % block_tokens) * padded  # type: ignore[no-any-return]
