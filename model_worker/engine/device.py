"""Where a model is computed."""

from __future__ import annotations

import re

import torch

from registry.errors import InvalidRequestError

_CUDA = re.compile(r"cuda(:(?P<index>\d+))?")


def choose_device(name: str, *, num_gpus: int | None = None) -> torch.device:
    """The device of a `--device`: auto (a GPU, where torch sees one), cpu, cuda or cuda:N.

    Args:
        num_gpus: that torch sees; None: ask it.

    Raises:
        InvalidRequestError: there is no such device.
    """
    if name == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    if name == "auto":
        return torch.device("cuda", 0) if num_gpus else torch.device("cpu")
    match = _CUDA.fullmatch(name)
    if match is None:
        raise InvalidRequestError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}.", param="device")
    index = int(match["index"] or 0)
    if num_gpus == 0:
        why = (
            "this torch is built without CUDA; install one that is built with it"
            if torch.version.cuda is None
            else "torch sees no GPU; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        )
        raise InvalidRequestError(f"--device {name} is not possible: {why}, or use --device cpu.", param="device")
    if index >= num_gpus:
        raise InvalidRequestError(
            f"--device {name} is not possible: torch sees {num_gpus} GPU{'s' if num_gpus > 1 else ''}, "
            f"cuda:0 to cuda:{num_gpus - 1}.",
            param="device",
        )
    return torch.device("cuda", index)
