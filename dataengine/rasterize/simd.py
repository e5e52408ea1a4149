"""Compositing on a CPU, forward and backward, 16 pixels of a row at a time.

An image is cut into tiles of 16 x 16 pixels. Each has the list of the Gaussians whose pixels it holds, nearest first.
The state of a tile lies in one flat scratch of planes of 256 numbers: where its pixels are, the light that is left, the
colours. A Gaussian walks over the rows that it covers, whole rows at a time, as LLVM vectors; `blend` is that walk
forward and `trace` the walk backward. A pixel that has ended keeps its light with a minus sign, so no mask is stored.

Backward, every pair of Gaussian and tile has a slot of its own for its sums, and the slots of a Gaussian are added up one
after the other: no two threads write to one place, and the result does not depend on how many there are.

float32 and float64 are the same code; numba compiles each when it first comes. numba's cache looks at this file alone: it
also holds for a version of `sparse_core.kernels.simd` (`SIMD`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from sparse_core.kernels.compiled import cached
from sparse_core.kernels.simd import EXP, LN2_HIGH, LN2_LOW, LOG2E, MAGIC, VL

SIMD = 3  # `sparse_core.kernels.simd.VERSION` that this file was written against
TILE = 16
PIXELS = TILE * TILE
# Planes of the scratch of a tile.
X, Y, LEFT, LAST, WEIGHT, COVER, BEHIND, DOT, CHANNELS = (PIXELS * plane for plane in range(9))
# Numbers of a Gaussian: centre, conic, opacity, two spare ones, then the colour, padded to a multiple of 4.
CENTRE, CONIC, OPACITY, COLOR = 0, 2, 5, 8
# Sums of a slot: v sigma times 1, p, q, dx dx, dx dy, dy dy, then |..| of the second and third, then the colour.
SUMS, ABSOLUTE, COLOR_SUMS = 6, 6, 8
GROUP = 4  # channels that are handled together
THRESHOLD, MOST, STOP = 1 / 255, 0.999, 1e-4

INT, WORD = ir.IntType(64), ir.IntType(32)

kernel = cached(nogil=True, no_cfunc_wrapper=True)
# A function that only kernels call: it needs no way in from Python, and lies in their cache.
part = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]


class _Lanes:
    """Writes vector code for the pixels of a scratch: `b` is LLVM's builder, `s` the scratch."""

    def __init__(self, builder: Any, scratch: Any):
        self.b, self.s = builder, scratch
        self.number = scratch.type.pointee
        double = self.number == ir.DoubleType()
        self.count, self.bytes = (VL // 2, 8) if double else (VL, 4)
        self.vector = ir.VectorType(self.number, self.count)
        self.words = ir.VectorType(INT if double else WORD, self.count)
        self.suffix = f"v{self.count}f{64 if double else 32}"

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [ir.Constant(self.number, value)] * self.count)

    def spread(self, value: Any) -> Any:
        nothing = ir.Constant(self.vector, ir.Undefined)
        one = self.b.insert_element(nothing, value, WORD(0))
        zeros = ir.Constant(ir.VectorType(WORD, self.count), [0] * self.count)
        return self.b.shuffle_vector(one, nothing, zeros)

    def spread_at(self, data: Any, offset: Any, index: int) -> Any:
        return self.spread(self.b.load(self.b.gep(data, [self.b.add(offset, INT(index))])))

    def place(self, plane: int, pixel: Any) -> Any:
        found = self.b.gep(self.s, [self.b.add(pixel, INT(plane))])
        return self.b.bitcast(found, self.vector.as_pointer())

    def load(self, plane: int, pixel: Any) -> Any:
        found = self.b.load(self.place(plane, pixel))
        found.align = self.bytes
        return found

    def store(self, value: Any, plane: int, pixel: Any) -> None:
        self.b.store(value, self.place(plane, pixel)).align = self.bytes

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.call("llvm.fma", x, y, z)

    def call(self, name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(self.vector, [self.vector] * len(arguments))
        function = cgutils.get_or_insert_function(self.b.module, kind, f"{name}.{self.suffix}")
        return self.b.call(function, arguments)

    def less(self, x: Any, y: Any) -> Any:
        return self.b.fcmp_ordered("<", x, y)

    def both(self, x: Any, y: Any) -> Any:
        return self.b.and_(x, y)

    def exp(self, x: Any) -> Any:
        """exp of numbers up to 0; below -87 that of -87. Of float32 as in `sparse_core.kernels.simd`."""
        if self.suffix.endswith("64"):
            return self.call("llvm.exp", x)
        x = self.b.select(self.less(x, self.constant(-87.0)), self.constant(-87.0), x)
        shifted = self.fma(x, self.constant(LOG2E), self.constant(MAGIC))
        whole = self.b.fsub(shifted, self.constant(MAGIC))
        rest = self.fma(whole, self.constant(-LN2_HIGH), x)
        rest = self.fma(whole, self.constant(-LN2_LOW), rest)
        value = self.constant(EXP[0])
        for factor in EXP[1:]:
            value = self.fma(value, rest, self.constant(factor))
        value = self.fma(self.b.fmul(value, rest), rest, self.b.fadd(rest, self.constant(1.0)))
        power = self.b.shl(
            self.b.bitcast(shifted, self.words), ir.Constant(self.words, [WORD(23)] * self.count)
        )
        return self.b.bitcast(self.b.add(self.b.bitcast(value, self.words), power), self.vector)

    def pixels(self, low: Any, high: Any) -> Any:
        """The loop over the vectors of pixels low .. high."""
        step = INT(self.count)
        return cgutils.for_range(self.b, self.b.sdiv(self.b.sub(high, low), step), intp=INT)

    def pixel(self, low: Any, loop: Any) -> Any:
        return self.b.add(low, self.b.mul(loop.index, INT(self.count)))

    def variable(self, value: Any) -> Any:
        return cgutils.alloca_once_value(self.b, value)

    def increase(self, variable: Any, value: Any) -> None:
        self.b.store(self.b.fadd(self.b.load(variable), value), variable)

    def total(self, variable: Any) -> Any:
        kind = ir.FunctionType(self.number, [self.number, self.vector])
        name = f"llvm.vector.reduce.fadd.{self.suffix}"
        reduce = cgutils.get_or_insert_function(self.b.module, kind, name)
        return self.b.call(reduce, [self.number(0.0), self.b.load(variable)], fastmath=("reassoc",))

    def number_of(self, mask: Any) -> Any:
        """How many lanes of a mask are set."""
        kind = ir.IntType(self.count)
        name = f"llvm.ctpop.i{self.count}"
        count = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(kind, [kind]), name)
        return self.b.zext(self.b.call(count, [self.b.bitcast(mask, kind)]), INT)


