"""Publish a fine-tune: upload its files, make a version of them, wait until workers serve it, move an alias to it.

Each step can be repeated: files that are there are not sent again, the same files are the same version, and an alias is
moved only when the version is ready. So a publisher that was killed is simply started again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

from registry.digest import Progress
from registry.errors import CheckpointError, OverloadedError, RootgraftError, UpstreamError, error_from_code
from registry.progress import Report
from registry.published_files import PublishedFiles

SIGNATURE_FILE = "model.sig"
"""Among the files of a fine-tune, if it is signed (delta/signature.py)."""

PART_BYTES = 256 << 20  # of an upload, so that what breaks off costs no more than one
_CHUNK_BYTES = 4 << 20
_POLL_S = 0.2
_RETRIES = 5  # of a part that is refused
_ABSENT_S, _AWAY_S = 5.0, 120.0  # how long a controller is waited for that has not answered yet, and one that has
_TIMEOUT_S = (10.0, 300.0)  # to connect, and between two signs of life

ProgressBar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True, slots=True)
class Publication:
    """What is to be published, and under which name.

    Attributes:
        name: of the release.
        directory: with the fine-tune's files: a delta, or a LoRA adapter.
        parent: the served name of its base; None: the controller finds it by its digest.
        base_digest: of the base that it was made for, where that is known.
        quality: what its maker measured.
        alias: to move when workers serve it; None: none.
        canary: share of the alias's requests that it gets, instead of all of them.
    """

    name: str
    directory: Path
    parent: str | None = None
    base_digest: str | None = None
    quality: Mapping[str, Any] | None = None
    alias: str | None = "prod"
    canary: float | None = None


def publish(
    what: Publication,
    url: str,
    *,
    key: str | None,
    timeout_s: float,
    report: Report,
    progress_bar: ProgressBar,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Publish, and return when the version answers under its name (name@vN, which is returned).

    Args:
        url: of the controller.
        key: an admin key; None: it asks for none.
        timeout_s: how long the workers may take.

    Raises:
        CheckpointError: the directory holds no fine-tune, or a file cannot be read.
        RootgraftError: the controller refuses it, or the workers cannot serve it; what was served before goes on.
    """
    with requests.Session() as session:
        if key is not None:
            session.headers["authorization"] = f"Bearer {key}"
        controller = _Controller(session, url.rstrip("/"), report, sleep, clock)
        files = find_files(what.directory)
        with progress_bar("reading") as progress:
            digests = _digests(files, progress)
        _upload(controller, files, digests, report, progress_bar)
        version = controller.call("POST", f"/admin/releases/{quote(what.name)}/versions", _version_body(what, digests))
        name = str(version["name"])
        report(f"{name} is version {version['number']} for {version['parent']}")
        path = f"/admin/releases/{quote(what.name)}/versions/{version['number']}"
        _wait(controller, path, name, report, deadline=clock() + timeout_s, sleep=sleep, clock=clock)
        if what.alias is not None:
            _point(controller, what, what.alias, int(version["number"]), report)
        return name


def find_files(directory: Path) -> dict[str, Path]:
    """The files of a fine-tune by their names in it: what is needed to serve it, whatever else lies there.

    Raises:
        CheckpointError: it holds neither a delta nor a LoRA adapter.
    """
    if (directory / "delta_config.json").is_file():
        found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        return {name: path for name, path in sorted(found.items()) if not name.startswith(".")}
    if not (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} is neither a delta (delta_config.json) nor an adapter (adapter_config.json)"
        )
    # The trainer's own files, such as checkpoints and optimizer states, stay where they are.
    patterns = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt", SIGNATURE_FILE)
    found = {path.name: path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return dict(sorted(found.items()))


class _Controller:
    """Calls of the admin API, tried again while the controller is away."""

    def __init__(
        self,
        session: requests.Session,
        url: str,
        report: Report,
        sleep: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._url = url
        self._report = report
        self.sleep = sleep
        self._clock = clock
        self._patience_s = _ABSENT_S

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Raises: RootgraftError, the controller's own or UpstreamError."""
        answer = self.request(method, path, lambda: {"json": body} if body is not None else {})
        if answer.status_code >= 400:
            raise _error_of(answer)
        return dict(answer.json()) if answer.content else {}

    def request(self, method: str, path: str, arguments: Callable[[], dict[str, Any]] = dict) -> requests.Response:
        """The answer, whatever its status. All calls can be repeated, so one without an answer is.

        Args:
            arguments: of the request, made again for each try.
        """
        pause_s, given_up_at = 0.5, self._clock() + self._patience_s
        while True:
            try:
                answer = self._session.request(
                    method, self._url + path, timeout=_TIMEOUT_S, allow_redirects=False, **arguments()
                )
            except requests.RequestException as error:
                if self._clock() >= given_up_at or isinstance(error, requests.exceptions.InvalidURL):
                    raise UpstreamError(
                        f"the controller at {self._url} cannot be reached: {_reason(error)}; what was published "
                        "before is as it was; run the same command again when the controller is back"
                    ) from error
                if pause_s == 0.5:
                    self._report(f"the controller at {self._url} is away; trying on")
                self.sleep(pause_s)
                pause_s = min(pause_s * 2, 5.0)
            else:
                self._patience_s = _AWAY_S
                return answer


def _digests(files: Mapping[str, Path], progress: Progress) -> dict[str, str]:
    try:
        total = sum(path.stat().st_size for path in files.values())
        done, digests = 0, {}
        for name, path in files.items():
            hasher = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    hasher.update(chunk)
                    done += len(chunk)
                    progress(done, total)
            digests[name] = f"sha256:{hasher.hexdigest()}"
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror})") from error
    return digests


