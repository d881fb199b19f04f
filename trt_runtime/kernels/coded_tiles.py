"""Triton functions on tiles of packed quantized weights (codes); `quantized_linear` explains layout and exactness."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, return"
from __future__ import annotations

import triton
import triton.language as tl

_FETCH = tl.constexpr(
    "{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
    "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}"
)
_MINUS_8 = tl.constexpr("mov.b32 $0, 0x80088008; // $1")
_FP8_HALF_0 = tl.constexpr(
    "{.reg .b32 s, t; shl.b32 s, $1, 8; and.b32 s, s, 0x80008000; shl.b32 t, $1, 7; "
    "lop3.b32 $0, t, 0x3f803f80, s, 0xea;}"
)
_FP8_HALF_1 = tl.constexpr(
    "{.reg .b32 s, t; and.b32 s, $1, 0x80008000; shr.u32 t, $1, 1; lop3.b32 $0, t, 0x3f803f80, s, 0xea;}"
)


@triton.constexpr_function
def masked(shift, mask, magic):
    """Assembly: (words >> shift) & mask | magic, two words in a register; without magic, no or."""
    # lop3 0xea is (a & b) | c.
    words = "t" if shift else "$1"
    taken = f"lop3.b32 $0, {words}, {mask}, {magic}, 0xea;" if magic else f"and.b32 $0, {words}, {mask};"
    return f"{{.reg .b32 t; shr.u32 t, $1, {shift}; {taken}}}" if shift else taken


@triton.constexpr_function
def sixteenth(shift, addend):
    """Assembly: (1024 + 16 u) / 16 plus a number, in fp16, of the second code in words >> shift."""
    moved, words = (f"shr.u32 t, $1, {shift}; ", "t") if shift else ("", "$1")
    return (
        f"{{.reg .b32 t, c, d; {moved}lop3.b32 t, {words}, 0x00f000f0, 0x64006400, 0xea; mov.b32 c, 0x2c002c00; "
        f"mov.b32 d, {addend}; fma.rn.f16x2 $0, t, c, d;}}"
    )


@triton.jit
def _two_words(text: tl.constexpr, words, kind: tl.constexpr):
    # The type must be named here: one that is passed on is not taken.
    if kind == tl.float16:
        return tl.inline_asm_elementwise(text, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(text, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.constexpr_function
def middle_of(kind, code):
    """The converted value of a code of zero: see `packing.offsets`."""
    middle = 8.0 if code == "int4" else 128.0
    return middle + (1024.0 if kind == tl.float16 else 128.0 if code == "int4" else 0.0)


@triton.jit
def unsigned(words, kind: tl.constexpr, CODE: tl.constexpr, PART: tl.constexpr, FAST: tl.constexpr):
    """1024 + u (fp16) or 128 + u (bf16) of the integer codes in one part of the words."""
    if FAST and CODE == "int4" and kind == tl.float16 and PART % 2 == 1:
        # Plus 960: 1024 + u.
        return _two_words(sixteenth(4 * PART - 4, "0x63806380"), words, kind)
    elif FAST and CODE == "int4":
        magic: tl.constexpr = "0x64006400" if kind == tl.float16 else "0x43004300"
        return _two_words(masked(4 * PART, "0x000f000f", magic), words, kind)
    elif FAST and kind == tl.float16:
        return _two_words(masked(8 * PART, "0x00ff00ff", "0x64006400"), words, kind)
    else:
        u = (words >> (4 * PART)) & 0xF if CODE == "int4" else (words >> (8 * PART)) & 0xFF
        start: tl.constexpr = 0x6400 if kind == tl.float16 else 0x4300
        return (u | start).to(tl.int16).to(kind, bitcast=True)


@triton.jit
def fp8(words, PART: tl.constexpr, kind: tl.constexpr, FAST: tl.constexpr):
    """The e4m3 number in a byte of int16 as fp16 or bf16: its bits in place, its exponent's bias corrected."""
    if FAST and kind == tl.float16:
        text: tl.constexpr = _FP8_HALF_0 if PART == 0 else _FP8_HALF_1
        moved = _two_words(text, words, kind)
        return moved * 256.0
    bits = words >> (8 * PART)
    if kind == tl.float16:
        moved = ((bits << 8) & -32768) | ((bits << 7) & 0x3F80)
        return moved.to(tl.int16).to(kind, bitcast=True) * 256.0
    else:
        moved = ((bits << 8) & -32768) | ((bits << 4) & 0x07F0)
        return (moved.to(tl.int16).to(kind, bitcast=True).to(tl.float32) * 1.329227995784916e36).to(kind)


