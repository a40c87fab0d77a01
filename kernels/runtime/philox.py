"""Random bits from a counter, Philox4x32-7, and the dropout mask that is made of them.

They are bit for bit those of `deltadiff.ops.reference`. They depend on a seed and on the place of
an element alone, not on block sizes, so a kernel that needs them again makes them again.
"""

import triton
import triton.language as tl


@triton.jit
def random_words(block, seed, step, index):
    """The four random words of each block of eight elements.

    This computes each product in 64 bits, which is one instruction; `tl.philox` takes two.
    """
    zero = tl.zeros(block.shape, tl.uint32)
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = zero + tl.cast(step, tl.uint32), zero + tl.cast(index, tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def bits_of_blocks(first_block, seed, step, index, BLOCKS: tl.constexpr):
    """16 bits for each element of rows that consist of whole blocks: one Philox call a block."""
    blocks = first_block[:, None] + tl.arange(0, BLOCKS)[None, :]
    w0, w1, w2, w3 = random_words(blocks, seed, step, index)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes read w0, w1, w2, w3
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (first_block.shape[0], BLOCKS * 8)).to(tl.int32, bitcast=True)


@triton.jit
def bits_of_elements(element, seed, step, index):
    """16 bits for each element, wherever its block begins: one Philox call an element."""
    w0, w1, w2, w3 = random_words(element >> 3, seed, step, index)
    place = (element & 7).to(tl.int32)
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    half = tl.where(place % 2 == 0, word & 0xFFFF, word >> 16)
    return half.to(tl.int32, bitcast=True)


@triton.jit
def kept_by_dropout(seed, dropout, rows, column, width, COLUMNS: tl.constexpr):
    """Which elements of a tile dropout keeps; it keeps each with probability 1 - ``dropout``.

    The tile has the given ``rows`` (int64), and COLUMNS columns from ``column`` on, both multiples
    of 8, of a matrix that is ``width`` columns wide. Each row of the matrix consists of blocks of
    eight elements; the last block may be shorter.
    """
    first_block = rows * tl.cdiv(width, 8) + column // 8
    bits = bits_of_blocks(first_block, seed, 0, 0, COLUMNS // 8)
    return bits >= (tl.cast(dropout, tl.float32) * 65536).to(tl.int32)
