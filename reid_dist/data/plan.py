"""Which images form a step and how each is augmented: pure functions of (seed, epoch, position), numpy only.

Nothing here knows of processes: a rank asks for its block of the global batch, and the blocks of any number of ranks
together are the same global batch with the same augmentation. Random numbers are raw words of numpy's Philox, a
counter-based generator: the word for a position is found by setting the counter, so nothing has to be drawn before
it, and raw words are the only part of numpy's generators that stays the same across versions. A golden hash in the
tests pins the plan.

An epoch is `num_steps` global batches, the same number in every epoch. Every identity's images are shuffled and cut
into chunks of K images of one identity; two samplers make batches of P = batch / K chunks:

- chunk: all chunks are shuffled, batches are consecutive chunks. One identity can stand twice in a batch.
- identity: every batch has P distinct identities. The number of steps S is the largest for which S distinct places
  can be filled: sum over identities of min(chunks, S) >= S x P. An identity with more than S chunks gives S of them.

Corner cases: an identity with fewer than K images gives one chunk of K draws with replacement, so its images can
repeat; all others appear at most once in an epoch. A rest of an identity shorter than K is left out of the epoch, as
are an identity's chunks above S and the fewer than P chunks that do not fill a last batch; every epoch leaves out
others. Fewer than P identities (identity) or chunks (chunk) is a ValueError.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SAMPLERS = ("chunk", "identity")

# One stream a purpose, so that a new purpose never changes the numbers of an old one.
_IMAGES, _REPLACEMENT, _CHUNKS, _ROWS, _COLUMNS, _AUGMENT = range(6)

# Words a position takes from the augmentation stream: crop?, crop y, crop x, flip?, erase?, erase y, erase x, unused,
# then (area, aspect ratio) for each try. Philox makes four words a counter value, hence the multiple of four.
_ERASE_TRIES = 100
_FIRST_TRY = 8
_WORDS = _FIRST_TRY + 2 * _ERASE_TRIES
_ERASE_AREA = (0.02, 0.4)
_ERASE_RATIO = (0.3, 1 / 0.3)

# Fewer random bits than this would order too many images of an identity by index. Reached at 2^47 images x identities.
_MIN_RANDOM_BITS = 16


class StepPlan(NamedTuple):
    """One rank's images of one step, in order; B = batch / world_size. Sizes and places are pixels."""

    indices: np.ndarray  # (B,) int64: image in the training set
    pids: np.ndarray  # (B,) int64: label of the identity
    resize_hw: np.ndarray  # (B, 2) int32: resize the whole image to this height and width,
    crop_yx: np.ndarray  # (B, 2) int32: then cut out height x width from this corner,
    flip: np.ndarray  # (B,) bool: then mirror left and right,
    erase: np.ndarray  # (B, 4) int32: then erase y, x, h, w; h = w = 0 erases nothing