def _intrinsic(function: Any) -> Any:
    """numba's `intrinsic`, which takes the first argument for itself; a type checker cannot know that."""
    return intrinsic(function)


def _emitted(write: Any) -> Any:
    """The codegen function of an intrinsic on a scratch, its first argument, whose body `write(lanes, *values)` emits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        found = write(_Lanes(builder, values[0]), *values[1:])
        return context.get_dummy_value() if found is None else found

    return codegen


class _Gaussian:
    """A Gaussian's numbers in every lane, and what it is at some pixels."""

    def __init__(self, e: _Lanes, data: Any, at: Any):
        self.e = e
        self.x, self.y, self.a, self.b, self.c, self.opacity = (e.spread_at(data, at, i) for i in range(6))
        self.color = [e.spread_at(data, at, COLOR + c) for c in range(GROUP)]

    def look(self, pixel: Any) -> None:
        """sigma = (dx p + dy q) / 2 with p = a dx + b dy, q = b dx + c dy; whether it counts there."""
        e = self.e
        self.dx, self.dy = e.b.fsub(self.x, e.load(X, pixel)), e.b.fsub(self.y, e.load(Y, pixel))
        self.p = e.fma(self.a, self.dx, e.b.fmul(self.b, self.dy))
        self.q = e.fma(self.b, self.dx, e.b.fmul(self.c, self.dy))
        twice = e.fma(self.dx, self.p, e.b.fmul(self.dy, self.q))
        self.raw = e.b.fmul(self.opacity, e.exp(e.b.fmul(twice, e.constant(-0.5))))
        self.whole = e.less(self.raw, e.constant(MOST))
        self.alpha = e.b.select(self.whole, self.raw, e.constant(MOST))
        counts = e.b.fcmp_ordered(">=", self.alpha, e.constant(THRESHOLD))
        self.counts = e.both(counts, e.b.fcmp_ordered(">=", twice, e.constant(0.0)))


