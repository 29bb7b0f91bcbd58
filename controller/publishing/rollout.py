"""What the workers think of a version while it is rolled out. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence

from controller.variants.directory import OnWorker
from registry.catalog import VersionState
from registry.errors import ClientError, ProbeFailedError


def judge(on_workers: Sequence[OnWorker]) -> tuple[VersionState, str | None]:
    """The state of a version, and why it failed.

    It has failed when its probe has on any worker, or when every worker has refused it for a reason that lies in it; a
    worker that breaks off, or has no room on its disk, is asked again. It is ready when no worker is still at it and
    one at least can serve it.

    Args:
        on_workers: the version on each worker of its base model.
    """
    present = [on for on in on_workers if on.worker.state == "ready"]
    unfit = [on for on in present if isinstance(on.error, ProbeFailedError)]
    refused = [on for on in present if not on.usable and isinstance(on.error, ClientError)]
    if not unfit and len(refused) == len(present):
        unfit = refused
    if unfit:
        return "failed", "; ".join(_reason(on) for on in unfit)
    settled = all(on.usable or on.error is not None for on in present)
    return ("ready" if settled and any(on.usable for on in present) else "rolling_out"), None


def _reason(on: OnWorker) -> str:
    assert on.error is not None
    return f"worker {on.worker.worker_id}: {on.error.message} ({on.error.code})"
