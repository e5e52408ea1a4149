"""The few vector operations that every CPU kernel is loops around, emitted as LLVM vectors.

numba turns loops into machine code but leaves register tiles to chance. These intrinsics state them: a product of small
tiles whose accumulators stay in registers, and the running maximum, exponential and sums of a softmax that lies in
columns. Arrays are one-dimensional and of 32-bit words; every offset and stride counts words and is an int64. A word is
a float32 or, where the processor multiplies bfloat16 in pairs (`PAIRS`), an int32 that holds two of them: then the two are
neighbours along the sum of a product, of which each word does two terms, added up in float32. Nothing is checked here:
the kernels that call them own their bounds.

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

VERSION = 3


def _lanes() -> int:
    """Floats in a vector register of this processor; numba's cache is keyed by the processor as well."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


class _Bfloat(ir.Type):
    """LLVM's bfloat16, which llvmlite cannot name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


VL = _lanes()
PAIRS = VL == 16 and bool(llvm.get_host_cpu_features().get("avx512bf16"))
FLOAT, INT, WORD, HALF = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16)
VECTOR, WORDS, PAIRED = ir.VectorType(FLOAT, VL), ir.VectorType(WORD, VL), ir.VectorType(_Bfloat(), 2 * VL)
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
        found = self.b.load(self._place(data, offset, ir.VectorType(data.type.pointee, VL)))
        found.align = 4
        return found

    def store(self, value: Any, data: Any, offset: Any) -> None:
        self.b.store(value, self._place(data, offset, value.type)).align = 4

    def _place(self, data: Any, offset: Any, kind: Any) -> Any:
        return self.b.bitcast(self.b.gep(data, [offset]), kind.as_pointer())

    def splat(self, data: Any, offset: Any) -> Any:
        """The word at `offset` in every lane."""
        return self.spread(self.b.load(self.b.gep(data, [offset])))

    def spread(self, value: Any) -> Any:
        """A word in every lane."""
        nothing = ir.Constant(ir.VectorType(value.type, VL), ir.Undefined)
        one = self.b.insert_element(nothing, value, WORD(0))
        return self.b.shuffle_vector(one, nothing, ir.Constant(WORDS, [0] * VL))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self._call("llvm.fma", x, y, z)

    def add_product(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z, floats in z; where x and y are pairs of bfloat16, the sum of both products of a lane."""
        if x.type == VECTOR:
            return self.fma(x, y, z)
        kind = ir.FunctionType(VECTOR, [VECTOR, PAIRED, PAIRED])
        product = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return self.b.call(product, [z, self.b.bitcast(x, PAIRED), self.b.bitcast(y, PAIRED)])

    def round(self, x: Any, y: Any) -> Any:
        """Two vectors of floats as bfloat16, x first and y after it: neighbours of x become the pairs of a word."""
        kind = ir.FunctionType(PAIRED, [VECTOR, VECTOR])
        rounded = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
        return self.b.bitcast(self.b.call(rounded, [y, x]), WORDS)

    def pair(self, x: Any, y: Any) -> Any:
        """Two vectors of floats as bfloat16, lane by lane the pairs of a word."""
        halves = ir.VectorType(HALF, 2 * VL)
        turned = ir.Constant(
            ir.VectorType(WORD, 2 * VL), [lane // 2 + VL * (lane % 2) for lane in range(2 * VL)]
        )
        both = self.b.bitcast(self.round(x, y), halves)
        return self.b.bitcast(self.b.shuffle_vector(both, ir.Constant(halves, ir.Undefined), turned), WORDS)

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
        power = self.b.shl(self.b.bitcast(shifted, WORDS), ir.Constant(WORDS, [WORD(23)] * VL))
        value = self.b.bitcast(self.b.add(self.b.bitcast(value, WORDS), power), VECTOR)
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
    """An intrinsic `gemm(a, ao, ars, acs, b, bo, brs, c, co, crs, depth, factor)`:

    c[co + i crs + j] (+)= factor sum over k < depth of a[ao + i ars + k acs] b[bo + k brs + j], i < rows, j < vectors VL.
    `a` is read as single words at any strides, so a matrix and its transpose cost the same. `accumulate` adds to c and
    takes no factor. Words of a and b may be pairs of bfloat16; c is float32.
    """

    def write(e: Any, a: Any, ao: Any, ars: Any, acs: Any, b: Any, bo: Any, brs: Any, c: Any, co: Any, crs: Any,
              depth: Any, factor: Any = None) -> None:  # fmt: skip
        places = [[e.b.add(e.at(co, i, crs), INT(j * VL)) for j in range(vectors)] for i in range(rows)]
        sums = [
            [e.variable(e.load(c, place) if accumulate else e.constant(0.0)) for place in row]
            for row in places
        ]
        starts = [e.at(ao, i, ars) for i in range(rows)]
        with e.loop(depth) as loop:
            along_a, from_b = e.b.mul(loop.index, acs), e.b.add(bo, e.b.mul(loop.index, brs))
            right = [e.load(b, e.b.add(from_b, INT(j * VL))) for j in range(vectors)]
            for i in range(rows):
                left = e.splat(a, e.b.add(starts[i], along_a))
                for j in range(vectors):
                    e.b.store(e.add_product(left, right[j], e.b.load(sums[i][j])), sums[i][j])
        scale = None if accumulate else e.spread(factor)
        for row, places_of_row in zip(sums, places, strict=True):
            for total, place in zip(row, places_of_row, strict=True):
                value = e.b.load(total)
                e.store(value if accumulate else e.b.fmul(value, scale), c, place)

    n = types.int64
    if accumulate:

        @_intrinsic
        def gemm(typing: Any, a: Any, ao: Any, ars: Any, acs: Any, b: Any, bo: Any, brs: Any, c: Any, co: Any, crs: Any,
                 depth: Any) -> Any:  # fmt: skip
            return types.void(a, n, n, n, b, n, n, c, n, n, n), _emitted(write)
    else:

        @_intrinsic
        def gemm(typing: Any, a: Any, ao: Any, ars: Any, acs: Any, b: Any, bo: Any, brs: Any, c: Any, co: Any, crs: Any,
                 depth: Any, factor: Any) -> Any:  # fmt: skip
            return types.void(a, n, n, n, b, n, n, c, n, n, n, types.float32), _emitted(write)

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
def strip_exp(typing: Any, s: Any, so: Any, stride: Any, rows: Any, m: Any, mo: Any, total: Any, to: Any,
              p: Any) -> Any:  # fmt: skip
    """p[so + k stride + j] = exp(s[..] - m[mo + j]), whose sum over k < rows is added to total[to + j], j < COLUMNS.

    Where p holds pairs, row k of it are the rows 2 k and 2 k + 1, of which there is an even number. p may be the memory
    of s.
    """

    def write(e: _Emitter, s: Any, so: Any, stride: Any, rows: Any, m: Any, mo: Any, total: Any, to: Any,
              p: Any) -> None:  # fmt: skip
        step = 1 if p.type.pointee == FLOAT else 2
        base = [e.load(m, place) for place in _strip(e, mo)]
        sums = [e.variable(e.load(total, place)) for place in _strip(e, to)]
        with e.loop(e.b.sdiv(rows, INT(step))) as loop:
            into = _strip(e, e.b.add(so, e.b.mul(loop.index, stride)))
            first = e.b.add(so, e.b.mul(loop.index, e.b.mul(stride, INT(step))))
            values = []
            for down in range(step):
                places = _strip(e, e.at(first, down, stride))
                values.append(
                    [e.exp(e.b.fsub(e.load(s, place), low)) for low, place in zip(base, places, strict=True)]
                )
            for j, place in enumerate(into):
                e.store(values[0][j] if step == 1 else e.pair(values[0][j], values[1][j]), p, place)
                for row in values:
                    e.b.store(e.b.fadd(e.b.load(sums[j]), row[j]), sums[j])
        for sum_, place in zip(sums, _strip(e, to), strict=True):
            e.store(e.b.load(sum_), total, place)

    n = types.int64
    return types.void(s, n, n, n, m, n, total, n, p), _emitted(write)


@_intrinsic
def strip_gradient(typing: Any, s: Any, dp: Any, so: Any, stride: Any, rows: Any, lse: Any, delta: Any, lo: Any,
                   factor: Any, p: Any, ds: Any, down: Any) -> Any:  # fmt: skip
    """p = exp(s - lse[lo + j]) and ds = factor p (dp - delta[lo + j]), at [so + k stride + j], k < rows, j < COLUMNS.

    `down` gets ds once more, with the pairs along k: see `strip_exp`. In p and ds they lie along j, so that a strip is
    COLUMNS / 2 words wide; these may be the memory of s and dp. Of floats all three forms are one: then down is ds.
    """

    def write(e: _Emitter, s: Any, dp: Any, so: Any, stride: Any, rows: Any, lse: Any, delta: Any, lo: Any,
              factor: Any, p: Any, ds: Any, down: Any) -> None:  # fmt: skip
        step = 1 if p.type.pointee == FLOAT else 2
        base = [e.load(lse, place) for place in _strip(e, lo)]
        mean = [e.load(delta, place) for place in _strip(e, lo)]
        scale = e.spread(factor)
        with e.loop(e.b.sdiv(rows, INT(step))) as loop:
            first = e.b.mul(loop.index, e.b.mul(stride, INT(step)))
            gradients = []
            for k in range(step):
                row = e.at(first, k, stride)
                places = _strip(e, e.b.add(so, row))
                weights = [e.exp(e.b.fsub(e.load(s, place), base[j])) for j, place in enumerate(places)]
                inner = [e.b.fsub(e.load(dp, place), mean[j]) for j, place in enumerate(places)]
                gradients.append(
                    [e.b.fmul(e.b.fmul(scale, x), weight) for x, weight in zip(inner, weights, strict=True)]
                )
                for values, array in ((weights, p), (gradients[k], ds)):
                    if step == 2:
                        e.store(e.round(*values), array, e.b.add(row, e.b.sdiv(so, INT(2))))
                    else:
                        for value, place in zip(values, places, strict=True):
                            e.store(value, array, place)
            if step == 2:
                for j, place in enumerate(_strip(e, e.b.add(so, e.b.mul(loop.index, stride)))):
                    e.store(e.pair(gradients[0][j], gradients[1][j]), down, place)

    n, f = types.int64, types.float32
    return types.void(s, dp, n, n, n, lse, delta, n, f, p, ds, down), _emitted(write)


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
        kind = ir.FunctionType(ir.VoidType(), [place.type, *[WORD] * 3])
        asked = cgutils.get_or_insert_function(e.b.module, kind, "llvm.prefetch.p0i8")
        e.b.call(asked, [place, WORD(0), WORD(3), WORD(1)])  # read, keep, data

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
