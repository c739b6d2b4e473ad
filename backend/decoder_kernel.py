"""All layers of a decoder of the Llama family as one call, for one thread.

A batch of a few tokens takes a small model a millisecond, and each call of a kernel a few microseconds of Python,
of which a layer makes nine; and whoever waits for the interpreter's lock gets it once instead of nine times a
layer. The kernels are the same, and so are the bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .lanes import WIDTH, compiled, load, splat, store
from .paged_kernel import attend, place
from .product_kernel import add_norm, gate, multiply


@compiled
def embed(ids: Any, embedding: Any, size: int, x: Any, delta: Any, first_row: int, last_row: int) -> None:
    """x = the rows `ids` [rows] of `embedding` [vocabulary, size], delta = 0; all flat."""
    for row in range(first_row, last_row):
        for index in range(0, size, WIDTH):
            store(x, row * size + index, load(embedding, ids[row] * size + index))
            store(delta, row * size + index, splat(np.float32(0)))


@compiled
def decode(
    ids: Any, positions: Any, slots: Any, few: Any, others: Any, table: Any, together: int,
    embedding: Any, weights: Any, biases: Any, biased: Any, attention_norms: Any, mlp_norms: Any, last_norm: Any,
    q_norms: Any, k_norms: Any, turns: Any, keys: Any, values: Any,
    x: Any, delta: Any, normed: Any, qkv: Any, attended: Any, gate_up: Any, opened: Any,
    heads: int, kv_heads: int, head_dim: int, block_tokens: int, columns: int, size: int, eps: float, scaling: float,
) -> None:  # fmt: skip
    """`normed` [tokens, hidden] = hidden states of the batch after the last norm; see `CpuBatch` and `CpuDecoder`.

    `weights` holds the strips of all products, layer after layer, in the order in which they are used, `biases`
    [layers, outputs of a layer] what is added where `biased` [4] says so. `size` is that of the opened gate.
    """
    tokens, hidden, inner = len(ids), len(last_norm), heads * head_dim
    embed(ids, embedding, hidden, x, delta, 0, tokens)
    at = 0
    for layer in range(len(attention_norms)):
        begin = 0
        # each kernel has one call here: compiling takes twice as long with all that are written out
        for step in range(4):
            if step == 0:
                norm, source, out, inputs, outputs = attention_norms[layer], normed, qkv, hidden, columns
            elif step == 1:
                norm, source, out, inputs, outputs = last_norm, attended, delta, inner, hidden
            elif step == 2:
                norm, source, out, inputs, outputs = mlp_norms[layer], normed, gate_up, hidden, 2 * size
            else:
                norm, source, out, inputs, outputs = last_norm, opened, delta, size, hidden
            if step % 2 == 0:
                add_norm(x, delta, norm, eps, normed, 0, tokens)
            end = at + inputs * outputs
            multiply(source, weights[at:end], out, tokens, inputs, outputs, 0, outputs // WIDTH)
            at = end
            if biased[step]:
                for row in range(tokens):
                    for index in range(outputs):
                        out[row * outputs + index] += biases[layer, begin + index]
            begin += outputs
            if step == 0:
                place(
                    qkv, columns, positions, slots, turns, q_norms[layer], k_norms[layer], eps, scaling,
                    keys[layer], values[layer], heads, kv_heads, head_dim, block_tokens, 0, tokens,
                )  # fmt: skip
                for part in range(2):
                    tiles, most = (few, together) if part == 0 else (others, 1)
                    attend(
                        qkv, columns, tiles, table, keys[layer], values[layer], attended, heads, kv_heads, head_dim,
                        block_tokens, most, 0, len(tiles) * kv_heads // most,
                    )  # fmt: skip
            elif step == 2:
                gate(gate_up, size, 2 * size, opened, 0, tokens)
    add_norm(x, delta, last_norm, eps, normed, 0, tokens)
