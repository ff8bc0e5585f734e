"""What must divide what: identities x instances, ranks, batch norm groups, micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_batch(cfg: Any, world_size: int) -> list[str]:
    """A message for each of them that does not; cfg is the whole config."""
    batch, k, group = cfg.DATA.TRAIN_BATCH, cfg.DATA.NUM_INSTANCES, cfg.MODEL.BN_GROUP or cfg.DATA.TRAIN_BATCH
    if batch % k:
        near = sorted({max(k, batch // k * k), (batch // k + 1) * k})
        return [f"DATA.TRAIN_BATCH {batch}: expected a multiple of DATA.NUM_INSTANCES {k}, such as {join(near)}"]
    errors = []
    if group == 1:
        errors.append("MODEL.BN_GROUP 1: expected at least 2 images to take statistics over, or 0 for the whole batch")
    if batch % group:
        good = [d for d in divisors(batch) if d > 1]
        errors.append(f"MODEL.BN_GROUP {group}: expected a divisor of DATA.TRAIN_BATCH {batch}: {join(good)}, or 0")
    if batch % world_size:
        step = world_size * k
        near = sorted({max(step, batch // step * step), (batch // step + 1) * step})
        errors.append(
            f"DATA.TRAIN_BATCH {batch} on {world_size} ranks: expected a batch that divides into ranks, such as "
            f"{join(near)}, or {join(divisors(batch))} ranks"
        )
        return errors
    local = batch // world_size
    if not errors and local % group and group % local:
        good = [g for g in divisors(batch) if local % g == 0 or g % local == 0]
        sizes = [w for w in divisors(batch) if (batch // w) % group == 0 or group % (batch // w) == 0]
        errors.append(
            f"MODEL.BN_GROUP {group} with {local} images a rank ({batch} on {world_size}): expected a multiple or a "
            f"divisor of a rank's images: {join(good)}; or {join(sizes)} ranks"
        )
    micro = cfg.TRAIN.MICRO_BATCH
    if not errors and micro and (local % micro or micro % group):
        good = [m for m in divisors(local) if m % group == 0]
        expected = (
            f"whole batch norm groups that divide a rank's {local} images: {join(good)}"
            if good
            else (f"0, or a MODEL.BN_GROUP that divides a rank's {local} images")
        )
        errors.append(f"TRAIN.MICRO_BATCH {micro} with MODEL.BN_GROUP {group}: expected {expected}")
    if not cfg.LOSS.GATHER and (batch // k) % world_size:
        errors.append(
            f"LOSS.GATHER False with {batch // k} identities on {world_size} ranks: expected whole identities on each "
            f"rank: {join(divisors(batch // k))} ranks"
        )
    return errors


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def join(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
