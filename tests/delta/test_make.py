"""Making a delta: what is stored, in which form, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from delta.apply import apply_delta
from delta.codecs.policy import CodecPolicy
from delta.delta_config import DeltaConfig, delta_digest, read_delta_config
from delta.make import Calibration, Labels, make_delta
from delta.make_journal import MakeJournal
from delta.same_bits import same_bits
from registry.checkpoint import read_checkpoint
from registry.digest import base_digest
from registry.errors import CheckpointError, InternalError, InvalidRequestError, UnsupportedModelError
from tests.delta.models import DENSE, LOSSLESS, SIGN, base_weights, make, save, tuned_weights


def _given_back(base: Path, delta: Path, out: Path) -> dict[str, torch.Tensor]:
    apply_delta(base, delta, out)
    return load_file(out / "model.safetensors")


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


@pytest.mark.parametrize("policy", [LOSSLESS, DENSE, CodecPolicy("sparse")], ids=lambda policy: policy.codec)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_exact_codecs_give_the_fine_tune_back(tmp_path: Path, dtype: torch.dtype, policy: CodecPolicy) -> None:
    base, target = save(tmp_path / "base", base_weights(dtype)), save(tmp_path / "target", tuned_weights(dtype))
    config = make(base, target, tmp_path / "delta", policy)
    assert config.is_exact
    assert set(config.tensors) == {"up", "down", "norm", "table"}
    assert {name: config.tensors[name].codec for name in ("norm", "table")} == {"norm": "replace", "table": "replace"}
    assert all(tensor.error == 0 for tensor in config.tensors.values())
    assert _equal(_given_back(base, tmp_path / "delta", tmp_path / "back"), tuned_weights(dtype))


def test_dense_is_stored_in_the_narrowest_exact_dtype(tmp_path: Path, base: Path, target: Path) -> None:
    config = make(base, target, tmp_path / "delta", DENSE)
    assert config.tensors["up"].codec == "dense"
    assert config.tensors["up"].terms[0].parts["difference"].dtype == "BF16"
    assert load_file(tmp_path / "delta" / "delta.safetensors")["up/0/difference"].dtype == torch.bfloat16


def test_digests_are_those_of_the_registry(base: Path, target: Path, delta: Path) -> None:
    config = read_delta_config(delta)
    assert config.base.digest == base_digest(read_checkpoint(base))
    assert config.target.digest == config.result_digest == base_digest(read_checkpoint(target))


def test_a_lossy_delta_says_what_it_gives_back(tmp_path: Path, base: Path, target: Path) -> None:
    config = make(base, target, tmp_path / "delta", CodecPolicy("sign", ("lowrank",), rank=2))
    assert not config.is_exact
    assert 0 < config.tensors["down"].error < 1
    apply_delta(base, tmp_path / "delta", tmp_path / "back")
    assert base_digest(read_checkpoint(tmp_path / "back")) == config.result_digest
    assert base_digest(read_checkpoint(target)) == config.target.digest


def test_it_is_the_same_each_time(tmp_path: Path, base: Path, target: Path) -> None:
    make(base, target, tmp_path / "one", SIGN)
    make(base, target, tmp_path / "two", SIGN)
    assert delta_digest(tmp_path / "one") == delta_digest(tmp_path / "two")
    assert (tmp_path / "one" / "delta.safetensors").read_bytes() == (
        tmp_path / "two" / "delta.safetensors"
    ).read_bytes()


def test_files_and_labels_are_carried(tmp_path: Path, base: Path, target: Path, delta: Path) -> None:
    assert [file.name for file in (delta / "files").iterdir()] == ["tokenizer.json"]
    labels = Labels("small", "v1", "tuned", "apache-2.0", ("sha256:" + "0" * 64,))
    make_delta(base, target, tmp_path / "labelled", LOSSLESS, labels=labels, report=lambda line: None)
    config = read_delta_config(tmp_path / "labelled")
    assert (config.base.name, config.base.revision, config.target.name) == ("small", "v1", "tuned")
    assert (config.license, config.lineage.parents) == ("apache-2.0", ("sha256:" + "0" * 64,))


def test_sharded_inputs(tmp_path: Path, base: Path) -> None:
    weights = tuned_weights()
    target = tmp_path / "target"
    target.mkdir()
    shards = {"a.safetensors": ["up", "norm"], "b.safetensors": ["table", "down", "embed"]}
    for shard, names in shards.items():
        save_file({name: weights[name] for name in names}, target / shard)
    index = {name: shard for shard, names in shards.items() for name in names}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (target / "config.json").write_text("{}")
    make(base, target, tmp_path / "delta")
    assert _equal(_given_back(base, tmp_path / "delta", tmp_path / "back"), weights)


class TestVocabularies:
    """Tables with other rows, and tied weights."""

    def test_more_and_fewer_rows(self, tmp_path: Path, base: Path) -> None:
        for policy in (LOSSLESS, SIGN):
            for num_rows in (23, 15):
                weights = tuned_weights()
                weights["embed"] = torch.cat([weights["embed"] * 1.25, torch.ones(5, 8).bfloat16()])[:num_rows]
                out = tmp_path / f"{policy.codec}{num_rows}"
                out.mkdir()
                config = make(base, save(out / "target", weights), out / "delta", policy)
                assert config.tensors["embed"].shape == (num_rows, 8)
                assert config.tensors["embed"].codec == policy.codec + ("+rows" if num_rows > 20 else "")
                back = _given_back(base, out / "delta", out / "back")
                assert config.is_exact == (policy is LOSSLESS)
                if policy is LOSSLESS:
                    assert _equal(back, weights)
                assert torch.equal(back["embed"][20:].bfloat16(), weights["embed"][20:])

    def test_only_new_rows(self, tmp_path: Path, base: Path) -> None:
        weights = base_weights()
        weights["embed"] = torch.cat([weights["embed"], torch.ones(2, 8).bfloat16()])
        config = make(base, save(tmp_path / "target", weights), tmp_path / "delta", SIGN)
        assert {name: tensor.codec for name, tensor in config.tensors.items()} == {"embed": "rows"}
        assert _equal(_given_back(base, tmp_path / "delta", tmp_path / "back"), weights)

    def test_a_head_that_is_stored_though_it_is_tied(self, tmp_path: Path, base: Path) -> None:
        weights = tuned_weights()
        weights["embed"] *= 2
        weights["head"] = weights["embed"].clone()
        config = make(base, save(tmp_path / "target", weights), tmp_path / "delta")
        assert config.tied == {"head": "embed"}
        assert "head" not in config.tensors
        assert config.is_exact
        assert _equal(_given_back(base, tmp_path / "delta", tmp_path / "back"), weights)

    def test_a_base_that_stores_its_tied_head(self, tmp_path: Path, target: Path) -> None:
        weights = base_weights()
        weights["head"] = weights["embed"].clone()
        base = save(tmp_path / "base", weights)
        config = make(base, target, tmp_path / "delta")
        assert config.dropped == {"head": "embed"}
        assert _equal(_given_back(base, tmp_path / "delta", tmp_path / "back"), tuned_weights())

    def test_a_head_that_was_untied(self, tmp_path: Path) -> None:
        base = save(tmp_path / "base", base_weights(), config='{"vocab_size": 20}')
        weights = tuned_weights()
        weights["head"] = weights["embed"] * 1.25
        config = make(base, save(tmp_path / "target", weights), tmp_path / "delta", CodecPolicy("sign", ("lowrank",)))
        assert config.tensors["head"].base == "embed"
        assert "embed" not in config.tensors
        assert config.tensors["head"].error < 1
        _given_back(base, tmp_path / "delta", tmp_path / "back")

    def test_a_tensor_that_the_base_has_nothing_like(self, tmp_path: Path, base: Path) -> None:
        weights = tuned_weights() | {"bias": torch.ones(3), "new": torch.ones(3, 4)}
        config = make(base, save(tmp_path / "target", weights), tmp_path / "delta", SIGN)
        assert {name: config.tensors[name].codec for name in ("bias", "new")} == {"bias": "replace", "new": "replace"}
        assert config.tensors["new"].base is None
        back = _given_back(base, tmp_path / "delta", tmp_path / "back")
        assert all(same_bits(back[name], weights[name]) for name in ("bias", "new"))


def test_experts_are_coded_as_one_matrix(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(3, 4, 16, generator=generator)
    base = save(tmp_path / "base", {"experts": experts})
    tuned = {"experts": experts + torch.randn(3, 4, 16, generator=generator) * 0.01}
    config = make(base, save(tmp_path / "target", tuned), tmp_path / "delta", SIGN)
    assert config.tensors["experts"].terms[0].parts["bits"].shape == (12, 2)
    back = _given_back(base, tmp_path / "delta", tmp_path / "back")
    assert (back["experts"] - tuned["experts"]).norm() < (experts - tuned["experts"]).norm()


def test_values_that_are_not_finite_are_stored_whole(tmp_path: Path, base: Path) -> None:
    weights = tuned_weights()
    weights["up"][0, 0] = float("inf")
    config = make(base, save(tmp_path / "target", weights), tmp_path / "delta", SIGN)
    assert config.tensors["up"].codec == "replace"
    assert same_bits(_given_back(base, tmp_path / "delta", tmp_path / "back")["up"], weights["up"])


def test_what_is_no_pair_of_base_and_fine_tune(tmp_path: Path, base: Path) -> None:
    shutil.copytree(base, tmp_path / "same")
    with pytest.raises(InvalidRequestError, match="does not differ"):
        make(base, tmp_path / "same", tmp_path / "delta")
    weights = base_weights()
    weights["embed"] = torch.zeros(20, 9).bfloat16()
    with pytest.raises(CheckpointError, match=r"\[20, 8\].*\[20, 9\]"):
        make(base, save(tmp_path / "wider", weights), tmp_path / "delta")
    del weights["embed"]
    with pytest.raises(CheckpointError, match="only the base has 1 tensors"):
        make(base, save(tmp_path / "fewer", weights), tmp_path / "delta")
    other = save(tmp_path / "other", {"something": torch.ones(2)})
    with pytest.raises(CheckpointError, match="only the base has 5 tensors"):
        make(base, other, tmp_path / "delta")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(base_weights(), pickled / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="adapters convert"):
        make(base, pickled, tmp_path / "delta")
    assert not [path for path in tmp_path.iterdir() if "delta" in path.name]


def test_a_fine_tune_that_changes_only_files(tmp_path: Path, base: Path) -> None:
    target = save(tmp_path / "target", base_weights(), tokenizer='{"v": 3}')
    make(base, target, tmp_path / "delta")
    assert _equal(_given_back(base, tmp_path / "delta", tmp_path / "back"), base_weights())
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"v": 3}'


class TestOutput:
    """An output that exists, is an input, or for which there is no room."""

    def test_it_is_refused_if_it_exists(self, tmp_path: Path, base: Path, target: Path, delta: Path) -> None:
        before = delta_digest(delta)
        with pytest.raises(CheckpointError, match="exists already"):
            make(base, target, delta, SIGN)
        assert delta_digest(delta) == before
        make(base, target, delta, SIGN, force=True)
        assert delta_digest(delta) != before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "target"]

    def test_only_deltas_are_replaced(self, tmp_path: Path, base: Path, target: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter.txt").write_text("dear")
        with pytest.raises(CheckpointError, match="exists already"):
            make(base, target, tmp_path / "mine", force=True)
        assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"

    def test_inputs_are_not_written_to(self, tmp_path: Path, base: Path, target: Path) -> None:
        for out in (base, target, base / "delta", tmp_path):
            with pytest.raises(InvalidRequestError, match="give another --out"):
                make(base, target, out, force=True)
        before = {path: path.read_bytes() for path in (*base.iterdir(), *target.iterdir())}
        make(base, target, tmp_path / "delta", SIGN)
        assert {path: path.read_bytes() for path in (*base.iterdir(), *target.iterdir())} == before

    def test_the_old_one_stays_if_making_fails(
        self, tmp_path: Path, base: Path, target: Path, delta: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = delta_digest(delta)

        def fail(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        for place in ("add", "write_tensors"):
            with monkeypatch.context() as patched:
                patched.setattr(MakeJournal, place, fail)
                with pytest.raises(InternalError, match="no space left"):
                    make(base, target, delta, SIGN, force=True)
            assert delta_digest(delta) == before
            assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "target"]

    def test_a_full_disk(self, tmp_path: Path, base: Path, target: Path) -> None:
        """/dev/full behaves as one; the file that grows is a link to it."""
        scratch = tmp_path / ".delta.partial" / "scratch"
        scratch.mkdir(parents=True)
        (scratch / "journal.jsonl").symlink_to("/dev/full")
        with pytest.raises(InternalError, match="no space left"):
            make(base, target, tmp_path / "delta")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "target"]


_KILLED = """
    import os, signal, sys
    from pathlib import Path
    from delta import make
    from delta.codecs.policy import CodecPolicy

    base, target, out, place, number = sys.argv[1:]
    calls = 0

    def then_die(function):
        def run(*arguments, **named):
            global calls
            result = function(*arguments, **named)
            calls += 1
            if calls == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return run

    owner = make.MakeJournal if hasattr(make.MakeJournal, place) else make
    setattr(owner, place, then_die(getattr(owner, place)))
    make.make_delta(Path(base), Path(target), Path(out), CodecPolicy("sign"), labels=make.Labels(), report=print)
