"""The only file that imports torch.distributed: start and end of the process group, rank facts, gathers, sums.

Every function works without a process group as well (one process, world size 1), so callers never ask. A function
marked "# all ranks" is a collective: every rank has to call it, in the same order.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as td

from . import watchdog
from .failure import UserError, end_now, end_with_torchrun, in_short, lost_peer, print_error
from .world import World, read_environment

T = TypeVar("T")

# torch 2.14 renamed these three; 2.11 has the old names only.
_all_gather_into = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor
_reduce_scatter_into = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor
_set_group_timeout = getattr(td, "set_timeout", None) or td.distributed_c10d._set_pg_timeout


def init(timeout_s: float = 600.0) -> World:  # all ranks
    """Starts the process group if torchrun started us; picks this process's device.

    timeout_s: seconds after which a collective that a peer does not join becomes an error.
    """
    rank, local_rank, world_size = read_environment(dict(os.environ))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"environment: LOCAL_RANK={local_rank} but this node has {torch.cuda.device_count()} GPUs; "
                "expected --nproc_per_node at most the number of GPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if "RANK" in os.environ:
        end_with_torchrun()
        td.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
        global _timeout
        _timeout = timedelta(seconds=timeout_s)
        watchdog.set_rank(rank)
        if device.type == "cuda":
            threading.Thread(target=_watch_nccl, name="reid_dist-nccl", daemon=True).start()
    return World(rank, local_rank, world_size, device)


_timeout = timedelta(seconds=600)
_groups: list[Any] = []  # all process groups that were made beside the default one


def set_timeout(seconds: float) -> None:  # all ranks
    """From here on, a collective that a peer does not join within so many seconds becomes an error."""
    global _timeout
    if _timeout == timedelta(seconds=seconds):
        return
    _timeout = timedelta(seconds=seconds)
    watchdog.set_limit(seconds / 2)
    if td.is_initialized():
        for group in [None, *_groups]:
            _set_group_timeout(_timeout, group)


def new_group(ranks: list[int] | None = None, backend: str | None = None) -> Any:  # all ranks
    """A process group with the timeout that holds for all."""
    group = td.new_group(ranks, timeout=_timeout, backend=backend)
    if ranks is None or rank() in ranks:
        _groups.append(group)
    return group


def shutdown() -> None:
    """Ends the process group if there is one."""
    if td.is_initialized():
        with _watching:
            td.destroy_process_group()


# How often NCCL is asked for errors. torch ends the process no sooner than 4 x 15 s after it has noted one.
NCCL_POLL_S = 1.0
_watching = threading.Lock()  # held while NCCL's state is read or ended
_ending = threading.Lock()  # never released: the thread that holds it ends the process


def _watch_nccl() -> None:
    """Ends this process with one line when NCCL has given up a collective.

    Without it the line would never be printed on GPUs. A host runs ahead of its GPU: it waits not in the collective but
    in the next copy from the device, where a timeout raises nothing. torch's own watchdog (Watchdog::runLoop in
    ProcessGroupNCCL.cpp) first notes the error for `get_error`, then waits 4 x TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC,
    60 s by default, for debug dumps, and then throws in its own C++ thread, which ends the process by SIGABRT. This
    thread uses that minute. If it cannot (another thread keeps Python's lock), SIGABRT still comes: nothing hangs.

    The alternatives are worse. TORCH_NCCL_ASYNC_ERROR_HANDLING=2 aborts the communicators alone: the copy returns, and
    the step continues with whatever is in the buffers. 0 waits forever. TORCH_NCCL_BLOCKING_WAIT=1 raises in the host's
    thread, but makes the host wait for every collective. TORCH_NCCL_PROPAGATE_ERROR=1 has each rank ask one store ten
    times a second, and every rank notices a timeout by itself anyway.
    """
    while True:
        time.sleep(NCCL_POLL_S)
        with _watching:
            if not td.is_initialized():
                return
            error = nccl_error()
        if error:
            end_without_peer(RuntimeError(error))


def nccl_error() -> str:
    """Why NCCL has given up a collective of this rank; empty if it has not."""
    cuda = torch.device("cuda")
    for group in [td.group.WORLD, *_groups]:
        backend = group._get_backend(cuda) if cuda in group._device_types else None
        if backend is None or backend.name() != "nccl":
            continue
        name = backend.get_error().name
        if name == "TIMEOUT":
            return f"an NCCL collective took longer than the {_timeout.total_seconds():g} s that it may"
        if name != "SUCCESS":
            return f"an NCCL collective failed ({name}); NCCL's lines above say why"
    return ""


def end_without_peer(error: Exception) -> NoReturn:
    """Ends this rank with one line, over an error for which another rank is the cause."""
    _ending.acquire()
    stood = watchdog.note_error(error)
    watchdog.write_stacks()
    print_error(f"{stood}, when it lost another rank, or waited for one too long: {in_short(error)}")
    # torchrun takes the first to end for the cause, in whole seconds.
    time.sleep(2)
    end_now(1)


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def barrier() -> None:  # all ranks
    if world_size() > 1:
        td.barrier()


def gather_objects(value: T) -> list[T]:  # all ranks
    """Every rank's value, in rank order. For a few small Python objects at start; tensors have `all_gather_rows`."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    td.all_gather_object(values, value)
    return values


def agreed(step: Callable[..., T], *args: Any, **kwargs: Any) -> T:  # all ranks
    """step(*args) on every rank; if it failed on any rank with a user's error, all ranks end together.

    Without the agreement the first rank to exit makes torchrun kill the others before they have said why, or the
    others wait for it in the next collective. An error that rank 0 has is printed by rank 0 alone; a rank whose
    message differs from rank 0's prints its own.
    """
    result, message = None, None
    try:
        result = step(*args, **kwargs)
    except (ValueError, OSError) as error:
        message = str(error) or repr(error)
    messages = gather_objects(message)
    if any(m is not None for m in messages):
        r = rank()
        if message is not None and (r == 0 or message != messages[0]):
            print_error(message, f"rank {r}: " if r > 0 else "")
        # torchrun sends SIGTERM to the rest when the first rank ends; all of them are about to exit with 2.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gather_objects(None)
        raise UserError
    return result  # type: ignore[return-value]


def fail(message: str) -> NoReturn:  # all ranks
    """Ends all ranks with exit code 2 over an error that all have found alike; rank 0 prints it."""
    agreed(_raise, message)
    raise AssertionError


def _raise(message: str) -> None:
    raise ValueError(message)


def run_main(main: Callable[[World], None], timeout_s: float = 600.0) -> NoReturn:
    """Runs main(world) between start and end of the process group; exits 0, or 2 after a user's error.

    Any other exception keeps its traceback and exit code 1. torchrun shows the traceback of the rank that failed first
    at the very end; a rank that only lost its peer says so in one line.
    """
    try:
        world = init(timeout_s)
    except ValueError as error:
        print_error(str(error))
        sys.exit(2)
    try:
        main(world)
    except UserError:
        end_now(2)
    except (ValueError, OSError) as error:
        # One rank's own error in mid-run: the others lose their peer, or are ended by the group's timeout.
        watchdog.note_error(error)
        print_error(str(error) or repr(error), f"rank {world.rank}: " if world.world_size > 1 else "")
        tell_torchrun(error)
        end_now(2)
    except Exception as error:  # noqa: BLE001 - shown; the clean-up of the interpreter could wait for others for ever
        if world.world_size > 1 and lost_peer(error):
            end_without_peer(error)
        stood = watchdog.note_error(error)
        traceback.print_exc()
        print_error(stood)
        tell_torchrun(error)
        end_now(1)
    shutdown()
    sys.exit(0)


def tell_torchrun(error: BaseException) -> None:
    """Leaves the traceback where torchrun looks for it; it shows the first failure's last of all."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with suppress(OSError):
            get_error_handler().record_exception(error)


class _GatherRows(torch.autograd.Function):
    """all_gather forward, sum over ranks backward. The exact adjoint: each rank's rows entered every rank's loss."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_empty((rows.shape[0] * world_size(), *rows.shape[1:]))
        _all_gather_into(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0].contiguous()
        mine = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        _reduce_scatter_into(mine, grad, op=td.ReduceOp.SUM)
        return mine


def gather_rows(rows: torch.Tensor) -> torch.Tensor:  # all ranks
    """The one differentiable gather: (B, ...) on each rank -> (W * B, ...) in rank order; B equal on all ranks.

    The backward sums the gradients of all ranks and applies no factor: with local anchors against gathered
    references and plain means, DDP's mean over ranks makes the exact gradient of the global loss.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def all_gather_rows(rows: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:  # all ranks
    """(n_r, ...) on rank r -> (sum n_r, ...) in rank order, not differentiable; the n_r may differ, zero included.
    sizes: the n_r, where every rank knows them: a GPU need not be waited for."""
    if world_size() == 1:
        return rows
    sizes = all_gather_sizes(rows.shape[0]) if sizes is None else sizes
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    out = rows.new_empty((world_size() * max(sizes), *rows.shape[1:]))
    _all_gather_into(out, padded)
    return torch.cat([out[r * max(sizes) : r * max(sizes) + n] for r, n in enumerate(sizes)])


def all_gather_sizes(size: int) -> list[int]:  # all ranks
    """Every rank's `size`, in rank order."""
    if world_size() == 1:
        return [size]
    mine = torch.tensor([size], dtype=torch.int64, device=collective_device())
    out = mine.new_empty(world_size())
    _all_gather_into(out, mine)
    return out.tolist()


def collective_device() -> torch.device:
    """Where small tensors of ours have to lie for a collective: gloo takes CPU tensors, NCCL this rank's GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def all_sum(tensor: torch.Tensor) -> torch.Tensor:  # all ranks
    """Sum over ranks, in place; returns the tensor. Means are never reduced, only sums and counts."""
    if world_size() > 1:
        td.all_reduce(tensor, op=td.ReduceOp.SUM)
    return tensor


def broadcast(tensor: torch.Tensor, src: int) -> torch.Tensor:  # all ranks
    """Rank src's values into every rank's tensor (same shape and dtype), in place; returns the tensor."""
    if world_size() > 1:
        td.broadcast(tensor, src=src)
    return tensor


def begin_average(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:  # all ranks
    """Starts an all-reduce of a float tensor, in place; what it returns waits for it and gives the mean over ranks."""
    if world_size() == 1:
        return lambda: tensor
    work = td.all_reduce(tensor, op=td.ReduceOp.SUM, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return tensor.div_(world_size())

    return finish


def wrap_ddp(model: torch.nn.Module, device: torch.device, leave: list[str]) -> torch.nn.Module:  # all ranks
    """DistributedDataParallel that means over ranks gradients and nothing else; the model itself at world size 1.

    leave: names of parameters that differ between ranks (a sharded classifier's) and are left alone.

    Buffers are not broadcast: rank 0's batch norm statistics are not the global batch's (`begin_average` makes those).
    """
    if world_size() == 1:
        return model
    ddp = torch.nn.parallel.DistributedDataParallel
    # torch 2.14 renamed the switch; 2.11 has the old name only.
    new = "forward_sync_buffers" in inspect.signature(ddp).parameters
    switch: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    device_ids = [device] if device.type == "cuda" else None
    ddp._set_params_and_buffers_to_ignore_for_model(model, leave)
    return ddp(model, device_ids=device_ids, gradient_as_bucket_view=True, **switch)


_subgroups: dict[int, list[Any]] = {}


def consecutive_ranks(size: int) -> td.ProcessGroup | None:  # all ranks
    """The process group of the `size` consecutive ranks that this rank is among; None when that is this rank alone.

    Groups are made once per size and kept: making one is a collective over all ranks.
    """
    if size == 1:
        return None
    if size not in _subgroups:
        starts = range(0, world_size(), size)
        _subgroups[size] = [new_group(list(range(start, start + size))) for start in starts]
    return _subgroups[size][rank() // size]


def group_sum(tensor: torch.Tensor, group: td.ProcessGroup | None) -> torch.Tensor:  # all ranks of the group
    """Sum over a group's ranks, in place; returns the tensor. Group None is this rank alone."""
    if group is not None:
        td.all_reduce(tensor, op=td.ReduceOp.SUM, group=group)
    return tensor


def group_gather(tensor: torch.Tensor, group: td.ProcessGroup | None) -> torch.Tensor:  # all ranks of the group
    """(...) on each rank of a group -> (R, ...) in rank order; not differentiable. Group None is this rank alone."""
    if group is None:
        return tensor[None]
    out = tensor.new_empty(td.get_world_size(group) * tensor.numel())
    _all_gather_into(out, tensor.reshape(-1), group=group)
    return out.view(-1, *tensor.shape)


def all_max(tensor: torch.Tensor) -> torch.Tensor:  # all ranks
    """Greatest value over ranks, element by element, in place; returns the tensor."""
    if world_size() > 1:
        td.all_reduce(tensor, op=td.ReduceOp.MAX)
    return tensor


def gather_to_main(rows: torch.Tensor) -> torch.Tensor | None:  # all ranks
    """(n_r, ...) on rank r -> (sum n_r, ...) in rank order on rank 0, in CPU memory; None on the others.

    Rank 0 needs room for the whole on the CPU, and nobody more on a GPU than it has.
    """
    rows = rows.detach().to("cpu").contiguous()
    sizes = all_gather_sizes(rows.shape[0])
    if rank() > 0:
        td.send(rows, dst=0)
        return None
    whole = rows.new_empty((sum(sizes), *rows.shape[1:]))
    for r, part in enumerate(whole.split(sizes)):
        if r == 0:
            part.copy_(rows)
        else:
            td.recv(part, src=r)
    return whole


class Vote:
    """Flags that one rank raises and all ranks act on after the same step: a signal, a checkpoint that failed.

    A small all-reduce over a CPU group is started at each step and read `LAG` steps later, when it is long done: no
    step and no GPU waits for it.
    """

    LAG = 2

    def __init__(self) -> None:  # all ranks
        self._group = new_group(backend="gloo") if world_size() > 1 else None
        self._running: deque[tuple[torch.Tensor, Any]] = deque()

    def cast(self, flags: int) -> int:  # all ranks
        """This rank's flags of this step (bits); returns the union of all ranks' flags as of LAG steps ago."""
        if self._group is None:
            return flags
        bits = torch.tensor([flags >> i & 1 for i in range(8)], dtype=torch.uint8)
        self._running.append((bits, td.all_reduce(bits, op=td.ReduceOp.MAX, group=self._group, async_op=True)))
        if len(self._running) <= self.LAG:
            return 0
        bits, work = self._running.popleft()
        work.wait()
        return sum(bit << i for i, bit in enumerate(bits.tolist()))

    def close(self) -> None:  # all ranks
        """Takes in what is still under way, so that nothing is left behind when the process group ends."""
        for _, work in self._running:
            work.wait()
        self._running.clear()


class _SumAlike(torch.autograd.Function):
    """Sum over ranks; the gradient passes as it is, because every rank computes the same loss from the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return all_sum(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def sum_alike(x: torch.Tensor) -> torch.Tensor:  # all ranks
    """Sum over ranks of parts of one loss that every rank goes on to compute alike; differentiable."""
    return x if world_size() == 1 else _SumAlike.apply(x)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


def undo_mean(x: torch.Tensor) -> torch.Tensor:
    """x, with its gradient times the world size: for a loss that is already global on every rank, not a share of it.

    DDP takes the mean over ranks of what lies behind x.
    """
    return x if world_size() == 1 else _ScaleGradient.apply(x, float(world_size()))


def unwrap(model: torch.nn.Module) -> Any:
    """The model itself, whether or not it is wrapped for DDP."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def accumulating(ddp: torch.nn.Module) -> AbstractContextManager[None]:
    """Backwards in here add to the gradients without the mean over ranks, which the next one outside takes for all."""
    return ddp.no_sync() if isinstance(ddp, torch.nn.parallel.DistributedDataParallel) else nullcontext()
