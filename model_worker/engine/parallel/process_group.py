"""Ranks that are processes of one machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

_LOOPBACK = "127.0.0.1"
c10d: Any = distributed  # whose types are not exported
Store = Any
LOAD_TIMEOUT_S = 600.0  # a rank waits for the others: reading their shares of the weights may take so much longer
STEP_TIMEOUT_S = 60.0


class ProcessGroup:
    """A `RankGroup` of processes of this machine: NCCL where the tensors are on GPUs, gloo on CPUs.

    It is torch's process group, but none that torch keeps: a process may have several. Calls raise RuntimeError when
    another rank has gone, or does not answer in time.

    Args:
        store: where the ranks find each other.
        device: of the tensors.
        timeout_s: that a call waits for the others, at first.
    """

    def __init__(
        self, store: Store, *, rank: int, size: int, device: torch.device, timeout_s: float = LOAD_TIMEOUT_S
    ) -> None:
        self.rank = rank
        self.size = size
        self._device = device
        self._group = _make_backend(store, rank, size, device, timedelta(seconds=timeout_s))

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        widest = max(widths)
        padded = F.pad(x, (0, widest - x.shape[-1])).contiguous()
        gathered = padded.new_empty((self.size * len(padded), *padded.shape[1:]))
        self._group._allgather_base(gathered, padded).wait()
        parts = gathered.view(self.size, *padded.shape)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def broadcast(self, x: Tensor) -> None:
        self._group.broadcast([x], c10d.BroadcastOptions()).wait()  # from rank 0

    def minimum(self, number: int) -> int:
        numbers = [torch.empty(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        self._group.allgather([numbers], [torch.tensor([number], device=self._device)]).wait()
        return min(int(each.item()) for each in numbers)

    def wait_at_most(self, timeout_s: float) -> None:
        """That a call waits for the others, from now on."""
        self._group._set_default_timeout(timedelta(seconds=timeout_s))

    def abort(self) -> None:
        """Let nobody wait for this rank, nor this rank for anybody, any more. Any thread may call this."""
        self._group.abort()


def host_store(size: int) -> tuple[Store, int]:
    """A store for `size` ranks of this machine, which nobody else reaches, and its port."""
    listener = socket.create_server((_LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    store = c10d.TCPStore(
        _LOOPBACK, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, port


def join_store(port: int, size: int) -> Store:
    """The store that rank 0 made."""
    return c10d.TCPStore(_LOOPBACK, port, size, is_master=False, wait_for_workers=False)


def _make_backend(store: Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    if device.type == "cuda":
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return c10d.ProcessGroupNCCL(store, rank, size, options)
    options = c10d.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._threads = 1
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    return c10d.ProcessGroupGloo(store, rank, size, options)