@_intrinsic
def blend(typing: Any, s: Any, low: Any, high: Any, data: Any, at: Any, rank: Any) -> Any:
    """Lay the Gaussian whose numbers begin at data[at], the rank-th of the tile, over pixels low .. high.

    The first four channels; its weights are left in WEIGHT. Returns how many pixels have ended."""

    def write(e: _Lanes, low: Any, high: Any, data: Any, at: Any, rank: Any) -> Any:
        gaussian, number = _Gaussian(e, data, at), e.spread(rank)
        ended = e.variable(INT(0))
        with e.pixels(low, high) as loop:
            pixel = e.pixel(low, loop)
            gaussian.look(pixel)
            left = e.load(LEFT, pixel)
            rest = e.fma(left, e.b.fneg(gaussian.alpha), left)
            live = e.both(gaussian.counts, e.less(e.constant(0.0), left))
            on = e.both(live, e.less(e.constant(STOP), rest))
            off = e.b.xor(live, on)
            weight = e.b.select(on, e.b.fmul(gaussian.alpha, left), e.constant(0.0))
            e.store(e.b.select(on, rest, e.b.select(off, e.b.fneg(left), left)), LEFT, pixel)
            e.store(e.b.select(on, number, e.load(LAST, pixel)), LAST, pixel)
            e.store(weight, WEIGHT, pixel)
            e.store(e.b.fadd(e.load(COVER, pixel), weight), COVER, pixel)
            for c, color in enumerate(gaussian.color):
                plane = CHANNELS + PIXELS * c
                e.store(e.fma(weight, color, e.load(plane, pixel)), plane, pixel)
            e.b.store(e.b.add(e.b.load(ended), e.number_of(off)), ended)
        return e.b.load(ended)

    n = types.int64
    return types.int64(s, n, n, data, n, s.dtype), _emitted(write)


@_intrinsic
def blend_more(typing: Any, s: Any, low: Any, high: Any, data: Any, at: Any, plane: Any) -> Any:
    """Four more channels, whose numbers begin at data[at], into the planes that begin at s[plane]."""

    def write(e: _Lanes, low: Any, high: Any, data: Any, at: Any, plane: Any) -> None:
        colors = [e.spread_at(data, at, c) for c in range(GROUP)]
        with e.pixels(low, high) as loop:
            pixel = e.pixel(low, loop)
            weight, there = e.load(WEIGHT, pixel), e.b.add(pixel, plane)
            for c, color in enumerate(colors):
                e.store(e.fma(weight, color, e.load(PIXELS * c, there)), PIXELS * c, there)

    n = types.int64
    return types.void(s, n, n, data, n, n), _emitted(write)


@_intrinsic
def dot_more(typing: Any, s: Any, low: Any, high: Any, data: Any, at: Any, plane: Any) -> Any:
    """Add to DOT the product of four more channels with their gradients, the planes that begin at s[plane]."""

    def write(e: _Lanes, low: Any, high: Any, data: Any, at: Any, plane: Any) -> None:
        colors = [e.spread_at(data, at, c) for c in range(GROUP)]
        with e.pixels(low, high) as loop:
            pixel = e.pixel(low, loop)
            there, value = e.b.add(pixel, plane), e.load(DOT, pixel)
            for c, color in enumerate(colors):
                value = e.fma(color, e.load(PIXELS * c, there), value)
            e.store(value, DOT, pixel)

    n = types.int64
    return types.void(s, n, n, data, n, n), _emitted(write)


