from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from registry.errors import InternalError, InvalidRequestError, OverloadedError
from registry.store import Store

DATA = b"0123456789" * 100
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


def partial_files(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".tmp-*")]


def test_a_blob_that_broke_off_is_continued(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.receive(DIGEST) as receiver:
        receiver.write(DATA[:300])
    assert DIGEST not in store
    with store.receive(DIGEST) as receiver:
        assert (receiver.num_bytes, receiver.complete) == (300, False)
        receiver.write(DATA[300:])
        receiver.finish()
        assert receiver.complete
    assert store.get(DIGEST).path.read_bytes() == DATA
    assert store.get(DIGEST).path.stat().st_mode & 0o777 == 0o444
    with store.receive(DIGEST) as receiver:
        assert receiver.complete
    assert partial_files(tmp_path) == []


def test_other_bytes_are_refused_and_given_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.receive(DIGEST) as receiver:
        receiver.write(DATA[:-1] + b"x")
        with pytest.raises(InvalidRequestError, match="hash to sha256:"):
            receiver.finish()
    assert DIGEST not in store
    assert partial_files(tmp_path) == []


def test_a_restart_forgets_what_had_come(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.receive(DIGEST) as receiver:
        receiver.write(b"wrong")
        receiver.restart()
        receiver.write(DATA)
        receiver.finish()
    assert store.get(DIGEST).path.read_bytes() == DATA


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.receive(DIGEST) as receiver:
        receiver.write(DATA[:300])
        receiver._file.close()
        receiver._file = open("/dev/full", "ab")  # noqa: SIM115
        with pytest.raises(InternalError, match="no space left"):
            receiver.write(DATA[300:])
        receiver._file.raw.close()  # type: ignore[attr-defined]
    assert partial_files(tmp_path) == []


def test_one_receives_and_the_others_wait_or_are_told_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found: list[bool] = []

    def wait_for_it() -> None:
        with store.receive(DIGEST, wait=True) as receiver:
            found.append(receiver.complete)

    with store.receive(DIGEST) as receiver:
        with pytest.raises(OverloadedError, match="being received already"), store.receive(DIGEST):
            pass
        waiting = [threading.Thread(target=wait_for_it) for _ in range(4)]
        for thread in waiting:
            thread.start()
        receiver.write(DATA)
        receiver.finish()
    for thread in waiting:
        thread.join()
    assert found == [True] * 4
    assert partial_files(tmp_path) == []


def test_a_killed_receiver_leaves_its_bytes_and_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from registry.store import Store\n"
        "with Store(Path(sys.argv[1])).receive(sys.argv[2]) as receiver:\n"
        "    receiver.write(b'0123456789' * 40); print('half', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), DIGEST], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = Store(tmp_path)
    with store.receive(DIGEST) as receiver:
        assert receiver.num_bytes == 400
        receiver.write(DATA[400:])
        receiver.finish()
    assert DIGEST in store
