"""Ranks that are processes of one machine."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Backends:
    """torch's process groups; none that torch keeps, so that a process may have several.

    Attributes:
        host: gloo.
        tensors: NCCL where they are on GPUs, which makes its communicator in the first call; else `host`.
    """

    host: Any
    tensors: Any


class ProcessGroup:
    """A `RankGroup` of processes of this machine. Calls raise RuntimeError when another rank has gone, or does not
    answer in time; what runs on GPUs raises nothing there, and is garbage then: whoever waits for it asks the `Ranks`.

    The ranks find each other in the background, so that each loads its share meanwhile; the first call waits for that.
    Numbers of the host go over gloo also where tensors are on GPUs: it notices at once that a rank has gone.

    Args:
        find_store: gives the store where the ranks find each other.
        device: of the tensors.
    """

    def __init__(
        self,
        find_store: Callable[[], Store],
        *,
        rank: int,
        size: int,
        device: torch.device,
    ) -> None:
        self.rank = rank
        self.size = size
        self._device = device
        self._found: Future[_Backends] = Future()
        threading.Thread(target=self._find, args=(find_store,), daemon=True).start()

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        options = c10d.AllreduceOptions()
        options.asyncOp = False  # on the stream that computes: no events between two streams, which graphs would hold
        _wait(self._found.result().tensors.allreduce([x], options))
        return x

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        widest = max(widths)
        padded = F.pad(x, (0, widest - x.shape[-1])).contiguous()
        gathered = padded.new_empty((self.size * len(padded), *padded.shape[1:]))
        options = c10d.distributed_c10d.AllgatherOptions()
        options.asyncOp = False
        _wait(self._found.result().tensors._allgather_base(gathered, padded, options))
        parts = gathered.view(self.size, *padded.shape)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def broadcast(self, x: Tensor) -> None:
        options = c10d.BroadcastOptions()  # from rank 0
        options.asyncOp = False
        _wait(self._found.result().tensors.broadcast([x], options))

    def minimum(self, number: int) -> int:
        numbers = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        _wait(self._found.result().host.allgather([numbers], [torch.tensor([number])]))
        return min(int(each) for each in numbers)

    def wait_at_most(self, timeout_s: float) -> None:
        """That a call waits for the others, from now on, where it waits on the host."""
        self._found.result().host._set_default_timeout(timedelta(seconds=timeout_s))

    def abort(self) -> None:
        """Let nobody wait for this rank, nor this rank for anybody, any more. Any thread may call this; waits for
        nothing.
        """
        try:
            self._found.set_exception(RuntimeError("The ranks' group has been aborted."))
        except InvalidStateError:  # they have found each other, or never will
            if self._found.exception() is None:
                _abort(self._found.result())

    def _find(self, find_store: Callable[[], Store]) -> None:
        try:
            backends = _make_backends(find_store(), self.rank, self.size, self._device)
        except Exception as error:
            with suppress(InvalidStateError):  # aborted in the meantime
                self._found.set_exception(error)
            return
        try:
            self._found.set_result(backends)
        except InvalidStateError:  # aborted in the meantime
            _abort(backends)


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


def _make_backends(store: Store, rank: int, size: int, device: torch.device) -> _Backends:
    timeout = timedelta(seconds=LOAD_TIMEOUT_S)
    options = c10d.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._threads = 1
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    host = c10d.ProcessGroupGloo(c10d.PrefixStore("host", store), rank, size, options)
    if device.type != "cuda":
        return _Backends(host, host)
    # NCCL's watchdog would end the process, a minute after something has failed and without our reason. It does not
    # see what graphs launch either: `Ranks` watches the processes and how long steps take.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    torch.cuda.set_device(device)  # a thread has its own
    of_nccl = c10d.ProcessGroupNCCL.Options()
    of_nccl._timeout = timeout
    return _Backends(host, c10d.ProcessGroupNCCL(c10d.PrefixStore("tensors", store), rank, size, of_nccl))


def _wait(work: Any) -> None:
    """On the host for gloo; NCCL's calls wait on the stream, and may give nothing to wait for."""
    if work is not None:
        work.wait()


def _abort(backends: _Backends) -> None:
    backends.host.abort()
    if backends.tensors is not backends.host:
        # Its kernels end at once, but NCCL then waits until no graph holds any of its calls.
        threading.Thread(target=backends.tensors.abort, daemon=True).start()
