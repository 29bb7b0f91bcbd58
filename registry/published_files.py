"""The files of a published fine-tune: their names below its directory, each with the digest of its bytes.

    kind             by the description among them: delta_config.json or adapter_config.json
    artifact digest  of a delta: SHA-256 of delta_config.json, which names all that belongs to it
                     of a LoRA adapter: the manifest digest
    manifest digest  SHA-256("rootgraft files 1\\n" ‖ JSON of the list [[name, digest], …] sorted by name)

JSON is written without spaces and in ASCII. Workers keep the files in a directory that is named by the manifest digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from registry.errors import InvalidRequestError
from registry.names import is_digest

VariantKind = Literal["lora", "delta"]

MAX_FILES = 256
_MAX_NAME_LENGTH = 200
_DELTA_CONFIG, _LORA_CONFIG = "delta_config.json", "adapter_config.json"
_PREFIX = b"rootgraft files 1\n"
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._ -]*"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,3}}")


@dataclass(frozen=True, slots=True)
class PublishedFiles:
    """Attributes:
        digests: "sha256:…" by name; a name is a relative path with /, of at most four segments.

    Raises:
        InvalidRequestError: a name or a digest does not fit the grammar, too many files, or none says what they are.
    """

    digests: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(self.digests) > MAX_FILES:
            raise InvalidRequestError(
                f"a fine-tune has at most {MAX_FILES} files, not {len(self.digests)}", param="files"
            )
        for name, digest in self.digests.items():
            if len(name) > _MAX_NAME_LENGTH or _NAME.fullmatch(name) is None:
                raise InvalidRequestError(
                    f"{name[:80]!a} cannot be a published file: a name is letters, digits and . _ - in up to four "
                    "segments joined by /, none of which begins with a dot",
                    param="files",
                )
            if not is_digest(digest):
                raise InvalidRequestError(
                    f"{digest[:80]!a} is no digest: give sha256: and 64 lower-case hex digits", param="files"
                )
        if _DELTA_CONFIG not in self.digests and _LORA_CONFIG not in self.digests:
            raise InvalidRequestError(
                f"these files are no fine-tune: there is neither {_DELTA_CONFIG} nor {_LORA_CONFIG} among them",
                param="files",
            )

    @property
    def kind(self) -> VariantKind:
        return "delta" if _DELTA_CONFIG in self.digests else "lora"

    @property
    def artifact_digest(self) -> str:
        """The identity of the fine-tune ("sha256:…")."""
        return self.digests[_DELTA_CONFIG] if self.kind == "delta" else self.manifest_digest

    @property
    def manifest_digest(self) -> str:
        """The identity of exactly these files ("sha256:…")."""
        text = json.dumps(sorted(self.digests.items()), separators=(",", ":"), ensure_ascii=True)
        return f"sha256:{hashlib.sha256(_PREFIX + text.encode('ascii')).hexdigest()}"
