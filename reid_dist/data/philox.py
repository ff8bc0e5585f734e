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


def permutation(words: np.ndarray) -> np.ndarray:
    """(n,) random words -> a permutation of 0..n-1: sorted by their upper bits, ties by index.

    Sorting one integer that carries the index is several times faster than an argsort, and the same with any method
    of sorting.
    """
    low = np.uint64(bits(len(words)))
    keys = (words >> low << low) | np.arange(len(words), dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)


def shuffle_within(pids: np.ndarray, num_pids: int, words: np.ndarray) -> np.ndarray:
    """(n,) int64 image indices: all of identity 0, then of identity 1, ...; those of one identity in random order."""
    pid_bits, index_bits = bits(num_pids), bits(len(pids))
    random_bits = 64 - pid_bits - index_bits
    if random_bits < _MIN_RANDOM_BITS:
        raise ValueError(f"{len(pids)} images of {num_pids} identities are more than the plan's 64-bit keys can order")
    keys = words  # overwritten: at this size every copy counts
    keys >>= np.uint64(64 - random_bits)
    keys <<= np.uint64(index_bits)
    keys |= np.arange(len(pids), dtype=np.uint64)
    if pid_bits:
        keys |= pids.astype(np.uint64) << np.uint64(64 - pid_bits)
    keys.sort()
    keys &= np.uint64(2**index_bits - 1)
    return keys.astype(np.int64)


def count_within(lengths: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]"""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