@triton.jit
def codes(words, offset, kind: tl.constexpr, CODE: tl.constexpr, PART: tl.constexpr, FAST: tl.constexpr):
    """Codes of one part of the words, less their zero, as numbers; `offset` is from `packing.offsets`."""
    if CODE == "fp8":
        return fp8(words, PART, kind, FAST)
    elif CODE == "int8" and kind != tl.float16:
        # 128 + 255 has more bits than bf16: by way of fp32.
        u = (words >> (8 * PART)) & 0xFF
        return (u.to(tl.float32) - offset.to(tl.float32)).to(kind)
    else:
        return unsigned(words, kind, CODE, PART, FAST) - offset


@triton.jit
def centred(words, kind: tl.constexpr, CODE: tl.constexpr, PART: tl.constexpr, FAST: tl.constexpr):
    """`codes` where zero is zero."""
    if FAST and CODE == "int4" and kind == tl.float16 and PART % 2 == 1:
        # Less 72: u - 8.
        return _two_words(sixteenth(4 * PART - 4, "0xd480d480"), words, kind)
    else:
        return codes(words, tl.full((1, 1, 1, 1, 1, 1), middle_of(kind, CODE), kind), kind, CODE, PART, FAST)


@triton.jit
def lifted(words, PART: tl.constexpr, FAST: tl.constexpr):
    """u * 2^-24, or in odd parts u * 2^-20, of int4 codes: the fp16 subnormals of their bits in place."""
    if FAST:
        mask: tl.constexpr = "0x000f000f" if PART % 2 == 0 else "0x00f000f0"
        return _two_words(masked(8 * (PART // 2), mask, ""), words, tl.float16)
    else:
        bits = (words >> (8 * (PART // 2))) & (0x0F if PART % 2 == 0 else 0xF0)
        return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def minus_8(words, FAST: tl.constexpr):
    """Minus the result of `lifted` for u = 8, in the layout of the words."""
    if FAST:
        return _two_words(_MINUS_8, words, tl.float16)
    else:
        return (words * 0 - 32760).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def words_of(both, BLOCK: tl.constexpr):
    """Words [BLOCK, row % 8, column // 4 % 4, column // 2 % 2, row // 8, column % 2] of a tile, from memory's order."""
    return tl.reshape(tl.join(both.to(tl.int16), (both >> 16).to(tl.int16)), (BLOCK, 8, 4, 2, 2, 2))


@triton.jit
def matrix(a, BLOCK: tl.constexpr, QUADS: tl.constexpr):
    """Codes of one part, as `words_of` orders them, as the left operand [BLOCK, row, column] of a product.

    The order of the columns is free, if that of the inputs is the same.  A thread has four in a row (`QUADS`) or two
    pairs, so that Triton need not move them.
    """
    if QUADS:
        return tl.reshape(tl.permute(a, (0, 4, 1, 2, 3, 5)), (BLOCK, 16, 16))
    else:
        return tl.reshape(tl.permute(a, (0, 4, 1, 3, 2, 5)), (BLOCK, 16, 16))


@triton.jit
def scales_of(scale, tile, unit, some, COLUMNS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """[units, 64] of scales or offsets: those of each thread's two rows."""
    lane = tl.arange(0, 64)
    rows = tl.max_contiguous(tl.multiple_of(lane // 8 * 2 + lane % 2, 2), 2)[None, :]
    if GROUPS == 1:
        group = unit[:, None] * 0
    elif GROUP % COLUMNS == 0:
        group = unit[:, None] // (GROUP // COLUMNS)
    else:
        group = (unit[:, None] * COLUMNS + (lane // 2 % 4 * (COLUMNS // 4))[None, :]) // GROUP
    return tl.load(scale + (tile * GROUPS + group) * 16 + rows, mask=some[:, None] & (group < GROUPS), other=0.0)


@triton.jit
def fetch_share(memory, size, share):
    """Prefetch this block's share of `size` bytes (multiples of 16) into L2, without waiting for it."""
    start = tl.program_id(0).to(tl.int64) * share
    mine = tl.minimum(size - start, share).to(tl.int32)
    if mine > 0:
        where = memory.to(tl.int64) + start
        tl.inline_asm_elementwise(_FETCH, "=r,l,r", [where, mine], dtype=tl.int32, is_pure=False, pack=1)
