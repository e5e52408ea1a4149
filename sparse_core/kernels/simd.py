"""The few vector operations that every CPU kernel is loops around, emitted as LLVM vectors.

numba turns loops into machine code but leaves register tiles to chance. These intrinsics state them: a product of small
tiles whose accumulators stay in registers, and the running maximum, exponential and sums of a softmax that lies in
columns. Arrays are one-dimensional float32; every offset and stride counts elements and is an int64. Nothing is checked
here: the kernels that call them own their bounds.

Kernels are compiled with `cache=True`, and numba does not see changes in this file: raise `VERSION`, which they import,
with every change.
"""

from __future__ import annotations

import math
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VERSION = 2


def _lanes() -> int:
    """Floats in a vector register of this processor; numba's cache is keyed by the processor as well."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


VL = _lanes()
FLOAT, INT = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, VL)
LOG2E, LN2_HIGH, LN2_LOW = math.log2(math.e), 0.693359375, -2.12194440e-4
MAGIC = (
    12582912.0  # 1.5 * 2**23: adding it rounds a float to a whole number, whose bits are then the low ones
)
# Taylor-like polynomial of exp on [-ln 2 / 2, ln 2 / 2], largest relative error 2e-7 (Cephes' coefficients).
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


class _Emitter:
    """Writes vector code into a function: `b` is LLVM's builder."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any):
        self.b = builder
        self.values = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]

    def constant(self, value: float) -> Any:
        return ir.Constant(VECTOR, [ir.Constant(FLOAT, value)] * VL)

    def load(self, data: Any, offset: Any) -> Any:
        found = self.b.load(self._place(data, offset, VECTOR))
        found.align = 4
        return found

    def store(self, value: Any, data: Any, offset: Any) -> None:
        self.b.store(value, self._place(data, offset, VECTOR)).align = 4

    def _place(self, data: Any, offset: Any, kind: Any) -> Any:
        return self.b.bitcast(self.b.gep(data, [offset]), kind.as_pointer())

    def splat(self, data: Any, offset: Any) -> Any:
        """The float at `offset` in every lane."""
        value = self.b.load(self.b.gep(data, [offset]))
        one = self.b.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.IntType(32)(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), VL), [0] * VL)
        return self.b.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), lanes)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self._call("llvm.fma", x, y, z)

    def maximum(self, x: Any, y: Any) -> Any:
        """The larger one; NaN where one is NaN, which `maxnum` would hide."""
        return self._call("llvm.maximum", x, y)

    def _call(self, name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(VECTOR, [VECTOR] * len(arguments))
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"{name}.v{VL}f32"), arguments)

    def exp(self, x: Any) -> Any:
        """exp of a vector of numbers up to 0; below -87, where it would not be a normal number, exactly 0."""
        tiny = self.b.fcmp_ordered("<", x, self.constant(-87.0))
        x = self.maximum(x, self.constant(-87.0))
        shifted = self.fma(x, self.constant(LOG2E), self.constant(MAGIC))
        whole = self.b.fsub(shifted, self.constant(MAGIC))
        rest = self.fma(whole, self.constant(-LN2_HIGH), x)
        rest = self.fma(whole, self.constant(-LN2_LOW), rest)
        value = self.constant(EXP[0])
        for factor in EXP[1:]:
            value = self.fma(value, rest, self.constant(factor))
        value = self.fma(self.b.fmul(value, rest), rest, self.b.fadd(rest, self.constant(1.0)))
        ints = ir.VectorType(ir.IntType(32), VL)
        power = self.b.shl(self.b.bitcast(shifted, ints), ir.Constant(ints, [ir.IntType(32)(23)] * VL))
        value = self.b.bitcast(self.b.add(self.b.bitcast(value, ints), power), VECTOR)
        return self.b.select(tiny, self.constant(0.0), value)

    def loop(self, count: Any) -> Any:
        return cgutils.for_range(self.b, count, intp=INT)

    def variable(self, value: Any) -> Any:
        """A vector in a register that a loop may change."""
        return cgutils.alloca_once_value(self.b, value)

    def at(self, base: Any, index: int, stride: Any) -> Any:
        return self.b.add(base, self.b.mul(stride, INT(index)))


def _intrinsic(function: Any) -> Any:
    """numba's `intrinsic`, which takes the first argument for itself; a type checker cannot know that."""
    return intrinsic(function)


