"""Which images form a step and how each is augmented: pure functions of (seed, epoch, position), numpy only.

Nothing here knows of processes: a rank asks for its block of the global batch, and the blocks of any number of ranks
together are the same global batch with the same augmentation. The random numbers are in `philox.py`, what is drawn
for an image in `augment.py`. A golden hash in the tests pins the plan.

An epoch is `num_steps` global batches, the same number in every epoch. Every identity's images are shuffled and cut
into chunks of K images of one identity; the samplers make batches of P = batch / K chunks:

- chunk: all chunks are shuffled, batches are consecutive chunks. One identity can stand twice in a batch.
- identity: every batch has P distinct identities. The number of steps S is the largest for which S distinct places
  can be filled: sum over identities of min(chunks, S) >= S x P. An identity with more than S chunks gives S of them.
- identity_camera: as identity, but only the first image of a chunk, the anchor, comes from the shuffled images. The
  others are drawn for each anchor from its identity's images of other cameras, and from the anchor's own camera only
  when those run out; no image twice. So an epoch's anchors are distinct, its other images can repeat. (fast-reid's
  BalancedIdentitySampler draws other cameras' images more than once before it turns to the anchor's camera.)

Corner cases: an identity with fewer than K images gives one chunk of K draws with replacement, so its images can
repeat (identity_camera: all its images once, then draws with replacement from other cameras than the anchor's); all
others appear at most once in an epoch. A rest of an identity shorter than K is left out of the epoch, as are an
identity's chunks above S and the fewer than P chunks that do not fill a last batch; every epoch leaves out others.
Fewer than P identities (identity, identity_camera) or chunks (chunk) is a ValueError.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import augment as aug
from . import philox
from .cameras import Cameras
from .philox import below, count_within, offsets, permutation, uniform

SAMPLERS = ("chunk", "identity", "identity_camera")


class StepPlan(NamedTuple):
    """One rank's images of one step, in order; B = batch / world_size."""

    indices: np.ndarray  # (B,) int64: image in the training set
    pids: np.ndarray  # (B,) int64: label of the identity
    augmentation: aug.Augmentation  # of each


