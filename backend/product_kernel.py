"""Products of a few or many rows with a model's weights, on a CPU, at the speed of its memory or of its arithmetic.

BLAS libraries are made for many rows: eight rows take them several times as long as reading the weights, and
products of bfloat16 are a hundred times slower still where the CPU has no instructions for them. Here weights
lie in strips of sixteen columns, [columns / 16, inputs, 16], which are read once, in order, for four rows at a
time; a panel of a strip stays in the nearest cache while all rows pass. Sums run over the inputs in their order,
so that a row's result is the same bits whatever other rows there are.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .lanes import WIDTH, add, compiled, div, exponential, fma, load, mul, prefetch, splat, spread, store, sub, total

_PANEL: Final = 256  # inputs of a strip that stay in the nearest cache: 16 KiB
_AHEAD: Final = 256  # numbers of a strip that one or two rows ask for in advance
_ROWS: Final = 1 << 16  # numbers of `x` that stay in the second: 256 KiB


@compiled
def multiply(x: Any, strips: Any, out: Any, rows: int, inputs: int, columns: int, start: int, end: int) -> None:
    """out[rows, columns] = x[rows, inputs] times weights, all flat, for the strips from `start` to `end`."""
    if 0 < rows <= 2:
        _multiply_few(x, strips, out, rows, inputs, columns, start, end)
        return
    height = max(4, _ROWS // inputs // 4 * 4)
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        # while one panel meets the rows, each four of them ask for their part of the next
        step = max(1, WIDTH // -(-(bottom - top) // 4))
        for strip in range(start, end):
            for low in range(0, inputs, _PANEL):
                high = min(low + _PANEL, inputs)
                at, ahead = (strip * inputs + low) * WIDTH, (strip * inputs + high) * WIDTH
                for row in range(top, bottom, 4):
                    # rows that are missing repeat the last: they are stored more than once
                    row_1, row_2, row_3 = min(row + 1, bottom - 1), min(row + 2, bottom - 1), min(row + 3, bottom - 1)
                    to_0, to_1 = row * columns + strip * WIDTH, row_1 * columns + strip * WIDTH
                    to_2, to_3 = row_2 * columns + strip * WIDTH, row_3 * columns + strip * WIDTH
                    if low == 0:
                        a = b = c = d = splat(np.float32(0))
                    else:
                        a, b, c, d = load(out, to_0), load(out, to_1), load(out, to_2), load(out, to_3)
                    x_0, x_1, x_2, x_3 = row * inputs, row_1 * inputs, row_2 * inputs, row_3 * inputs
                    for index in range(low, high):
                        prefetch(strips, ahead)
                        weight = load(strips, at + (index - low) * WIDTH)
                        ahead += step
                        a, b = fma(spread(x, x_0 + index), weight, a), fma(spread(x, x_1 + index), weight, b)
                        c, d = fma(spread(x, x_2 + index), weight, c), fma(spread(x, x_3 + index), weight, d)
                    store(out, to_0, a)
                    store(out, to_1, b)
                    store(out, to_2, c)
                    store(out, to_3, d)


@compiled
def _multiply_few(x: Any, strips: Any, out: Any, rows: int, inputs: int, columns: int, start: int, end: int) -> None:
    """The same for one or two rows, for which memory is too slow: two strips are read side by side."""
    from_1, to_1 = (rows - 1) * inputs, (rows - 1) * columns  # one row is computed and stored twice
    for strip in range(start, end, 2):
        other = min(strip + 1, end - 1)
        at, more = strip * inputs * WIDTH, other * inputs * WIDTH
        a = b = c = d = splat(np.float32(0))
        for index in range(inputs):
            prefetch(strips, at + _AHEAD)
            prefetch(strips, more + _AHEAD)
            weight, weight_more = load(strips, at), load(strips, more)
            one, two = spread(x, index), spread(x, from_1 + index)
            a, b = fma(one, weight, a), fma(two, weight, b)
            c, d = fma(one, weight_more, c), fma(two, weight_more, d)
            at += WIDTH
            more += WIDTH
        store(out, strip * WIDTH, a)
        store(out, to_1 + strip * WIDTH, b)
        store(out, other * WIDTH, c)
        store(out, to_1 + other * WIDTH, d)


@compiled
def add_norm(x: Any, delta: Any, weight: Any, eps: float, out: Any, first_row: int, last_row: int) -> None:
    """x += delta, and out = x over its root mean square times `weight`; all [rows, len(weight)] and flat."""
    size = len(weight)
    for row in range(first_row, last_row):
        squares = splat(np.float32(0))
        for at in range(row * size, (row + 1) * size, WIDTH):
            numbers = add(load(x, at), load(delta, at))
            store(x, at, numbers)
            squares = fma(numbers, numbers, squares)
        scale = np.float32(1) / np.sqrt(total(squares) / np.float32(size) + np.float32(eps))
        for index in range(0, size, WIDTH):
            at = row * size + index
            store(out, at, mul(mul(load(x, at), splat(scale)), load(weight, index)))


@compiled
def gate(gate_up: Any, size: int, columns: int, out: Any, first_row: int, last_row: int) -> None:
    """out[rows, size] = silu(gate) * up; rows of `gate_up` hold both, and are `columns` long."""
    one, nothing = splat(np.float32(1)), splat(np.float32(0))
    for row in range(first_row, last_row):
        for index in range(0, size, WIDTH):
            at = row * columns + index
            opened = load(gate_up, at)
            opened = div(opened, add(one, exponential(sub(nothing, opened))))
            store(out, row * size + index, mul(opened, load(gate_up, at + size)))
