"""Sixteen float32 numbers as one value in numba code: kernels that say themselves what is a vector.

numba leaves that to the compiler, which gives up where it cannot prove enough and reorders sums where it is
allowed to. `LANES` are vectors of LLVM's own, which it puts into as many registers as the CPU needs: two with
AVX2, one with AVX-512, four with NEON. Each operation works lane by lane and rounds once, so that the bits of a
result follow from the operations written and not from how they were compiled.

Memory is float32, or int16 that holds the upper halves of float32 numbers, which is bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import intrinsic, register_model

from slos_serve.scheduler.jit import compiler

WIDTH: Final = 16

_INT32 = ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTS = ir.VectorType(_INT32, WIDTH)
_HALVES = ir.VectorType(ir.IntType(16), WIDTH)


class _Lanes(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


LANES: Final = _Lanes()


# of a kernel: runs without the interpreter's lock
compiled = compiler([Path(__file__), *Path(__file__).parent.glob("*_kernel.py")], nogil=True)
# of a function of numba code whose LLVM code is written by what the function returns with its signature
_operation: Callable[[Callable[..., Any]], Any] = intrinsic


def _pointer(context: Any, builder: Any, kind: Any, element: tuple[Any, Any], target: Any) -> Any:
    array, at = element
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), target.as_pointer())


def _all(number: int) -> Any:
    return ir.Constant(_INTS, [number] * WIDTH)


def _spread(builder: Any, number: Any, kind: Any) -> Any:
    """A vector of `kind` that has `number` in every lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, number, _INT32(0)), nothing, _all(0))


@_operation
def load(typing: Any, array: Any, at: Any) -> Any:
    """array[at : at + 16] of a flat array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        if kind.dtype == types.float32:
            return builder.load(_pointer(context, builder, kind, args, _FLOATS), align=4)
        halves = builder.load(_pointer(context, builder, kind, args, _HALVES), align=2)
        return builder.bitcast(builder.shl(builder.zext(halves, _INTS), _all(16)), _FLOATS)

    return LANES(array, types.intp), generate


@_operation
def store(typing: Any, array: Any, at: Any, lanes: Any) -> Any:
    """array[at : at + 16] = lanes; rounded to even where the array holds halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (kind, *_), (array, at, lanes) = signature.args, args
        if kind.dtype == types.float32:
            builder.store(lanes, _pointer(context, builder, kind, (array, at), _FLOATS), align=4)
        else:
            bits = builder.bitcast(lanes, _INTS)
            odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
            bits = builder.lshr(builder.add(bits, builder.add(odd, _all(0x7FFF))), _all(16))
            halves = builder.trunc(bits, _HALVES)
            builder.store(halves, _pointer(context, builder, kind, (array, at), _HALVES), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, LANES), generate


@_operation
def prefetch(typing: Any, array: Any, at: Any) -> Any:
    """Ask for the line of memory around array[at], which may lie beyond the end."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        pointer = _pointer(context, builder, signature.args[0], args, byte)
        builder.call(function, [pointer, _INT32(0), _INT32(3), _INT32(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_operation
def splat(typing: Any, number: Any) -> Any:
    """The number in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0], _FLOATS)

    return LANES(types.float32), generate


@_operation
def spread(typing: Any, array: Any, at: Any) -> Any:
    """array[at] of a flat float32 array in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = builder.load(_pointer(context, builder, signature.args[0], args, ir.FloatType()), align=4)
        return _spread(builder, number, _FLOATS)

    return LANES(array, types.intp), generate


@_operation
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{WIDTH}f32"), args)

    return LANES(LANES, LANES, LANES), generate


def _of_two(build: Callable[[Any, Any, Any], Any]) -> Any:
    """An operation of two vectors."""

    def typed(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return build(builder, *args)

        return LANES(LANES, LANES), generate

    return _operation(typed)


add = _of_two(lambda builder, a, b: builder.fadd(a, b))
sub = _of_two(lambda builder, a, b: builder.fsub(a, b))
mul = _of_two(lambda builder, a, b: builder.fmul(a, b))
div = _of_two(lambda builder, a, b: builder.fdiv(a, b))
# of a pair with a NaN both give `a`
larger = _of_two(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))
smaller = _of_two(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), b, a))


@_operation
def first(typing: Any, count: Any, a: Any, b: Any) -> Any:
    """The first `count` lanes of `a`, the rest of `b`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count, a, b = args
        counts = _spread(builder, builder.trunc(count, _INT32), _INTS)
        return builder.select(builder.icmp_signed("<", ir.Constant(_INTS, list(range(WIDTH))), counts), a, b)

    return LANES(types.intp, LANES, LANES), generate


@_operation
def _power_of_two(typing: Any, a: Any) -> Any:
    """2 ** n of lanes that are 1.5 * 2 ** 23 + n."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        exponent = builder.add(builder.bitcast(args[0], _INTS), _all(127))
        return builder.bitcast(builder.shl(exponent, _all(23)), _FLOATS)

    return LANES(LANES), generate


def _folded(step: Callable[[Any, Any, Any], Any]) -> Any:
    """An operation that joins the lanes to one number, the upper half with the lower half until one is left."""

    def typed(typing: Any, a: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            (lanes,), half = args, WIDTH // 2
            while half:
                turned = ir.Constant(_INTS, [(lane + half) % WIDTH for lane in range(WIDTH)])
                lanes = step(builder, lanes, builder.shuffle_vector(lanes, lanes, turned))
                half //= 2
            return builder.extract_element(lanes, _INT32(0))

        return types.float32(LANES), generate

    return _operation(typed)


total = _folded(lambda builder, a, b: builder.fadd(a, b))
largest = _folded(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))

_ROUNDER = np.float32(1.5 * 2**23)  # a number added to it loses its fraction
_MOST = np.float32(80)  # e to the power of it, and one over that, are ordinary numbers
_LOG2_E = np.float32(1.44269504)
_LN_2 = (np.float32(-0.693359375), np.float32(2.12194440e-4))  # minus its logarithm in two parts, the first exact
_TAYLOR = tuple(np.float32(1 / factorial) for factorial in (5040, 720, 120, 24, 6, 2))


@compiled
def exponential(x: Any) -> Any:
    """e ** x of each lane within 2 units in the last place; of -80 and less that of -80, likewise above."""
    x = larger(smaller(x, splat(_MOST)), splat(-_MOST))
    shifted = fma(x, splat(_LOG2_E), splat(_ROUNDER))
    power = sub(shifted, splat(_ROUNDER))
    x = fma(power, splat(_LN_2[1]), fma(power, splat(_LN_2[0]), x))
    out = splat(_TAYLOR[0])
    out = fma(out, x, splat(_TAYLOR[1]))
    out = fma(out, x, splat(_TAYLOR[2]))
    out = fma(out, x, splat(_TAYLOR[3]))
    out = fma(out, x, splat(_TAYLOR[4]))
    out = fma(out, x, splat(_TAYLOR[5]))
    one = splat(np.float32(1))
    return mul(fma(out, mul(x, x), add(x, one)), _power_of_two(shifted))
