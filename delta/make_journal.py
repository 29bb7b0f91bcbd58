"""What a make has done so far, on disk: one that was killed goes on where it was.

    STAGING/
      journal.jsonl    a line with the inputs, then one for each tensor that is done
      parts.data       the parts of all their terms, one after the other

A line is written after the data that it names. What a power failure left of both is compared with the digests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from delta.artifact import TENSORS_FILE, part_key
from delta.codecs.codec import Term
from delta.delta_config import DeltaTensor, StoredPart
from delta.json_record import from_record, to_record
from registry.digest import tensor_hasher
from registry.safetensors_header import DTYPE_BITS

_JOURNAL = "journal.jsonl"
_DATA = "parts.data"
_COPY_BYTES = 4 << 20
_HEADER_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A tensor of the fine-tune that is done.

    Attributes:
        base_digest: of the base's tensor of this name, where it has one; 64 hex digits, as
        target_digest: of the fine-tune's.
        tensor: None: the base's own.
    """

    name: str
    base_digest: str | None
    target_digest: str
    tensor: DeltaTensor | None


class MakeJournal:
    """The state of one make in its staging directory; a context manager, which closes the files."""

    def __init__(self, directory: Path, inputs: object) -> None:
        """Go on with what is in `directory`, as far as it was made from the same `inputs` (JSON) and is whole."""
        self.entries: dict[str, JournalEntry] = {}
        self._directory = directory
        self._offsets: dict[str, tuple[int, StoredPart]] = {}
        self._data_bytes = 0
        first = _first_line(inputs)
        lines = self._whole_lines(first)
        self._data: BinaryIO = (directory / _DATA).open("ab")
        self._data.truncate(self._data_bytes)
        self._journal: BinaryIO = (directory / _JOURNAL).open("wb")
        self._journal.write("".join([first, *lines]).encode())
        self._journal.flush()

    def __enter__(self) -> MakeJournal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._data.close()
        self._journal.close()

    def add(self, entry: JournalEntry, terms: tuple[Term, ...]) -> None:
        """A tensor is done; `terms` are those of `entry.tensor`, with their data."""
        for term in terms:
            for _, part in sorted(term.parts.items()):
                self._data.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._data.flush()
        self._journal.write((json.dumps(to_record(entry)) + "\n").encode())
        self._journal.flush()
        self._remember(entry)

    def write_tensors(self, directory: Path) -> None:
        """delta.safetensors of all parts: those of wider numbers first, so that every one is aligned."""
        ordered = sorted(self._offsets.items(), key=lambda item: -DTYPE_BITS[item[1][1].dtype])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, (_, part) in ordered:
            offsets = [end, end := end + part.num_bytes]
            header[key] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // _HEADER_ALIGNMENT_BYTES) * _HEADER_ALIGNMENT_BYTES)
        with (directory / TENSORS_FILE).open("wb") as file, (self._directory / _DATA).open("rb") as data:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, (offset, part) in ordered:
                data.seek(offset)
                _copy(data, file, part.num_bytes)

    def _whole_lines(self, first: str) -> list[str]:
        """The lines after the first that can be believed; `entries` and `_data_bytes` are those of them."""
        journal, data = self._directory / _JOURNAL, self._directory / _DATA
        if not journal.is_file() or not data.is_file():
            return []
        lines = journal.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if not lines or lines[0] != first:
            return []
        believed = []
        with data.open("rb") as opened:
            for line in lines[1:]:
                try:
                    entry = from_record(JournalEntry, json.loads(line), "an entry of the journal")
                except ValueError:  # the last line that was being written
                    break
                if not line.endswith("\n") or not all(_is_whole(opened, part) for _, part in _parts(entry)):
                    break
                self._remember(entry)
                believed.append(line)
        return believed

    def _remember(self, entry: JournalEntry) -> None:
        self.entries[entry.name] = entry
        for key, part in _parts(entry):
            self._offsets[key] = (self._data_bytes, part)
            self._data_bytes += part.num_bytes


def is_begun(directory: Path, inputs: object) -> bool:
    """A make of these inputs was at work in `directory`."""
    try:
        with (directory / _JOURNAL).open(encoding="utf-8", errors="replace") as journal:
            return journal.readline() == _first_line(inputs)
    except OSError:
        return False


def _first_line(inputs: object) -> str:
    return json.dumps({"inputs": inputs}, sort_keys=True) + "\n"


def _parts(entry: JournalEntry) -> Iterator[tuple[str, StoredPart]]:
    """In the order of their data."""
    for index, term in enumerate(entry.tensor.terms if entry.tensor is not None else ()):
        for name, part in sorted(term.parts.items()):
            yield part_key(entry.name, index, name), part


def _is_whole(opened: BinaryIO, part: StoredPart) -> bool:
    """The next bytes are those of this part."""
    hasher = tensor_hasher(part.dtype, part.shape)
    remaining = part.num_bytes
    while remaining:
        chunk = opened.read(min(_COPY_BYTES, remaining))
        if not chunk:
            return False
        hasher.update(chunk)
        remaining -= len(chunk)
    return hasher.hexdigest() == part.digest


def _copy(source: BinaryIO, destination: BinaryIO, num_bytes: int) -> None:
    remaining = num_bytes
    while remaining:
        chunk = source.read(min(_COPY_BYTES, remaining))
        assert chunk  # this process has written it
        destination.write(chunk)
        remaining -= len(chunk)
