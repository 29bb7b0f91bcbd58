"""What `python -m registry` does, as functions that return plain values; `__main__` parses and prints.

`catalog` is None where there is no database yet, which reads as an empty one.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from registry.catalog import Catalog, ModelRecord
from registry.checkpoint import Checkpoint, read_checkpoint
from registry.checkpoint_family import checkpoint_family, require_served
from registry.digest import Progress, base_digest, header_digest
from registry.errors import CheckpointError, InvalidRequestError, ModelNotFoundError
from registry.families import families
from registry.fetch import cached_checkpoint
from registry.known_models import known_models
from registry.names import is_name, parse_name


def list_registry(catalog: Catalog | None) -> dict[str, list[dict[str, Any]]]:
    """Everything: `models` and `aliases` of the catalog, `known_models` and `families` of the data files."""
    return {
        "models": [asdict(record) for record in catalog.list_models()] if catalog else [],
        "aliases": [
            {"name": f"{alias.name}@{alias.alias}", "target": str(alias.target), "updated_at": alias.updated_at}
            for alias in (catalog.list_aliases() if catalog else [])
        ],
        "known_models": [asdict(model) for model in known_models().values()],
        "families": [asdict(family) for family in families().values()],
    }


def show(name: str, catalog: Catalog | None, cache_dir: Path) -> dict[str, Any]:
    """All that is known under `name`: a model of the catalog, a known model or a family; several may share it.

    Raises:
        ModelNotFoundError: nothing has that name.
    """
    found: dict[str, Any] = {}
    record = _find_record(name, catalog)
    if record is not None:
        found["model"] = asdict(record)
    known = known_models().get(name)
    if known is not None:
        cached = cached_checkpoint(known, cache_dir)
        found["known_model"] = asdict(known) | {"cached": None if cached is None else str(cached)}
    family = families().get(record.family if record else known.family if known else name)
    if family is not None:
        found["family"] = asdict(family)
    if not found:
        raise ModelNotFoundError(f"nothing is called {name[:80]!a}; `python -m registry list` shows what there is")
    return found


def add(
    name: str,
    path: Path,
    catalog: Catalog,
    *,
    actor: str,
    source: str | None = None,
    chat_template: str | None = None,
    max_model_len: int | None = None,
    progress: Progress | None = None,
) -> ModelRecord:
    """Check the checkpoint at `path` and put it into the catalog as `name`, with its family and base digest.

    Raises:
        InvalidRequestError: `name` does not fit the grammar.
        CheckpointError: the files are missing or damaged.
        UnsupportedModelError: the engine would not serve it.
    """
    if not is_name(name):
        parsed = parse_name(name)
        raise InvalidRequestError(f"add {parsed.name} itself: an alias or digest of it comes afterwards", param="name")
    checkpoint = read_checkpoint(path.resolve())
    family = checkpoint_family(checkpoint)
    require_served(family)
    return catalog.upsert_model(
        name,
        family=family.name,
        digest=base_digest(checkpoint, progress),
        path=str(checkpoint.path),
        source=source,
        chat_template=chat_template,
        max_model_len=max_model_len,
        actor=actor,
    )


def verify(
    target: str, catalog: Catalog | None, cache_dir: Path, *, full: bool, progress: Progress | None = None
) -> dict[str, Any]:
    """Check the checkpoint of a path, of a model of the catalog or of a fetched known model, in that order.

    Headers and sizes always; with `full` every byte, against the digests that are recorded for it.

    Raises:
        ModelNotFoundError: `target` is neither a path nor a name with a checkpoint on this machine.
        CheckpointError: files are missing or damaged, or the digest differs from the recorded one.
        UnsupportedModelError: the family is unknown.
    """
    path, expected = _locate(target, catalog, cache_dir)
    checkpoint = read_checkpoint(path)
    report: dict[str, Any] = {
        "path": str(path),
        "format": checkpoint.format,
        "family": checkpoint_family(checkpoint).name,
        "num_files": len(checkpoint.files),
        "num_tensors": len(checkpoint.tensors),
        "num_bytes": _num_bytes(checkpoint),
        "header_digest": None if checkpoint.format == "bin" else header_digest(checkpoint),
        "expected_digest": expected,
        "digest": None,
        "verdict": "headers and sizes are right; --full reads every byte",
    }
    if full:
        report["digest"] = base_digest(checkpoint, progress)
        if expected is not None and report["digest"] != expected:
            raise CheckpointError(
                f"{path} has the digest {report['digest']} but {expected} is recorded: it was changed or damaged; "
                "fetch it again, or `add` it again if the change is meant"
            )
        matches = "and the digest is the recorded one" if expected else "but no digest is recorded to compare with"
        report["verdict"] = f"every byte was read, {matches}"
    return report


def _locate(target: str, catalog: Catalog | None, cache_dir: Path) -> tuple[Path, str | None]:
    """The checkpoint and the digest that is recorded for it, if any."""
    path = Path(target)
    if path.exists():
        resolved = str(path.resolve())
        records = catalog.list_models() if catalog else []
        return path.resolve(), next((record.digest for record in records if record.path == resolved), None)
    record = _find_record(target, catalog)
    if record is not None and record.path:  # else only a worker told of it, and its path is that worker's affair
        return Path(record.path), record.digest
    known = known_models().get(target)
    cached = None if known is None else cached_checkpoint(known, cache_dir)
    if known is not None and cached is not None:
        return cached, known.digest
    if known is not None and known.fetch is not None:
        raise ModelNotFoundError(f"{target} is not fetched yet; run `python -m registry fetch {target}`")
    if record is not None:
        raise ModelNotFoundError(f"{target} is served by a worker, but where its files are is not recorded here")
    raise ModelNotFoundError(f"{target[:200]!a} is no path, and no model of the catalog has that name")


def _find_record(name: str, catalog: Catalog | None) -> ModelRecord | None:
    if catalog is None:
        return None
    try:
        record = catalog.resolve(parse_name(name))
    except (ModelNotFoundError, InvalidRequestError):
        # The caller has other places to look; it names them all in its own error.
        return None
    return record if isinstance(record, ModelRecord) else None


def _num_bytes(checkpoint: Checkpoint) -> int:
    return sum(file.stat().st_size for file in checkpoint.files)