"""


class TestKilled:
    """A make that was killed goes on where it was."""

    @pytest.mark.parametrize(
        ("place", "number"), [("add", 1), ("add", 3), ("encode_tensor", 2), ("write_tensors", 1), ("_describe", 1)]
    )
    def test_it_goes_on(self, tmp_path: Path, base: Path, target: Path, place: str, number: int) -> None:
        make(base, target, tmp_path / "expected", SIGN)
        self._kill(base, target, tmp_path / "delta", place, number)
        assert not (tmp_path / "delta").exists()
        lines: list[str] = []
        make_delta(base, target, tmp_path / "delta", SIGN, labels=Labels(), report=lines.append)
        if (place, number) != ("encode_tensor", 2):
            assert lines == [f"going on after {5 if place in ('write_tensors', '_describe') else number} tensors"]
        assert delta_digest(tmp_path / "delta") == delta_digest(tmp_path / "expected")
        assert not (tmp_path / ".delta.partial").exists()

    def test_a_changed_input_is_noticed(self, tmp_path: Path, base: Path, target: Path) -> None:
        self._kill(base, target, tmp_path / "delta", "add", 3)
        weights = tuned_weights()
        weights["embed"] *= 2
        shutil.rmtree(target)
        save(target, weights)
        lines: list[str] = []
        config = make_delta(base, target, tmp_path / "delta", SIGN, labels=Labels(), report=lines.append)
        assert not lines
        assert config.target.digest == base_digest(read_checkpoint(target))

    def test_damage_to_what_was_kept_is_noticed(self, tmp_path: Path, base: Path, target: Path) -> None:
        expected = make(base, target, tmp_path / "expected", SIGN)
        self._kill(base, target, tmp_path / "delta", "_describe", 1)
        data = tmp_path / ".delta.partial" / "scratch" / "parts.data"
        content = bytearray(data.read_bytes())
        content[40] ^= 1
        data.write_bytes(content)
        assert make(base, target, tmp_path / "delta", SIGN) == expected

    def test_two_at_once(self, tmp_path: Path, base: Path, target: Path) -> None:
        def make_again(self: MakeJournal, *_: Any) -> None:
            with pytest.raises(CheckpointError, match="another program is writing"):
                make(base, target, tmp_path / "delta")
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(MakeJournal, "add", make_again)
            with pytest.raises(KeyboardInterrupt):
                make(base, target, tmp_path / "delta")
        make(base, target, tmp_path / "delta")

    def test_an_input_that_is_written_to_meanwhile(self, tmp_path: Path, base: Path, target: Path) -> None:
        write = MakeJournal.add

        def touch(self: MakeJournal, *arguments: Any) -> None:
            write(self, *arguments)
            os.utime(target / "model.safetensors")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(MakeJournal, "add", touch)
            with pytest.raises(CheckpointError, match="written to while it was read"):
                make(base, target, tmp_path / "delta")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "target"]

    def _kill(self, base: Path, target: Path, out: Path, place: str, number: int) -> None:
        command = [sys.executable, "-c", textwrap.dedent(_KILLED), base, target, out, place, str(number)]
        assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL


def test_a_config_survives_its_json(delta: Path) -> None:
    config: DeltaConfig = read_delta_config(delta)
    assert config.to_json() == (delta / "delta_config.json").read_text()


def test_all_matrices_but_embeddings_get_low_rank_residuals_with_or_without_inputs(tmp_path: Path) -> None:
    """Layers that are no nn.Linear have none: gpt2's, and single experts of mixtures."""
    names = ("model.embed_tokens.weight", "mlp.up_proj.weight", "mlp.experts.0.w1.weight")
    generator = torch.Generator().manual_seed(0)
    before = {name: torch.randn(64, 64, generator=generator) for name in names}
    after = {name: weight + torch.randn(64, 64, generator=generator) for name, weight in before.items()}
    base, target = save(tmp_path / "base", before), save(tmp_path / "target", after)
    for number, inputs in enumerate(({}, {"mlp.up_proj.weight": [torch.randn(80, 64, generator=generator)]})):
        config = make_delta(
            base, target, tmp_path / f"delta{number}", CodecPolicy(residuals=("lowrank",), rank=2), labels=Labels(),
            calibration=Calibration("inputs", inputs), report=lambda line: None,
        )  # fmt: skip
        assert [config.tensors[name].codec for name in names] == ["sign", "sign+lowrank", "sign+lowrank"]
