"""Random numbers that are functions of (seed, stream, epoch, place): raw words of Philox, and orders made from them.

Philox is a counter-based generator: the word for a place is found by setting the counter, so nothing has to be drawn
before it. Raw words are the only part of numpy's generators that stays the same across its versions.
"""

from __future__ import annotations

import numpy as np

# One stream a purpose, so that a new purpose never changes the numbers of an old one; new ones at the end.
IMAGES, REPLACEMENT, CHUNKS, ROWS, COLUMNS, AUGMENT, CAMERAS, PAD, POLICY, JITTER, BLUR, GREY, NOISE, HELD_OUT = range(
    14
)

BLOCK = 1 << 20  # numbers taken at a time, so that what is computed from them stays small beside the result

# Fewer random bits than this would order too many images of an identity by index. Reached at 2^47 images x identities.
_MIN_RANDOM_BITS = 16


def words(seed: int, stream: int, epoch: int, num: int, first: int = 0) -> np.ndarray:
    """(num,) uint64: words first, first + 1, ... of the stream; `first` a multiple of 4."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([first // 4, 0, 0, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(num)


def uniform(words: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def below(limit: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) -> int64 in 0..limit-1."""
    return (u * limit).astype(np.int64)


def between(low: float, high: float, u: np.ndarray) -> np.ndarray:
    return low + (high - low) * u


def bits(num: int) -> int:
    """Bits that hold 0..num-1."""
    return max(num - 1, 0).bit_length()


def index_type(num: int) -> type[np.signedinteger]:
    """The smaller of int32 and int64 that holds 0..num: a node's ranks keep millions of indices each."""
    return np.int32 if num <= np.iinfo(np.int32).max else np.int64


def permutation(words: np.ndarray) -> np.ndarray:
    """(n,) random words, which it overwrites -> a permutation of 0..n-1: sorted by their upper bits, ties by index.

    Sorting one integer that carries the index is several times faster than an argsort, and the same with any method
    of sorting.
    """
    low = np.uint64(bits(len(words)))
    words >>= low
    words <<= low
    return _order(words, 0, int(low), index_type(len(words)))


def shuffle_within(pids: np.ndarray, num_pids: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    """(n,) image indices: all of identity 0, then of identity 1, ...; those of one identity in random order.

    Each image's place among those of its identity is decided by its word of the stream. Where the images are listed by
    identity already, as most data sets are, this goes piece by piece, with the same result.
    """
    index_bits = bits(len(pids))
    random_bits = 64 - bits(num_pids) - index_bits
    if random_bits < _MIN_RANDOM_BITS:
        raise ValueError(f"{len(pids)} images of {num_pids} identities are more than the plan's 64-bit keys can order")
    out = np.empty(len(pids), index_type(len(pids)))
    ends = _ends_of_pieces(pids)
    for start, end in zip([0, *ends], ends, strict=False):
        first = start - start % 4
        keys = words(seed, stream, epoch, end - first, first=first)[start - first :]
        keys >>= np.uint64(64 - random_bits)
        keys <<= np.uint64(index_bits)
        keys |= pids[start:end].astype(np.uint64) << np.uint64(random_bits + index_bits)
        out[start:end] = _order(keys, start, index_bits, out.dtype)
    return out


def _ends_of_pieces(pids: np.ndarray) -> list[int]:
    """Where to cut the images into pieces of about BLOCK so that no identity is cut; [n] if they are in no order."""
    num = len(pids)
    if any((np.diff(pids[i : i + BLOCK + 1]) < 0).any() for i in range(0, num, BLOCK)):
        return [num]
    ends = [int(np.searchsorted(pids, pids[i], side="right")) for i in range(BLOCK, num, BLOCK)]
    return [*dict.fromkeys(end for end in ends if end < num), num]


def _order(keys: np.ndarray, first: int, index_bits: int, dtype: np.typing.DTypeLike) -> np.ndarray:
    """The places first, first + 1, ... of keys, whose lowest bits are free for them, in the order of the keys."""
    for i in range(0, len(keys), BLOCK):
        part = keys[i : i + BLOCK]
        part |= np.arange(first + i, first + i + len(part), dtype=np.uint64)
    keys.sort()
    keys &= np.uint64(2**index_bits - 1)
    return keys.astype(dtype)


def count_within(lengths: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]"""
    num = int(lengths.sum())
    return np.arange(num, dtype=index_type(num)) - np.repeat(offsets(lengths), lengths)


def offsets(lengths: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 2]: where each of some runs of these lengths starts."""
    return (np.cumsum(lengths) - lengths).astype(index_type(int(lengths.sum())))
