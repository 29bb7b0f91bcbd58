"""What the engine needs of a GPU beside tensors on it: memory, captured graphs, whether it works. A seam for tests."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from model_worker.engine.cuda_capture import CudaCapture
from model_worker.engine.decode_graphs import Capture
from model_worker.engine.gpu_memory import CudaMemory, DeviceMemory
from model_worker.engine.layers.attention import ForwardContext


class Accelerator(Protocol):
    """Attributes:
    memory: of the device.
    """

    @property
    def memory(self) -> DeviceMemory: ...

    def active(self) -> AbstractContextManager[object]:
        """What is launched within goes to this device; for each thread that launches."""
        ...

    def capture(self, context: ForwardContext) -> Capture:
        """Of the steps of the model that has this context."""
        ...

    def has_failed(self) -> bool:
        """Whether it computes nothing any more in this process; waits for what was launched."""
        ...


class CudaAccelerator:
    """See Accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.memory = CudaMemory(device)

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device)

    def capture(self, context: ForwardContext) -> Capture:
        return CudaCapture()

    def has_failed(self) -> bool:
        """After an access to memory that is not there, for one, CUDA answers everything with the same error."""
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return True
        return False