@_intrinsic
def sum_more(typing: Any, s: Any, low: Any, high: Any, plane: Any, slots: Any, to: Any) -> Any:
    """slots[to + c] = sum over pixels of WEIGHT times the gradient of four more channels."""

    def write(e: _Lanes, low: Any, high: Any, plane: Any, slots: Any, to: Any) -> None:
        sums = [e.variable(e.constant(0.0)) for _ in range(GROUP)]
        with e.pixels(low, high) as loop:
            pixel = e.pixel(low, loop)
            weight, there = e.load(WEIGHT, pixel), e.b.add(pixel, plane)
            for c, total in enumerate(sums):
                e.b.store(e.fma(weight, e.load(PIXELS * c, there), e.b.load(total)), total)
        for c, total in enumerate(sums):
            e.b.store(e.total(total), e.b.gep(slots, [e.b.add(to, INT(c))]))

    n = types.int64
    return types.void(s, n, n, n, slots, n), _emitted(write)


def _make_trace(absolute: bool, more: bool) -> Any:
    """An intrinsic `trace(s, low, high, data, at, rank, slots, to)` that takes a Gaussian off again, last one first, and
    writes its sums to slots[to ..]. `absolute`: those of |..| too; `more`: DOT holds the product of further channels,
    becomes 0, and WEIGHT gets the weights."""

    def write(e: _Lanes, low: Any, high: Any, data: Any, at: Any, rank: Any, slots: Any, to: Any) -> None:
        gaussian, number = _Gaussian(e, data, at), e.spread(rank)
        sums = [e.variable(e.constant(0.0)) for _ in range(COLOR_SUMS + GROUP)]
        with e.pixels(low, high) as loop:
            pixel = e.pixel(low, loop)
            gaussian.look(pixel)
            counts = e.both(gaussian.counts, e.b.fcmp_ordered("<=", number, e.load(LAST, pixel)))
            # what gets through, inverted: of pixels where it does not count that of nothing
            alpha = e.b.select(counts, gaussian.alpha, e.constant(0.0))
            inverse = e.b.fdiv(e.constant(1.0), e.b.fsub(e.constant(1.0), alpha))
            left = e.b.fmul(e.load(LEFT, pixel), inverse)
            weight = e.b.fmul(alpha, left)
            gradients = [e.load(CHANNELS + PIXELS * c, pixel) for c in range(GROUP)]
            dot = e.load(DOT, pixel) if more else e.constant(0.0)
            for color, gradient in zip(gaussian.color, gradients, strict=True):
                dot = e.fma(color, gradient, dot)
            behind = e.load(BEHIND, pixel)
            v_alpha = e.b.fsub(e.b.fmul(dot, left), e.b.fmul(behind, inverse))
            e.store(left, LEFT, pixel)
            e.store(e.fma(weight, dot, behind), BEHIND, pixel)
            if more:
                e.store(e.constant(0.0), DOT, pixel)
                e.store(weight, WEIGHT, pixel)
            v_sigma = e.b.fneg(e.b.fmul(gaussian.raw, v_alpha))
            v_sigma = e.b.select(e.both(counts, gaussian.whole), v_sigma, e.constant(0.0))
            vx, vy = e.b.fmul(v_sigma, gaussian.dx), e.b.fmul(v_sigma, gaussian.dy)
            vp, vq = e.b.fmul(v_sigma, gaussian.p), e.b.fmul(v_sigma, gaussian.q)
            for total, value in zip(sums, (v_sigma, vp, vq), strict=False):
                e.increase(total, value)
            for total, x, y in (
                (sums[3], vx, gaussian.dx),
                (sums[4], vx, gaussian.dy),
                (sums[5], vy, gaussian.dy),
            ):
                e.b.store(e.fma(x, y, e.b.load(total)), total)
            if absolute:
                e.increase(sums[ABSOLUTE], e.call("llvm.fabs", vp))
                e.increase(sums[ABSOLUTE + 1], e.call("llvm.fabs", vq))
            for total, gradient in zip(sums[COLOR_SUMS:], gradients, strict=True):
                e.b.store(e.fma(weight, gradient, e.b.load(total)), total)
        for index, total in enumerate(sums):
            if absolute or index not in (ABSOLUTE, ABSOLUTE + 1):
                e.b.store(e.total(total), e.b.gep(slots, [e.b.add(to, INT(index))]))

    @_intrinsic
    def trace(
        typing: Any, s: Any, low: Any, high: Any, data: Any, at: Any, rank: Any, slots: Any, to: Any
    ) -> Any:
        n = types.int64
        return types.void(s, n, n, data, n, s.dtype, slots, n), _emitted(write)

    return trace


