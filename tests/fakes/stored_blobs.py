"""Blobs of a store, put there as those who publish put them, and read as nobody but tests needs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from registry.store import Blob, Store


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def put(store: Store, content: bytes) -> Blob:
    return put_pieces(store, [content])


def put_pieces(store: Store, pieces: Iterable[bytes]) -> Blob:
    pieces = list(pieces)
    digest = digest_of(b"".join(pieces))
    with store.receive(digest, wait=True) as receiver:
        if not receiver.complete:
            for piece in pieces:
                receiver.write(piece)
            receiver.finish()
    return store.get(digest)


def is_whole(blob: Blob) -> bool:
    """Whether its bytes are those of its name."""
    return digest_of(blob.path.read_bytes()) == blob.digest
