"""TRAIN.CUDA_GRAPH: a training step captured once as a CUDA graph and replayed with a single launch.

What limits the step of a small batch is the host, which needs some microseconds for each of its hundreds of operations.
A replay needs none of them. Everything of the step is captured: forward, backward with its collectives, update and
running statistics; the images and labels are copied into fixed memory first, the losses and the flag out of it after.
On the CPU the same code runs with a plain call in place of the replay, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from . import dist, watchdog
from .step import Losses

Step = Callable[[torch.Tensor, torch.Tensor], tuple[Losses, torch.Tensor]]

# Steps before the capture: as many as PyTorch's notes on CUDA graphs ask for with DDP.
WARM_UP = 11


def capture(
    step: Step, scaler: torch.amp.GradScaler, images: torch.Tensor, global_pids: torch.Tensor
) -> tuple[Step, str]:  # all ranks
    """(the step as a replay, a line about it). If a rank cannot capture, all ranks end with an error message: a failed
    capture leaves DDP and the allocator in states from which training cannot continue.

    step: (images (B, 3, H, W), global_pids (N,)) -> (losses, flag of a step that was left out), which must not wait for
    the device; images, global_pids: tensors like those of every step, whose memory is kept and whose values are lost.
    Weights, optimizer, buffers and scaler are as before.
    """
    captured = _Captured(step, images, global_pids)
    warm_up(step, scaler, images, global_pids)
    if images.device.type != "cuda":
        return captured, "graph     TRAIN.CUDA_GRAPH on: nothing to capture on a CPU, steps run without a graph"
    problem = ""
    try:
        captured.record()
    except RuntimeError as error:
        problem = " ".join(str(error.__context__ or error).split())[:300]  # the end of the capture hides its cause
    agree_on_capture(problem)
    watchdog.limit_replays()
    return captured, "graph     the step is a CUDA graph"


def agree_on_capture(problem: str) -> None:  # all ranks
    """Ends all ranks if one could not capture; problem: why this rank could not, or ''."""
    problems = [p for p in dist.gather_objects(problem) if p]
    if problems:
        dist.fail(f"TRAIN.CUDA_GRAPH on: the step cannot be captured ({problems[0]}); set TRAIN.CUDA_GRAPH off")


def warm_up(
    step: Step, scaler: torch.amp.GradScaler, images: torch.Tensor, global_pids: torch.Tensor
) -> None:  # all ranks
    """Runs steps that change nothing: of images that are not finite, whose update every part of a step leaves out.

    They create what must exist before a capture: the optimizer's state, constants, cuDNN's and DDP's plans.
    """
    images.fill_(float("nan"))
    global_pids.zero_()
    before = scaler.state_dict()
    with beside(images.device):
        for _ in range(WARM_UP):
            _, bad = step(images, global_pids)
    assert bad.item() == 1.0, "a warm-up step has changed the weights"
    if scaler.is_enabled():
        scaler.load_state_dict(before)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Runs what is inside on the stream that steps are captured on; does nothing on a CPU.

    DDP has to be made in here, and the step to be warmed up: gradients are added up on the stream on which autograd's
    nodes for them were made, and a capture cannot follow them to another one (PyTorch's notes on CUDA graphs).
    """
    if device.type != "cuda":
        yield
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream(device).wait_stream(side)


@lru_cache(maxsize=1)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Captured:
    """A step in fixed memory, recorded or (on the CPU) called."""

    def __init__(self, step: Step, images: torch.Tensor, global_pids: torch.Tensor) -> None:
        self._step, self._images, self._global_pids = step, images, global_pids
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: tuple[Losses, torch.Tensor]

    def record(self) -> None:
        """Captures the step; runs nothing."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog and the threads that prepare images go on using CUDA meanwhile.
        stream = _side_stream(self._images.device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._result = self._step(self._images, self._global_pids)
        self._graph = graph

    def __call__(self, images: torch.Tensor, global_pids: torch.Tensor) -> tuple[Losses, torch.Tensor]:
        self._images.copy_(images, non_blocking=True)
        self._global_pids.copy_(global_pids, non_blocking=True)
        if self._graph is None:
            self._result = self._step(self._images, self._global_pids)
        else:
            watchdog.at("replay")
            self._graph.replay()
        # The next replay writes into the same memory.
        losses, bad = self._result
        return Losses(*(value.clone() for value in losses)), bad.clone()