def _emitted(write: Any) -> Any:
    """The codegen function of an intrinsic whose body `write(emitter, *values)` emits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emitter = _Emitter(context, builder, signature, arguments)
        write(emitter, *emitter.values)
        return context.get_dummy_value()  # numba's word for what a function without a result returns

    return codegen


def make_gemm(rows: int, vectors: int, *, accumulate: bool) -> Any:
    """An intrinsic `gemm(a, ao, ars, acs, b, bo, brs, c, co, crs, depth)`:

    c[co + i crs + j] (+)= sum over k < depth of a[ao + i ars + k acs] b[bo + k brs + j] for i < rows, j < vectors VL.
    `a` is read as single floats at any strides, so a matrix and its transpose cost the same.
    """

    def write(e: Any, a: Any, ao: Any, ars: Any, acs: Any, b: Any, bo: Any, brs: Any, c: Any, co: Any, crs: Any,
              depth: Any) -> None:  # fmt: skip
        places = [[e.b.add(e.at(co, i, crs), INT(j * VL)) for j in range(vectors)] for i in range(rows)]
        sums = [
            [e.variable(e.load(c, place) if accumulate else e.constant(0.0)) for place in row]
            for row in places
        ]
        with e.loop(depth) as loop:
            from_a, from_b = e.b.add(ao, e.b.mul(loop.index, acs)), e.b.add(bo, e.b.mul(loop.index, brs))
            right = [e.load(b, e.b.add(from_b, INT(j * VL))) for j in range(vectors)]
            for i in range(rows):
                left = e.splat(a, e.at(from_a, i, ars))
                for j in range(vectors):
                    e.b.store(e.fma(left, right[j], e.b.load(sums[i][j])), sums[i][j])
        for row, places_of_row in zip(sums, places, strict=True):
            for total, place in zip(row, places_of_row, strict=True):
                e.store(e.b.load(total), c, place)

    @_intrinsic
    def gemm(typing: Any, a: Any, ao: Any, ars: Any, acs: Any, b: Any, bo: Any, brs: Any, c: Any, co: Any, crs: Any,
             depth: Any) -> Any:  # fmt: skip
        n = types.int64
        return types.void(a, n, n, n, b, n, n, c, n, n, n), _emitted(write)

    return gemm


ROWS, COLUMNS = (
    (8 if VL == 16 else 4),
    2 * VL,
)  # of a register tile: its accumulators and operands fit the registers
gemm_set = make_gemm(ROWS, 2, accumulate=False)
gemm_add = make_gemm(ROWS, 2, accumulate=True)


def _strip(e: _Emitter, offset: Any) -> list[Any]:
    """The offsets of the two vectors of a strip of `COLUMNS` floats."""
    return [offset, e.b.add(offset, INT(VL))]


@_intrinsic
def strip_max(typing: Any, s: Any, so: Any, stride: Any, rows: Any, m: Any, mo: Any) -> Any:
    """m[mo + j] = max(m[mo + j], s[so + k stride + j] over k < rows) for j < COLUMNS."""

    def write(e: _Emitter, s: Any, so: Any, stride: Any, rows: Any, m: Any, mo: Any) -> None:
        largest = [e.variable(e.load(m, place)) for place in _strip(e, mo)]
        with e.loop(rows) as loop:
            for best, place in zip(largest, _strip(e, e.b.add(so, e.b.mul(loop.index, stride))), strict=True):
                e.b.store(e.maximum(e.b.load(best), e.load(s, place)), best)
        for best, place in zip(largest, _strip(e, mo), strict=True):
            e.store(e.b.load(best), m, place)

    n = types.int64
    return types.void(s, n, n, n, m, n), _emitted(write)


@_intrinsic
def strip_exp(
    typing: Any, s: Any, so: Any, stride: Any, rows: Any, m: Any, mo: Any, total: Any, to: Any
) -> Any:
    """s[so + k stride + j] = exp(s[..] - m[mo + j]), whose sum over k < rows is added to total[to + j], j < COLUMNS."""

    def write(
        e: _Emitter, s: Any, so: Any, stride: Any, rows: Any, m: Any, mo: Any, total: Any, to: Any
    ) -> None:
        base = [e.load(m, place) for place in _strip(e, mo)]
        sums = [e.variable(e.load(total, place)) for place in _strip(e, to)]
        with e.loop(rows) as loop:
            places = _strip(e, e.b.add(so, e.b.mul(loop.index, stride)))
            for low, sum_, place in zip(base, sums, places, strict=True):
                value = e.exp(e.b.fsub(e.load(s, place), low))
                e.store(value, s, place)
                e.b.store(e.b.fadd(e.b.load(sum_), value), sum_)
        for sum_, place in zip(sums, _strip(e, to), strict=True):
            e.store(e.b.load(sum_), total, place)

    n = types.int64
    return types.void(s, n, n, n, m, n, total, n), _emitted(write)


@_intrinsic
def strip_gradient(typing: Any, s: Any, so: Any, dp: Any, do: Any, stride: Any, rows: Any, lse: Any, lo: Any,
                   delta: Any, eo: Any) -> Any:  # fmt: skip
    """s = p = exp(s - lse[lo + j]) and dp = p (dp - delta[eo + j]), both at [.. + k stride + j], k < rows, j < COLUMNS."""

    def write(e: _Emitter, s: Any, so: Any, dp: Any, do: Any, stride: Any, rows: Any, lse: Any, lo: Any, delta: Any,
              eo: Any) -> None:  # fmt: skip
        base = [e.load(lse, place) for place in _strip(e, lo)]
        mean = [e.load(delta, place) for place in _strip(e, eo)]
        with e.loop(rows) as loop:
            down = e.b.mul(loop.index, stride)
            ours, theirs = _strip(e, e.b.add(so, down)), _strip(e, e.b.add(do, down))
            for j in range(2):
                p = e.exp(e.b.fsub(e.load(s, ours[j]), base[j]))
                e.store(p, s, ours[j])
                e.store(e.b.fmul(p, e.b.fsub(e.load(dp, theirs[j]), mean[j])), dp, theirs[j])

    n = types.int64
    return types.void(s, n, dp, n, n, n, lse, n, delta, n), _emitted(write)


@_intrinsic
def exp_difference(typing: Any, x: Any, xo: Any, y: Any, yo: Any, out: Any, oo: Any) -> Any:
    """out[oo + j] = exp(x[xo + j] - y[yo + j]) for j < COLUMNS."""

    def write(e: _Emitter, x: Any, xo: Any, y: Any, yo: Any, out: Any, oo: Any) -> None:
        for first, second, place in zip(_strip(e, xo), _strip(e, yo), _strip(e, oo), strict=True):
            e.store(e.exp(e.b.fsub(e.load(x, first), e.load(y, second))), out, place)

    n = types.int64
    return types.void(x, n, y, n, out, n), _emitted(write)


@_intrinsic
def prefetch(typing: Any, x: Any, offset: Any) -> Any:
    """Ask for the cache line that holds x[offset]: memory is then ready when a later gather needs it."""

    def write(e: _Emitter, x: Any, offset: Any) -> None:
        place = e.b.bitcast(e.b.gep(x, [offset]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, *[ir.IntType(32)] * 3])
        asked = cgutils.get_or_insert_function(e.b.module, kind, "llvm.prefetch.p0i8")
        e.b.call(asked, [place, ir.IntType(32)(0), ir.IntType(32)(3), ir.IntType(32)(1)])  # read, keep, data

    return types.void(x, types.int64), _emitted(write)


@_intrinsic
def dot(typing: Any, a: Any, ao: Any, b: Any, bo: Any, count: Any) -> Any:
    """Sum of a[ao + i] b[bo + i] over i < count, a multiple of VL."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        e = _Emitter(context, builder, signature, arguments)
        a, ao, b, bo, count = e.values
        total = e.variable(e.constant(0.0))
        with e.loop(builder.sdiv(count, INT(VL))) as loop:
            step = builder.mul(loop.index, INT(VL))
            product = e.fma(
                e.load(a, builder.add(ao, step)), e.load(b, builder.add(bo, step)), builder.load(total)
            )
            builder.store(product, total)
        kind = ir.FunctionType(FLOAT, [FLOAT, VECTOR])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{VL}f32")
        return builder.call(reduce, [FLOAT(0.0), builder.load(total)], fastmath=("reassoc",))

    n = types.int64
    return types.float32(a, n, b, n, n), codegen


@_intrinsic
def add_rows(typing: Any, weights: Any, wo: Any, x: Any, first: Any, second: Any, third: Any, fourth: Any, out: Any,
             oo: Any, count: Any) -> Any:  # fmt: skip
    """out[oo + i] += sum of weights[wo + r] x[row r + i] for the four rows that begin at first .. fourth, i < count, a
    multiple of VL: one pass over `out` for four rows."""

    def write(e: _Emitter, weights: Any, wo: Any, x: Any, first: Any, second: Any, third: Any, fourth: Any, out: Any,
              oo: Any, count: Any) -> None:  # fmt: skip
        factors = [e.splat(weights, e.b.add(wo, INT(r))) for r in range(4)]
        with e.loop(e.b.sdiv(count, INT(VL))) as loop:
            step = e.b.mul(loop.index, INT(VL))
            total = e.load(out, e.b.add(oo, step))
            for factor, row in zip(factors, (first, second, third, fourth), strict=True):
                total = e.fma(factor, e.load(x, e.b.add(row, step)), total)
            e.store(total, out, e.b.add(oo, step))

    n = types.int64
    return types.void(weights, n, x, n, n, n, n, out, n, n), _emitted(write)