def _upload(
    controller: _Controller,
    files: Mapping[str, Path],
    digests: Mapping[str, str],
    report: Report,
    progress_bar: ProgressBar,
) -> None:
    by_digest = {digests[name]: path for name, path in files.items()}
    offsets = {digest: _offset(controller, digest) for digest in by_digest}
    lacking = {digest: path for digest, path in by_digest.items() if offsets[digest] is not None}
    total = sum(path.stat().st_size for path in lacking.values())
    done = sum(offset or 0 for offset in offsets.values())
    there = len(by_digest) - len(lacking)
    count = f"{len(lacking)} file{'' if len(lacking) == 1 else 's'}"
    report(f"uploading {count}, {(total - done) / 1e6:.1f} MB; {there} are there already")
    with progress_bar("uploading") as progress:
        for digest, path in lacking.items():
            for num_bytes in _send(controller, digest, path, offsets[digest] or 0):
                done += num_bytes
                progress(min(done, total), total)


def _offset(controller: _Controller, digest: str) -> int | None:
    """How much of a file the controller has; None: all of it."""
    answer = controller.request("HEAD", f"/admin/blobs/{digest}")
    if answer.status_code == 200:
        return None
    if answer.status_code != 404 or "upload-offset" not in answer.headers:
        # The answer to HEAD has no body that could say why; that to an upload has.
        raise _error_of(controller.request("PUT", f"/admin/blobs/{digest}"))
    return int(answer.headers["upload-offset"])


def _send(controller: _Controller, digest: str, path: Path, offset: int) -> Iterator[int]:
    """Send a file from `offset` on, in parts; yields the bytes of each."""
    length = path.stat().st_size
    failures = 0
    while True:
        answer = controller.request("PUT", f"/admin/blobs/{digest}", lambda at=offset: _part(path, at, length))  # type: ignore[misc]
        if answer.status_code in (200, 201):
            yield length - offset
            return
        if answer.status_code == 202:
            arrived = int(answer.headers["upload-offset"])
            yield arrived - offset
            offset = arrived
            continue
        error = _error_of(answer)
        failures += 1
        # Somebody else sends it, or a part that broke off has come after all: ask how much there is.
        current = _offset(controller, digest)
        if current is None:
            yield length - offset
            return
        if failures > _RETRIES or (current == offset and not isinstance(error, OverloadedError)):
            raise error
        if isinstance(error, OverloadedError):
            controller.sleep(1.0)
        yield current - offset
        offset = current


def _part(path: Path, offset: int, length: int) -> dict[str, Any]:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(PART_BYTES)
    headers = {
        "upload-offset": str(offset), "upload-length": str(length), "content-type": "application/octet-stream",
    }  # fmt: skip
    return {"data": data, "headers": headers}


def _version_body(what: Publication, digests: Mapping[str, str]) -> dict[str, Any]:
    PublishedFiles(digests)
    body: dict[str, Any] = {"files": dict(digests)}
    for key, value in (("parent", what.parent), ("base_digest", what.base_digest), ("quality", what.quality)):
        if value is not None:
            body[key] = value
    return body


def _wait(
    controller: _Controller,
    path: str,
    name: str,
    report: Report,
    *,
    deadline: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """Until the version is ready; says what each worker does meanwhile."""
    said: dict[str, str] = {}
    while True:
        answer = controller.call("GET", path)
        for worker in answer["workers"]:
            text = _on_worker(worker)
            if said.get(worker["worker_id"]) != text:
                said[worker["worker_id"]] = text
                report(f"worker {worker['worker_id']}: {text}")
        state = answer["version"]["state"]
        if state == "ready":
            return
        if state == "failed":
            raise CheckpointError(f"{name} cannot be served: {answer['version']['error']}")
        if clock() >= deadline:
            waiting = "; ".join(f"{worker}: {text}" for worker, text in said.items()) or "no worker serves its base"
            raise UpstreamError(f"{name} is not served yet ({waiting}); run the same command again to go on waiting")
        sleep(_POLL_S)


def _on_worker(worker: Mapping[str, Any]) -> str:
    if worker["usable"]:
        return "serves it"
    if worker["error"] is not None:
        return f"cannot serve it: {worker['error']['message']}"
    return "is loading it"


def _point(controller: _Controller, what: Publication, alias: str, number: int, report: Report) -> None:
    path = f"/admin/releases/{quote(what.name)}/aliases/{quote(alias)}"
    if what.canary is not None:
        release = controller.call("GET", f"/admin/releases/{quote(what.name)}")
        current = next((found["version"] for found in release["aliases"] if found["alias"] == alias), None)
        if current not in (None, number):
            controller.call("PUT", f"{path}/canary", {"version": number, "weight": what.canary})
            report(f"{what.name}@{alias} gives v{number} {what.canary:.0%} of its requests")
            return
        report(f"{what.name}@{alias} has no other version to be a canary beside")
    controller.call("PUT", path, {"version": number})
    report(f"{what.name}@{alias} is v{number}")


def _error_of(answer: requests.Response) -> RootgraftError:
    try:
        error = json.loads(answer.content)["error"]
        return error_from_code(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return UpstreamError(
            f"what is at {answer.url} answered {answer.status_code} ({answer.text[:200]!r}), as no controller does; "
            "check the URL"
        )


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "it did not answer in time"
    first: BaseException = error  # of those that were raised one after the other; the last ones quote all others
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    if isinstance(first, OSError) and first.strerror:
        return first.strerror
    return str(error).splitlines()[0][:200]