def count_chunks(sizes: np.ndarray, num_instances: int) -> np.ndarray:
    """Chunks of `num_instances` that identities of so many images give in an epoch; the rest of one is left out."""
    return np.where(sizes >= num_instances, sizes // num_instances, sizes > 0)


def smaller_batch(most: int) -> str:
    """What to do about a training set that does not fill a batch. Groups of the batch norm have to divide it, too."""
    return f"expected at most DATA.TRAIN_BATCH {most}, and a MODEL.BN_GROUP that divides it"


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
        augment: aug.Augment = aug.Augment(),  # noqa: B008 - a tuple of numbers
        camids: np.ndarray | None = None,
    ) -> None:
        """pids: (num_images,) integer labels 0..num_pids-1 of the training images; batch: images of the global batch;
        num_instances: K; sampler: one of SAMPLERS; seed: 0..2^64-1; height, width: of the images to train on, in
        pixels; camids: (num_images,) integers, which identity_camera needs. Raises ValueError for what cannot make a
        single batch.
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
        if errors := augment.errors():
            raise ValueError("\n".join(f"{name} {value!r}; expected {expected}" for name, value, expected in errors))
        self.batch, self.num_instances, self.sampler, self.seed = batch, num_instances, sampler, seed
        self.height, self.width, self.augment = height, width, augment
        self._pids = pids
        self._sizes = np.bincount(pids)  # images of each identity
        num_places = batch // num_instances
        num_chunks = count_chunks(self._sizes, num_instances)
        if sampler != "chunk":
            num_identities = np.count_nonzero(num_chunks)
            if num_identities < num_places:
                raise ValueError(
                    f"batch {batch} = {num_places} identities x {num_instances} instances, but the training set has "
                    f"{num_identities} identities; {smaller_batch(int(num_identities) * num_instances)}"
                )
            self.num_steps = _largest_num_steps(num_chunks, num_places)
            num_chunks = np.minimum(num_chunks, self.num_steps)
        else:
            self.num_steps = int(num_chunks.sum()) // num_places
            if self.num_steps == 0:
                raise ValueError(
                    f"batch {batch} = {num_places} chunks of {num_instances} images, but the training set has "
                    f"{num_chunks.sum()} chunks; {smaller_batch(int(num_chunks.sum()) * num_instances)}"
                )
        self._num_chunks = num_chunks  # chunks of each identity in an epoch
        self._cameras = Cameras(pids, camids) if sampler == "identity_camera" else None
        self._cache: dict[int, np.ndarray] = {}  # epoch: its indices, of the newest two that were asked for

    def indices(self, epoch: int) -> np.ndarray:
        """(num_steps, batch) integers, read-only: the image at each position of each global batch of the epoch."""
        if epoch < 1:
            raise ValueError(f"epoch {epoch}; expected at least 1")
        found = self._cache.get(epoch)
        if found is None:
            # The epoch before is kept: prefetching asks for the next one while the current one is still in use.
            self._cache = dict(list(self._cache.items())[-1:])
            chunks = self._chunks(epoch)
            order = self._chunk_order(epoch) if self.sampler == "chunk" else self._identity_order(epoch)
            found = chunks[order].reshape(self.num_steps, self.batch)
            found.flags.writeable = False
            self._cache[epoch] = found
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
        drawn = aug.draw(self.augment, self.seed, epoch, first, size, self.height, self.width)
        return StepPlan(indices.astype(np.int64), self._pids[indices], drawn)

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
        """(chunks, K) images; the chunks of identity 0 first, then those of identity 1, ..."""
        k, sizes, num_chunks = self.num_instances, self._sizes, self._num_chunks
        by_identity = philox.shuffle_within(self._pids, len(sizes), self.seed, philox.IMAGES, epoch)
        starts = offsets(sizes)
        if self._cameras is not None:
            anchors = by_identity[np.repeat(starts, num_chunks) + count_within(num_chunks)]
            starts, sizes = np.repeat(starts, num_chunks), np.repeat(sizes, num_chunks)
            u = uniform(philox.words(self.seed, philox.CAMERAS, epoch, len(anchors) * (k - 1))).reshape(
                len(anchors), k - 1
            )
            return np.column_stack([anchors, self._cameras.others(anchors, starts, sizes, u)])
        first = np.repeat(starts, num_chunks) + k * count_within(num_chunks)
        chunks = np.empty((len(first), k), by_identity.dtype)
        for i in range(0, len(first), philox.BLOCK):
            # A small identity's row runs over its end until its draws replace it; the last one's over the array's.
            places = np.minimum(first[i : i + philox.BLOCK, None] + np.arange(k), len(by_identity) - 1)
            chunks[i : i + philox.BLOCK] = by_identity[places]
        small = np.flatnonzero((sizes > 0) & (sizes < k))
        draws = uniform(philox.words(self.seed, philox.REPLACEMENT, epoch, len(small) * k)).reshape(-1, k)
        chunks[offsets(num_chunks)[small]] = by_identity[starts[small, None] + below(sizes[small, None], draws)]
        return chunks

    def _chunk_order(self, epoch: int) -> np.ndarray:
        """(num_steps * P,) chunk at each place of the epoch, for the chunk sampler."""
        num = int(self._num_chunks.sum())
        order = permutation(philox.words(self.seed, philox.CHUNKS, epoch, num))
        return order[: self.num_steps * self.batch // self.num_instances]

    def _identity_order(self, epoch: int) -> np.ndarray:
        """(num_steps, P) chunk at each place of the epoch, for the identity samplers: no identity twice in a row.

        The chunks of randomly ordered identities form one list, which fills the S x P table column by column. An
        identity has at most S chunks, so it lies in one column, or at the end of one and at the start of the next.
        Each column then gets its own random order of rows, or else the same identities would meet again and again;
        an identity in two columns takes rows in the second that it has not got in the first.
        """
        num_rows, num_columns = self.num_steps, self.batch // self.num_instances
        num_chunks = self._num_chunks
        identities = permutation(philox.words(self.seed, philox.CHUNKS, epoch, len(num_chunks)))
        lengths = num_chunks[identities]
        first = offsets(num_chunks)
        # Fewer than P chunks are over (or S could be larger); the shuffle decides whose.
        listed = (np.repeat(first[identities], lengths) + count_within(lengths))[: num_rows * num_columns]
        ends = np.cumsum(lengths)
        keys = philox.words(self.seed, philox.ROWS, epoch, 2 * num_rows * num_columns).reshape(num_columns, 2, num_rows)
        table = np.empty((num_rows, num_columns), dtype=listed.dtype)
        taken = np.empty(0, dtype=listed.dtype)  # rows of the column before that went to its last identity
        num_carried = 0
        for column in range(num_columns):
            rows = permutation(keys[column, 0])
            if num_carried:
                is_free = np.ones(num_rows, dtype=bool)
                is_free[taken] = False
                head = rows[is_free[rows]][:num_carried]
                is_free[:] = True
                is_free[head] = False
                # Their own keys for the others: in the order of `rows`, the rows taken before would come too early.
                others = permutation(keys[column, 1])
                rows = np.concatenate([head, others[is_free[others]]])
            table[rows, column] = listed[column * num_rows : (column + 1) * num_rows]
            end = (column + 1) * num_rows
            last = int(np.searchsorted(ends, end))  # the identity of the column's last chunk
            num_carried = int(ends[last]) - end  # its chunks in the next column
            taken = rows[num_rows - (int(lengths[last]) - num_carried) :]
        shuffled = philox.words(self.seed, philox.COLUMNS, epoch, table.size).reshape(table.shape)
        return np.take_along_axis(table, np.argsort(shuffled, axis=1, kind="stable"), axis=1)


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
