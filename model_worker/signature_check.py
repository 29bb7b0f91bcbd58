"""What the operator's policy says to a fine-tune that is not signed with one of the trusted keys."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from model_worker.config import SignatureConfig
from registry.errors import SignatureError

logger = logging.getLogger(__name__)

SignatureCheck = Callable[[Path], None]


def make_signature_check(config: SignatureConfig) -> SignatureCheck | None:
    """A function that reads a fine-tune's directory and raises SignatureError if it may not be served; None: all may.

    It blocks while it reads, and may be called from any thread.

    Raises:
        InvalidRequestError: a file holds no public key, or the packages for signatures are not installed.
    """
    if config.policy == "off":
        return None
    # The packages that it needs are optional.
    from delta.signature import SignatureVerifier

    verifier = SignatureVerifier(config.keys)

    def check(directory: Path) -> None:
        try:
            key = verifier.verify(directory)
        except SignatureError as error:
            if config.policy == "require":
                raise
            logger.warning("%s; --signatures warn lets it be served all the same", error.message)
        else:
            logger.info("%s is signed with the key of %s", directory, key)

    return check
