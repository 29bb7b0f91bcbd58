"""`system_fingerprint` of an answer: which weights computed it. Pure Python.

the base model            fp_ and the first 12 hex digits of its weights' digest
one fine-tune             the same of the fine-tune's own digest, which GET /admin/variants shows
a combination             the same of SHA-256 over the digests and scales of its parts
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from controller.protocol import LoraWeight
from controller.workers import Worker

_NUM_DIGITS = 12


def fingerprint(worker: Worker, model: str, loras: Sequence[LoraWeight]) -> str | None:
    """Of `model` with `loras` on `worker`; None: a digest is not known."""
    if not loras:
        return _short(next((served.digest for served in worker.models if served.name == model), None))
    digests = [status.digest if (status := worker.variants.get(lora.name)) else None for lora in loras]
    if len(loras) == 1 and loras[0].scale == 1.0:
        return _short(digests[0])
    if None in digests:
        return None
    parts = [f"{digest} {lora.scale!r}\n" for digest, lora in zip(digests, loras, strict=True)]
    return _short(hashlib.sha256("".join(sorted(parts)).encode()).hexdigest())


def _short(digest: str | None) -> str | None:
    return None if digest is None else f"fp_{digest.removeprefix('sha256:')[:_NUM_DIGITS]}"
