from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from delta.__main__ import main
from delta.delta_config import read_delta_config
from delta.imports.bitdelta import BitDeltaChanges
from registry.errors import CheckpointError
from tests.delta.models import save

NUM_ROWS, NUM_COLUMNS = 5, 64


def _packed(positive: Tensor) -> Tensor:
    """As BitDelta packs the transposed mask: 32 rows of it in one number."""
    rows = positive.T.long().reshape(NUM_COLUMNS // 32, 32, NUM_ROWS)
    return (rows << torch.arange(32)[None, :, None]).sum(1).to(torch.int32)


def _diff() -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    positive = torch.rand(NUM_ROWS, NUM_COLUMNS) < 0.5
    diff = {
        "m.up_proj.mask": _packed(positive),
        "m.up_proj.coeff": torch.nn.Parameter(torch.tensor(0.25)),
        "m.down_proj.A": torch.randn(5, 2).bfloat16(),
        "m.down_proj.B": torch.randn(2, 64).bfloat16(),
        "embed.weight": torch.randn(9, 4).half(),
        "norm.weight": torch.full((4,), 2.0),
    }
    return diff, positive.float() * 2 - 1


def _base(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    weights = {
        "m.up_proj.weight": torch.randn(NUM_ROWS, NUM_COLUMNS),
        "m.down_proj.weight": torch.randn(64, 5),
        "embed.weight": torch.randn(7, 4).half(),
        "norm.weight": torch.ones(4),
        "same.weight": torch.ones(3, 3),
    }
    return save(tmp_path / "base", weights)


def test_imported_and_applied(tmp_path: Path) -> None:
    diff, signs = _diff()
    base = _base(tmp_path)
    torch.save(diff, tmp_path / "diff.pt")
    flags = ["--base", str(base), "--out", str(tmp_path / "delta")]
    assert main(["import", "bitdelta", str(tmp_path / "diff.pt"), *flags]) == 0
    config = read_delta_config(tmp_path / "delta")
    assert {name: tensor.codec for name, tensor in config.tensors.items()} == {
        "m.up_proj.weight": "sign",
        "m.down_proj.weight": "lowrank",
        "embed.weight": "replace+rows" if config.tensors["embed.weight"].codec == "replace+rows" else "lossless+rows",
        "norm.weight": "replace",
    }
    delta = ["--base", str(base), "--delta", str(tmp_path / "delta"), "--out", str(tmp_path / "model")]
    assert main(["apply", *delta]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "model"))
    assert torch.equal(after["m.up_proj.weight"], before["m.up_proj.weight"] + 0.25 * signs)
    product = (diff["m.down_proj.A"].float() @ diff["m.down_proj.B"].float()).T
    torch.testing.assert_close(
        after["m.down_proj.weight"] - before["m.down_proj.weight"], product, rtol=0.02, atol=0.02
    )
    assert torch.equal(after["embed.weight"], diff["embed.weight"])
    assert torch.equal(after["norm.weight"], diff["norm.weight"])
    assert torch.equal(after["same.weight"], before["same.weight"])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    diff, _ = _diff()
    weight = torch.zeros(NUM_ROWS, NUM_COLUMNS)
    for damaged, message in (
        ({**diff, "m.up_proj.mask": diff["m.up_proj.mask"][:1]}, "is it its base"),
        ({**diff, "m.up_proj.mask": diff["m.up_proj.mask"].long()}, "int32"),
        ({key: value for key, value in diff.items() if "coeff" not in key}, "lacks"),
        ({**diff, "m.up_proj.coeff": torch.tensor(float("nan"))}, "not finite"),
    ):
        torch.save(damaged, tmp_path / "diff.pt")
        with pytest.raises(CheckpointError, match=message):
            BitDeltaChanges(tmp_path / "diff.pt").change("m.up_proj.weight", weight)
    torch.save(diff, tmp_path / "diff.pt")
    with pytest.raises(CheckpointError, match="does not have"):
        BitDeltaChanges(tmp_path / "diff.pt").check_all_used()


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "diff.pt"
    with pytest.raises(CheckpointError, match="cannot be read"):
        BitDeltaChanges(file)
    torch.save(_diff()[0], file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="no whole file"):
        BitDeltaChanges(file)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="tensors by name"):
        BitDeltaChanges(file)
    torch.save({"a": Path}, file)  # code is not run
    with pytest.raises(CheckpointError, match="no whole file"):
        BitDeltaChanges(file)