trace, trace_absolute = _make_trace(False, False), _make_trace(True, False)
trace_more, trace_more_absolute = _make_trace(False, True), _make_trace(True, True)


@part
def _span(x, r, size):
    """First and last + 1 of the pixels 0 .. size whose centres lie within r of x."""
    low, high = math.ceil(max(x - r - 0.5, -1.0)), math.floor(min(x + r - 0.5, np.float64(size)))
    return max(np.int64(low), np.int64(0)), min(np.int64(high) + 1, np.int64(size))


@kernel
def bound(means2d, conics, opacities, radii, colors, boxes, counts, data, sizes, low, high):
    """Boxes of the blocks low .. high of splats, [M, 4]: columns x0 .. x1 of tiles and rows y0 .. y1 of pixels, tight
    around the pixels with alpha >= 1/255; counts [M]: how many tiles; data: see above. All flat.

    In float64, where the determinant of a long thin Gaussian is exact."""
    width, height, channels, stride, splats, block = sizes
    for j in range(low * block, min(high * block, splats)):
        counts[j] = 0
        a, b, c = np.float64(conics[3 * j]), np.float64(conics[3 * j + 1]), np.float64(conics[3 * j + 2])
        if radii[2 * j] <= 0 or radii[2 * j + 1] <= 0:
            continue
        opacity, det = np.float64(opacities[j]), a * c - b * b
        if opacity < THRESHOLD:
            continue
        rx, ry = np.float64(radii[2 * j]), np.float64(radii[2 * j + 1])
        if det > 0:
            room = 2.0 * math.log(opacity / THRESHOLD) / det
            rx, ry = math.sqrt(room * c), math.sqrt(room * a)
        x0, x1 = _span(np.float64(means2d[2 * j]), rx * 1.00001 + 1e-3, width)
        y0, y1 = _span(np.float64(means2d[2 * j + 1]), ry * 1.00001 + 1e-3, height)
        if x1 <= x0 or y1 <= y0:
            continue
        boxes[4 * j], boxes[4 * j + 1], boxes[4 * j + 2], boxes[4 * j + 3] = (
            x0 // TILE,
            (x1 - 1) // TILE + 1,
            y0,
            y1,
        )
        counts[j] = (boxes[4 * j + 1] - boxes[4 * j]) * ((y1 - 1) // TILE + 1 - y0 // TILE)
        at = j * stride
        data[at], data[at + 1] = means2d[2 * j], means2d[2 * j + 1]
        data[at + 2], data[at + 3], data[at + 4] = conics[3 * j], conics[3 * j + 1], conics[3 * j + 2]
        data[at + 5] = opacities[j]
        for k in range(channels):
            data[at + COLOR + k] = colors[j * channels + k]


@kernel
def sort(keys, counts, starts, boxes, order, found, filled, sizes, low, high):
    """Splats of the images low .. high that cover a pixel, by key, then index: order [M], of which an image holds found;
    filled [I, tiles]: how many of them each tile has.

    keys: the bits of positive floats, whose order is that of the floats; a radix sort, 11 bits a pass."""
    across, tiles, bits = sizes
    for image in range(low, high):
        start, number = starts[image], np.int64(0)
        first = np.empty(starts[image + 1] - start, np.int32)
        second = np.empty(starts[image + 1] - start, np.int32)
        for j in range(start, starts[image + 1]):
            if counts[j] > 0:
                first[number] = j
                number += 1
                for y in range(boxes[4 * j + 2] // TILE, (boxes[4 * j + 3] - 1) // TILE + 1):
                    for x in range(boxes[4 * j], boxes[4 * j + 1]):
                        filled[image * tiles + y * across + x] += 1
        places = np.empty(2048, np.int64)
        for shift in range(0, bits, 11):
            places[:] = 0
            for i in range(number):
                places[(keys[first[i]] >> shift) & 2047] += 1
            total = np.int64(0)
            for i in range(2048):
                count = places[i]
                places[i] = total
                total += count
            for i in range(number):
                digit = (keys[first[i]] >> shift) & 2047
                second[places[digit]] = first[i]
                places[digit] += 1
            first, second = second, first
        for i in range(number):
            order[start + i] = first[i]
        found[image] = number


@kernel
def fill(order, found, starts, boxes, slots, offsets, entries, across, low, high):
    """Lists of the tiles of the images low .. high, nearest first: entries [E, 2] of splat and slot, from offsets
    [I tiles] on, which move to the end of each; the slots of splat j begin at slots[j]."""
    tiles = len(offsets) // len(found)
    for image in range(low, high):
        for i in range(found[image]):
            j = order[starts[image] + i]
            slot = slots[j]
            for y in range(boxes[4 * j + 2] // TILE, (boxes[4 * j + 3] - 1) // TILE + 1):
                for x in range(boxes[4 * j], boxes[4 * j + 1]):
                    tile = image * tiles + y * across + x
                    place = offsets[tile]
                    offsets[tile] += 1
                    entries[2 * place], entries[2 * place + 1] = j, slot
                    slot += 1


@part
def _rows(boxes, j, top):
    """Pixels of a tile, whose first row is `top`, that splat j may cover."""
    return max(boxes[4 * j + 2] - top, 0) * TILE, min(boxes[4 * j + 3] - top, TILE) * TILE


@part
def _place_pixels(s, x0, y0):
    for i in range(PIXELS):
        s[X + i] = x0 + i % TILE + 0.5
        s[Y + i] = y0 + i // TILE + 0.5


@kernel
def forward(data, entries, offsets, boxes, backgrounds, out, alphas, left, last, sizes, low, high):
    """Colours out [I, H, W, D], alphas, light left and rank of the last Gaussian of each pixel, [I, H, W], of the tiles
    low .. high, counted over images; offsets [I tiles + 1]; backgrounds [I, D] or empty. All flat.

    alphas are sums of weights, which is 1 - left without its rounding, so that a depth over a small alpha is exact."""
    width, height, across, tiles, channels, stride = sizes
    padded = stride - COLOR
    s = np.empty(CHANNELS + PIXELS * padded, data.dtype)
    for task in range(low, high):
        image, tile = task // tiles, task % tiles
        x0, y0 = (tile % across) * TILE, (tile // across) * TILE
        columns, rows = min(width - x0, TILE), min(height - y0, TILE)
        _place_pixels(s, x0, y0)
        for i in range(PIXELS):
            s[LEFT + i] = 1 if i % TILE < columns and i // TILE < rows else -1
            s[LAST + i], s[COVER + i] = -1, 0
        for i in range(CHANNELS, CHANNELS + PIXELS * padded):
            s[i] = 0
        open_pixels = columns * rows
        for rank in range(offsets[task + 1] - offsets[task]):
            j = np.int64(entries[2 * (offsets[task] + rank)])
            begin, end = _rows(boxes, j, y0)
            open_pixels -= blend(s, begin, end, data, j * stride, s.dtype.type(rank))
            for k in range(GROUP, padded, GROUP):
                blend_more(s, begin, end, data, j * stride + COLOR + k, CHANNELS + PIXELS * k)
            if open_pixels == 0:
                break
        for r in range(rows):
            for c in range(columns):
                place, i = (image * height + y0 + r) * width + x0 + c, r * TILE + c
                left[place], alphas[place] = abs(s[LEFT + i]), s[COVER + i]
                last[place] = np.int32(s[LAST + i])
                for k in range(channels):
                    value = s[CHANNELS + PIXELS * k + i]
                    if len(backgrounds) > 0:
                        value += left[place] * backgrounds[image * channels + k]
                    out[place * channels + k] = value


@kernel
def backward(
    data, entries, offsets, boxes, backgrounds, left, last, v_out, v_alpha, slots, absolute, sizes, low, high
):
    """Sums of every pair of Gaussian and tile, slots [E, COLOR_SUMS + padded channels], of the tiles low .. high; v_out
    and v_alpha are the gradients of the colours and alphas. Slots of pairs behind all pixels stay as they are."""
    width, height, across, tiles, channels, stride = sizes
    padded = stride - COLOR
    length = COLOR_SUMS + padded
    s = np.empty(CHANNELS + PIXELS * padded, data.dtype)
    for task in range(low, high):
        image, tile = task // tiles, task % tiles
        x0, y0 = (tile % across) * TILE, (tile // across) * TILE
        columns, rows = min(width - x0, TILE), min(height - y0, TILE)
        _place_pixels(s, x0, y0)
        for i in range(PIXELS):
            s[LEFT + i], s[LAST + i], s[BEHIND + i], s[DOT + i] = 1, -1, 0, 0
        for i in range(CHANNELS, CHANNELS + PIXELS * padded):
            s[i] = 0
        final = np.int64(-1)
        for r in range(rows):
            for c in range(columns):
                place, i = (image * height + y0 + r) * width + x0 + c, r * TILE + c
                rest = v_alpha[place]
                for k in range(channels):
                    v = v_out[place * channels + k]
                    s[CHANNELS + PIXELS * k + i] = v
                    if len(backgrounds) > 0:
                        rest -= backgrounds[image * channels + k] * v
                s[LEFT + i], s[LAST + i], s[BEHIND + i] = left[place], last[place], -left[place] * rest
                final = max(final, np.int64(last[place]))
        for rank in range(final, -1, -1):
            entry = offsets[task] + rank
            j, to = np.int64(entries[2 * entry]), np.int64(entries[2 * entry + 1]) * length
            begin, end = _rows(boxes, j, y0)
            at, number = j * stride, s.dtype.type(rank)
            if padded > GROUP:
                for k in range(GROUP, padded, GROUP):
                    dot_more(s, begin, end, data, at + COLOR + k, CHANNELS + PIXELS * k)
                if absolute:
                    trace_more_absolute(s, begin, end, data, at, number, slots, to)
                else:
                    trace_more(s, begin, end, data, at, number, slots, to)
                for k in range(GROUP, padded, GROUP):
                    sum_more(s, begin, end, CHANNELS + PIXELS * k, slots, to + COLOR_SUMS + k)
            elif absolute:
                trace_absolute(s, begin, end, data, at, number, slots, to)
            else:
                trace(s, begin, end, data, at, number, slots, to)


@kernel
def gather(
    slots, first, counts, opacities, v_means2d, v_absolute, v_conics, v_opacities, v_colors, sizes, low, high
):
    """Gradients of the blocks low .. high of splats: the sums of a splat's slots, which begin at first[j]."""
    channels, stride, splats, block = sizes
    length = COLOR_SUMS + stride - COLOR
    sums = np.empty(length, np.float64)
    for j in range(low * block, min(high * block, splats)):
        if counts[j] == 0:
            continue
        sums[:] = 0
        for slot in range(first[j], first[j] + counts[j]):
            for k in range(length):
                sums[k] += slots[slot * length + k]
        v_opacities[j] = -sums[0] / opacities[j]
        v_means2d[2 * j], v_means2d[2 * j + 1] = sums[1], sums[2]
        v_conics[3 * j], v_conics[3 * j + 1], v_conics[3 * j + 2] = 0.5 * sums[3], sums[4], 0.5 * sums[5]
        if len(v_absolute) > 0:
            v_absolute[2 * j], v_absolute[2 * j + 1] = sums[ABSOLUTE], sums[ABSOLUTE + 1]
        for k in range(channels):
            v_colors[j * channels + k] = sums[COLOR_SUMS + k]
