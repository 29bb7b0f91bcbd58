"""What clients are told in place of errors about a variant's files.

Those name paths and tensors of the workers' machines, which is for operators: they see them in GET /admin/variants and
in the log.
"""

from __future__ import annotations

from collections.abc import Sequence

from controller.protocol import ErrorEvent
from registry.errors import CheckpointError, RootgraftError, UnsupportedModelError, UpstreamError

_ABOUT_FILES = (CheckpointError, UnsupportedModelError)
_CODES = frozenset(kind.code for kind in _ABOUT_FILES)


def hide_files(error: RootgraftError, variants: Sequence[str]) -> RootgraftError:
    """`error` of a request for `variants`, as its client may see it."""
    return UpstreamError(_message(variants)) if isinstance(error, _ABOUT_FILES) else error


def hide_files_of_event(event: ErrorEvent, variants: Sequence[str]) -> ErrorEvent:
    """The same for the event that ends a stream."""
    return ErrorEvent(code=UpstreamError.code, message=_message(variants)) if event.code in _CODES else event


def _message(variants: Sequence[str]) -> str:
    return f"the files of {' or '.join(variants)} cannot be used; an operator finds the reason in GET /admin/variants"