class EpochPlan:
    """The batches and the augmentation of every epoch. Epochs count from 1, steps within an epoch from 0."""

    def __init__(
        self,
        pids: np.ndarray,
        *,
        batch: int,
        num_instances: int,
        sampler: str,
        seed: int,
        height: int,
        width: int,
        rc_prob: float,
        re_prob: float,
    ) -> None:
        """pids: (num_images,) integer labels 0..num_pids-1 of the training images; batch: images of the global batch;
        num_instances: K; seed: 0..2^64-1; height, width: of the images to train on, in pixels; rc_prob, re_prob:
        probabilities of random cropping and random erasing. Raises ValueError for what cannot make a single batch.
        """
        pids = np.ascontiguousarray(pids, dtype=np.int64)
        if pids.ndim != 1 or pids.size == 0 or pids.min() < 0:
            raise ValueError(f"pids: shape {pids.shape}; expected one label >= 0 for each of at least one image")
        if num_instances < 1 or batch < 1 or batch % num_instances:
            raise ValueError(
                f"batch {batch} with {num_instances} instances an identity; expected a multiple of the instances"
            )
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r}; expected one of {', '.join(SAMPLERS)}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed}; expected 0 to 2^64 - 1")
        if height < 1 or width < 1:
            raise ValueError(f"image size {height} x {width}; expected at least 1 x 1")
        for name, prob in (("rc_prob", rc_prob), ("re_prob", re_prob)):
            if not 0 <= prob <= 1:
                raise ValueError(f"{name} {prob}; expected 0 to 1")
        self.batch, self.num_instances, self.sampler, self.seed = batch, num_instances, sampler, seed
        self.height, self.width, self.rc_prob, self.re_prob = height, width, rc_prob, re_prob
        self._pids = pids
        self._sizes = np.bincount(pids)  # images of each identity
        num_places = batch // num_instances
        num_chunks = np.where(self._sizes >= num_instances, self._sizes // num_instances, self._sizes > 0)
        if sampler == "identity":
            num_identities = np.count_nonzero(num_chunks)
            if num_identities < num_places:
                raise ValueError(
                    f"batch {batch} = {num_places} identities x {num_instances} instances, but the training set has "
                    f"{num_identities} identities; expected a batch of at most {num_identities * num_instances}"
                )
            self.num_steps = _largest_num_steps(num_chunks, num_places)
            num_chunks = np.minimum(num_chunks, self.num_steps)
        else:
            self.num_steps = int(num_chunks.sum()) // num_places
            if self.num_steps == 0:
                raise ValueError(
                    f"batch {batch} = {num_places} chunks of {num_instances} images, but the training set has "
                    f"{num_chunks.sum()} chunks; expected a batch of at most {num_chunks.sum() * num_instances}"
                )
        self._num_chunks = num_chunks  # chunks of each identity in an epoch
        self._cache: dict[int, np.ndarray] = {}

    def indices(self, epoch: int) -> np.ndarray:
        """(num_steps, batch) int64, read-only: the image at each position of each global batch of the epoch."""
        if epoch < 1:
            raise ValueError(f"epoch {epoch}; expected at least 1")
        found = self._cache.get(epoch)
        if found is None:
            chunks = self._chunks(epoch)
            order = self._identity_order(epoch) if self.sampler == "identity" else self._chunk_order(epoch)
            found = chunks[order].reshape(self.num_steps, self.batch)
            found.flags.writeable = False
            # The epoch before is kept: prefetching asks for the next one while the current one is still in use.
            last = list(self._cache.items())[-1:]
            self._cache = dict([*last, (epoch, found)])
        return found

    def step(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> StepPlan:
        """The rank-th of world_size equal contiguous blocks of the global batch. Costs only these positions."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step}; expected 0 to {self.num_steps - 1}")
        if not 0 <= rank < world_size or self.batch % world_size:
            raise ValueError(f"rank {rank} of {world_size} with batch {self.batch}; expected equal blocks")
        size = self.batch // world_size
        indices = self.indices(epoch)[step, rank * size : (rank + 1) * size]
        first = step * self.batch + rank * size
        words = _words(self.seed, _AUGMENT, epoch, size * _WORDS, first=first * _WORDS).reshape(size, _WORDS)
        return StepPlan(indices, self._pids[indices], *self._augmentation(_uniform(words)))

    def global_pids(self, epoch: int, step: int) -> np.ndarray:
        """(batch,) int64: the labels of the whole global batch of a step."""
        return self._pids[self.indices(epoch)[step]]

    def stats(self, epoch: int) -> dict[str, int]:
        """What the epoch covers: steps, positions (steps x batch), distinct images and identities, images left out."""
        indices = self.indices(epoch)
        seen = np.zeros(len(self._pids), dtype=bool)
        seen[indices.ravel()] = True
        images = int(np.count_nonzero(seen))
        identities = int(np.count_nonzero(np.bincount(self._pids[seen])))
        return {
            "steps": self.num_steps,
            "positions": indices.size,
            "images": images,
            "identities": identities,
            "left_out": len(self._pids) - images,
        }

    def _chunks(self, epoch: int) -> np.ndarray:
        """(chunks, K) int64 images; the chunks of identity 0 first, then those of identity 1, ..."""
        k, sizes, num_chunks = self.num_instances, self._sizes, self._num_chunks
        by_identity = _shuffle_within(self._pids, len(sizes), _words(self.seed, _IMAGES, epoch, len(self._pids)))
        starts = np.cumsum(sizes) - sizes
        small = np.flatnonzero((sizes > 0) & (sizes < k))
        first = np.repeat(starts, num_chunks) + k * _count_within(num_chunks)
        # A small identity's row runs over its end until its draws replace it; the last one's over the array's.
        places = np.minimum(first[:, None] + np.arange(k), len(by_identity) - 1)
        draws = _uniform(_words(self.seed, _REPLACEMENT, epoch, len(small) * k)).reshape(-1, k)
        places[(np.cumsum(num_chunks) - num_chunks)[small]] = starts[small, None] + (draws * sizes[small, None]).astype(
            np.int64
        )
        return by_identity[places]

    def _chunk_order(self, epoch: int) -> np.ndarray:
        """(num_steps * P,) chunk at each place of the epoch, for the chunk sampler."""
        num = int(self._num_chunks.sum())
        return _permutation(_words(self.seed, _CHUNKS, epoch, num))[: self.num_steps * self.batch // self.num_instances]

    def _identity_order(self, epoch: int) -> np.ndarray:
        """(num_steps, P) chunk at each place of the epoch, for the identity sampler: no identity twice in a row.

        The chunks of randomly ordered identities form one list, which fills the S x P table column by column. An
        identity has at most S chunks, so it lies in one column, or at the end of one and at the start of the next.
        Each column then gets its own random order of rows, or else the same identities would meet again and again;
        an identity in two columns takes rows in the second that it has not got in the first.
        """
        num_rows, num_columns = self.num_steps, self.batch // self.num_instances
        num_chunks = self._num_chunks
        identities = _permutation(_words(self.seed, _CHUNKS, epoch, len(num_chunks)))
        lengths = num_chunks[identities]
        first = np.cumsum(num_chunks) - num_chunks
        # Fewer than P chunks are over (or S could be larger); the shuffle decides whose.
        listed = (np.repeat(first[identities], lengths) + _count_within(lengths))[: num_rows * num_columns]
        ends = np.cumsum(lengths)
        keys = _words(self.seed, _ROWS, epoch, 2 * num_rows * num_columns).reshape(num_columns, 2, num_rows)
        table = np.empty((num_rows, num_columns), dtype=np.int64)
        taken = np.empty(0, dtype=np.int64)  # rows of the column before that went to its last identity
        num_carried = 0
        for column in range(num_columns):
            rows = _permutation(keys[column, 0])
            if num_carried:
                is_free = np.ones(num_rows, dtype=bool)
                is_free[taken] = False
                head = rows[is_free[rows]][:num_carried]
                is_free[:] = True
                is_free[head] = False
                # Their own keys for the others: in the order of `rows`, the rows taken before would come too early.
                others = _permutation(keys[column, 1])
                rows = np.concatenate([head, others[is_free[others]]])
            table[rows, column] = listed[column * num_rows : (column + 1) * num_rows]
            end = (column + 1) * num_rows
            last = int(np.searchsorted(ends, end))  # the identity of the column's last chunk
            num_carried = int(ends[last]) - end  # its chunks in the next column
            taken = rows[num_rows - (int(lengths[last]) - num_carried) :]
        shuffled = _words(self.seed, _COLUMNS, epoch, table.size).reshape(table.shape)
        return np.take_along_axis(table, np.argsort(shuffled, axis=1, kind="stable"), axis=1)

    def _augmentation(self, u: np.ndarray) -> tuple[np.ndarray, ...]:
        """(B, _WORDS) uniform numbers -> resize_hw, crop_yx, flip, erase of StepPlan."""
        size = np.array([self.height, self.width])
        crop = u[:, :1] < self.rc_prob
        # np.rint rounds half to even, as Python's round does; the two end offsets have half the chance of the others.
        resize_hw = np.where(crop, np.rint(1.125 * size), size).astype(np.int32)
        crop_yx = np.where(crop, np.rint(u[:, 1:3] * (size / 8)), 0).astype(np.int32)
        flip = u[:, 3] < 0.5
        erase = np.zeros((len(u), 4), dtype=np.int32)
        erased = np.flatnonzero(u[:, 4] < self.re_prob)
        u = u[erased]
        area = _between(_ERASE_AREA, u[:, _FIRST_TRY::2]) * (self.height * self.width)
        ratio = _between(_ERASE_RATIO, u[:, _FIRST_TRY + 1 :: 2])
        h, w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (h < self.height) & (w < self.width)
        first_fit = (np.arange(len(u)), np.argmax(fits, axis=1))
        h, w = h[first_fit], w[first_fit]
        y, x = np.floor(u[:, 5] * (self.height - h + 1)), np.floor(u[:, 6] * (self.width - w + 1))
        erase[erased] = np.where(fits.any(axis=1)[:, None], np.stack([y, x, h, w], axis=1), 0)
        return resize_hw, crop_yx, flip, erase


def _largest_num_steps(num_chunks: np.ndarray, num_places: int) -> int:
    """Largest S with sum of min(num_chunks, S) >= S * num_places; S = 1 holds. The sum over S falls as S grows."""
    low, high = 1, int(num_chunks.sum()) // num_places
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(num_chunks, middle).sum() >= middle * num_places:
            low = middle
        else:
            high = middle - 1
    return low


def _words(seed: int, stream: int, epoch: int, num: int, first: int = 0) -> np.ndarray:
    """(num,) uint64: words first, first + 1, ... of the stream; `first` a multiple of 4."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([first // 4, 0, 0, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(num)


def _uniform(words: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def _between(ends: tuple[float, float], u: np.ndarray) -> np.ndarray:
    return ends[0] + (ends[1] - ends[0]) * u


def _bits(num: int) -> int:
    """Bits that hold 0..num-1."""
    return max(num - 1, 0).bit_length()


def _permutation(words: np.ndarray) -> np.ndarray:
    """(n,) random words -> a permutation of 0..n-1: sorted by their upper bits, ties by index.

    Sorting one integer that carries the index is several times faster than an argsort, and the same with any method
    of sorting.
    """
    low = np.uint64(_bits(len(words)))
    keys = (words >> low << low) | np.arange(len(words), dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)


def _shuffle_within(pids: np.ndarray, num_pids: int, words: np.ndarray) -> np.ndarray:
    """(n,) int64 image indices: all of identity 0, then of identity 1, ...; those of one identity in random order."""
    pid_bits, index_bits = _bits(num_pids), _bits(len(pids))
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


def _count_within(lengths: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]"""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
