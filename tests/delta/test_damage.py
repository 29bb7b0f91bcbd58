"""Whatever happens to the bytes of a delta, it is refused with an error of ours, or nothing that counts has changed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from delta.apply import apply_delta
from delta.codecs.policy import CodecPolicy
from delta.tensor_digest import tensor_digest
from delta.verify import verify_delta
from registry.errors import CheckpointError, RootgraftError
from tests.delta.models import base_weights, make, save

_POLICIES = [
    CodecPolicy("lossless"),
    CodecPolicy("sign", ("lowrank",), rank=2),
    CodecPolicy("ternary"),
    CodecPolicy("sparse"),
    CodecPolicy("dense"),
]
_VALUES: tuple[Any, ...] = (None, -1, 2**70, 1e400, "", "../x", "sha256:", [], {}, True, "BF16", [[]], "model.json")


@pytest.fixture(params=_POLICIES, ids=lambda policy: policy.codec)
def artifact(request: pytest.FixtureRequest, tmp_path: Path, base: Path) -> Path:
    weights = base_weights()
    for name in ("embed", "up", "down"):
        weights[name][::2] *= 1.5
    weights["embed"] = torch.cat([weights["embed"], torch.ones(2, 8).bfloat16()])
    weights["head"] = weights["up"] + 1
    make(base, save(tmp_path / "target", weights, generation_config="{}"), tmp_path / "artifact", request.param)
    return tmp_path / "artifact"


def test_bytes(tmp_path: Path, base: Path, artifact: Path) -> None:
    source = random.Random(0)
    for number in range(150):
        damaged = shutil.copytree(artifact, tmp_path / f"damaged{number}")
        file = damaged / source.choice(["delta_config.json", "delta.safetensors", "delta.safetensors"])
        content = bytearray(file.read_bytes())
        place = source.randrange(len(content))
        match source.randrange(4):
            case 0:
                content[place] ^= 1 << source.randrange(8)
            case 1:
                del content[place:]
            case 2:
                content[place:place] = source.randbytes(source.randint(1, 9))
            case 3:
                content[place] = source.choice(b'0123456789[]{}",:')
        file.write_bytes(content)
        _refused_or_the_same(base, damaged, artifact)


def test_fields(tmp_path: Path, base: Path, artifact: Path) -> None:
    """Values of other types and ranges anywhere in the description."""
    source = random.Random(1)
    for number in range(150):
        damaged = shutil.copytree(artifact, tmp_path / f"damaged{number}")
        file = damaged / "delta_config.json"
        document = json.loads(file.read_text())
        _change_one(document, source)
        file.write_text(json.dumps(document))
        _refused_or_the_same(base, damaged, artifact)


def _change_one(document: Any, source: random.Random) -> None:
    place = document
    while True:
        key = source.choice(list(place) if isinstance(place, dict) else range(len(place)))
        below = place[key]
        if isinstance(below, dict | list) and below and source.random() < 0.85:
            place = below
            continue
        if isinstance(place, dict) and source.random() < 0.2:
            place[source.choice(["x", "../x", "up", "rows"])] = place.pop(key)
        else:
            place[key] = source.choice(_VALUES)
        return


def _refused_or_the_same(base: Path, damaged: Path, artifact: Path) -> None:
    try:
        verify_delta(damaged, base)
    except RootgraftError:
        with pytest.raises(RootgraftError):
            apply_delta(base, damaged, damaged.with_suffix(".applied"))
        assert not damaged.with_suffix(".applied").exists()
        return
    old, new = (json.loads((path / "delta_config.json").read_text()) for path in (artifact, damaged))
    for label in ("license", "lineage", "quality", "probe", "target"):
        old.pop(label), new.pop(label)
    for of_base in (old["base"], new["base"]):
        of_base.pop("name"), of_base.pop("revision")
    for tensor in (*old["tensors"].values(), *new["tensors"].values()):
        tensor.pop("error")
    assert new == old


def test_a_stored_matrix_that_its_codec_does_not_write(tmp_path: Path, base: Path) -> None:
    """Digests that agree do not make it right: a hostile maker can compute them too."""
    weights = base_weights()
    weights["up"] *= 1.5
    make(base, save(tmp_path / "target", weights), tmp_path / "delta", CodecPolicy("sparse"))
    file = tmp_path / "delta" / "delta_config.json"

    parts = load_file(tmp_path / "delta" / "delta.safetensors")
    parts["up/0/columns"][0] = 99
    save_file(parts, tmp_path / "delta" / "delta.safetensors")
    document = json.loads(file.read_text())
    stored = document["tensors"]["up"]["terms"][0]["parts"]["columns"]
    stored["digest"] = tensor_digest(parts["up/0/columns"])
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="columns"):
        verify_delta(tmp_path / "delta", base)
