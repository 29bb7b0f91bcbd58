"""The files of published versions on this machine: fetched from the controller once, kept under their digests.

    cache_dir/store/…                          the files as blobs, see registry.store
    cache_dir/variants/…64 hex digits/NAME     a version's directory, named by its manifest digest: links to blobs
    cache_dir/variants/.lock                   shared while a version is fetched; alone while others are removed

All workers of a machine share them. A directory appears complete or not at all, and is found again after a restart,
without the controller. Whoever uses one has a shared lock on it, which goes with the process, however that ends; one
that nobody uses and the catalog does not have is removed, with the blobs that no other directory links to.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import requests

from controller.protocol import WORKER_TOKEN_HEADER, ErrorEvent, VersionsReply
from registry.atomic_file import disk_errors, sync_directory
from registry.blob_receiver import BlobReceiver
from registry.errors import InvalidRequestError, PermissionDeniedError, RootgraftError, UpstreamError, error_from_code
from registry.published_files import PublishedFiles
from registry.store import Store

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = (5.0, 60.0)  # to connect, and between two pieces
_LIST_TIMEOUT_S = (5.0, 10.0)
_ABANDONED_S = 86400.0
_STAGING_PREFIX = ".tmp-"


class PublishedVariants:
    """Attributes:
    held: the directories that this process uses.
    """

    def __init__(self, cache_dir: Path, controller_url: str | None, worker_token: str | None) -> None:
        """Args:
        controller_url: None: this worker has no controller, so there is nobody to fetch from.
        """
        self._store = Store(cache_dir / "store")
        self._variants = cache_dir / "variants"
        self._controller_url = controller_url
        self._headers = {} if worker_token is None else {WORKER_TOKEN_HEADER: worker_token}
        self.held: dict[Path, int] = {}  # → the descriptor with the lock
        self._holding = threading.Lock()

    def path(self, files: PublishedFiles) -> Path:
        """Where a version's directory is, once it is there."""
        return self._variants / files.manifest_digest.removeprefix("sha256:")

    def fetch(self, files: PublishedFiles) -> Path:
        """The directory with these files, held until it is released; blocks while they are fetched.

        Raises:
            UpstreamError: the controller cannot be reached, or broke off; what has come is kept for the next time.
            ModelNotFoundError: the controller does not have a file.
            InternalError: the disk is full, or the cache cannot be written.
        """
        directory = self.path(files)
        with disk_errors(self._variants):
            self._variants.mkdir(parents=True, exist_ok=True)
            changing = _locked(self._variants / ".lock", fcntl.LOCK_SH)
        try:
            if not directory.is_dir():
                self._store.remove_abandoned(_ABANDONED_S)
                for digest in sorted(set(files.digests.values())):
                    self._fetch(digest)
                with disk_errors(self._variants):
                    self._link(files, directory)
            with self._holding:
                if directory not in self.held:
                    self.held[directory] = _locked(directory, fcntl.LOCK_SH)
        finally:
            os.close(changing)
        return directory

    def release(self, directories: Iterable[Path]) -> None:
        """This process does not use them any more, nor does it fetch them."""
        for directory in directories:
            os.close(self.held.pop(directory))

    def clean(self) -> bool:
        """Remove what the catalog does not have and no worker of this machine uses; blocks.

        Returns:
            False: not now, because a version is being fetched, the controller is away, or the disk cannot be written.
        """
        if self._controller_url is None or not self._variants.is_dir():
            return True
        try:
            url = f"{self._controller_url.rstrip('/')}/internal/versions"
            with requests.get(url, headers=self._headers, timeout=_LIST_TIMEOUT_S, allow_redirects=False) as response:
                response.raise_for_status()
                published = VersionsReply.model_validate_json(response.content).manifest_digests
            alone = _locked(self._variants / ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (requests.RequestException, ValueError, BlockingIOError) as error:
            logger.debug("the cache of published versions is not cleaned now: %s", error)
            return False
        try:
            self._remove_all_but({digest.removeprefix("sha256:") for digest in published})
        except OSError as error:
            logger.warning("the cache of published versions cannot be cleaned: %s", error)
            return False
        finally:
            os.close(alone)
        return True

    def _remove_all_but(self, published: Collection[str]) -> None:
        """While nobody fetches anything."""
        removed: set[int] = set()  # inodes
        for directory in self._variants.iterdir():
            if directory.name in published or not directory.is_dir() or _is_used(directory):
                continue
            removed.update(path.stat().st_ino for path in directory.rglob("*"))
            doomed = self._variants / f"{_STAGING_PREFIX}{directory.name.removeprefix(_STAGING_PREFIX)}"
            directory.rename(doomed)
            shutil.rmtree(doomed)
            logger.info("removed the files of a version that is gone: %s", directory.name)
        for blob in list(self._store.blobs()):
            status = blob.path.stat()
            # One that nothing links to may belong to a version of which not all has come yet.
            is_old = time.time() - status.st_mtime > _ABANDONED_S
            if status.st_nlink == 1 and (status.st_ino in removed or is_old):
                self._store.delete(blob.digest)

    def _link(self, files: PublishedFiles, directory: Path) -> None:
        staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=self._variants))
        try:
            for name, digest in files.digests.items():
                target = staging / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._store.get(digest).path, target)
            for made in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
                sync_directory(made)
            staging.chmod(0o755)
            try:
                staging.rename(directory)
            except OSError:
                if not directory.is_dir():  # else another worker was faster
                    raise
            sync_directory(self._variants)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _fetch(self, digest: str) -> None:
        if digest in self._store:
            return
        if self._controller_url is None:
            raise PermissionDeniedError("This worker has no controller to fetch published files from.", param="files")
        with self._store.receive(digest, wait=True) as receiver:
            if receiver.complete:
                return
            try:
                self._receive(self._controller_url, digest, receiver)
            except requests.RequestException as error:
                raise UpstreamError(f"{digest} cannot be fetched from the controller: {_reason(error)}") from error
            logger.info("fetched %s: %.1f MB", digest, receiver.num_bytes / 1e6)

    def _receive(self, controller_url: str, digest: str, receiver: BlobReceiver) -> None:
        headers = dict(self._headers)
        if receiver.num_bytes:
            headers["range"] = f"bytes={receiver.num_bytes}-"
        url = f"{controller_url.rstrip('/')}/internal/blobs/{digest}"
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S, allow_redirects=False) as response:
            if response.status_code == 416:  # what has come is longer than the whole
                receiver.give_up()
                raise UpstreamError(f"{digest} came differently before; it is fetched again")
            if response.status_code not in (200, 206):
                raise _refusal(response)
            if response.status_code == 200:
                receiver.restart()
            self._write(response.iter_content(_CHUNK_BYTES), receiver)

    def _write(self, chunks: Iterable[bytes], receiver: BlobReceiver) -> None:
        for chunk in chunks:
            receiver.write(chunk)
        try:
            receiver.finish()
        except InvalidRequestError as error:
            raise UpstreamError(f"The controller sent other bytes: {error.message}") from error


def _locked(path: Path, operation: int) -> int:
    """A descriptor with a lock on a directory, or on a file that is made for it. Raises BlockingIOError."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, operation)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_used(directory: Path) -> bool:
    """By any process."""
    try:
        os.close(_locked(directory, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        return True
    return False


def _refusal(response: requests.Response) -> RootgraftError:
    try:
        event = ErrorEvent.model_validate_json(response.content)
    except ValueError:
        return UpstreamError(f"The controller answered {response.status_code} to a request for a published file.")
    return error_from_code(event.code, event.message, param=event.param, retry_after_s=event.retry_after_s)


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "it did not answer in time"
    return "it cannot be reached" if isinstance(error, requests.ConnectionError) else f"{type(error).__name__}"
