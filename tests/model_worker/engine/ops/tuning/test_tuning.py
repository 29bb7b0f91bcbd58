"""Tables of measured choices are found by device, and their making tries every choice, without a GPU here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compression.int4 import quantize_int4
from model_worker.engine.ops.quantized_matmul.functional import pack_groups
from model_worker.engine.ops.quantized_matmul.tiles import OP, ROW_CLASSES, Tile, default_tile, row_class, tiles_for
from model_worker.engine.ops.tuning import __main__ as command
from model_worker.engine.ops.tuning.quantized_problems import candidate_tiles, quantized_problems
from model_worker.engine.ops.tuning.search import Problem, choices_of, search
from model_worker.engine.ops.tuning.tuned_table import TunedTable, read_table, table_name, table_of, write_table

CPU = torch.device("cpu")


def _problem(times: dict[int, float], wrong: int | None = None) -> Problem:
    def run(choice):
        if choice["size"] not in times:
            raise MemoryError("too much shared memory")
        return times[choice["size"]]

    def check(choice):
        assert choice["size"] != wrong

    return Problem("op", "class", tuple({"size": size} for size in (1, 2, 3)), run, check)


def test_the_fastest_choice_is_found_and_what_cannot_be_launched_is_passed_over():
    found = search(_problem({1: 5.0, 3: 2.0}), lambda run: run())
    assert found.choice == {"size": 3}
    assert (found.best_ms, found.default_ms, found.num_refused) == (2.0, 5.0, 1)
    assert search(_problem({2: 1.0}), lambda run: run()).default_ms is None
    assert choices_of([found]) == {"op": {"class": {"size": 3}}}


def test_a_wrong_result_is_an_error_and_so_is_nothing_at_all():
    with pytest.raises(AssertionError):
        search(_problem({1: 5.0, 2: 1.0}, wrong=2), lambda run: run())
    with pytest.raises(RuntimeError, match="too much shared memory"):
        search(_problem({}), lambda run: run())


def test_tables_are_written_extended_and_read_by_device(tmp_path: Path):
    assert table_name("NVIDIA H200") == "nvidia-h200.json"
    assert read_table("NVIDIA H200", tmp_path).find("op", "class") is None
    write_table("NVIDIA H200", {"op": {"a": {"size": 1}, "b": {"size": 2}}}, {"torch": "2"}, tmp_path)
    path = write_table("NVIDIA H200", {"op": {"b": {"size": 3}}, "other": {}}, {"torch": "2"}, tmp_path)
    assert path == tmp_path / "nvidia-h200.json"
    table = read_table("NVIDIA H200", tmp_path)
    assert table.find("op", "a") == {"size": 1}
    assert table.find("op", "b") == {"size": 3}
    assert table_of(CPU) == TunedTable()


def test_tiles_come_from_the_table_where_it_has_them():
    weight = pack_groups(quantize_int4(torch.randn(64, 96)))
    tuned = {"rows": 16, "outputs": 16, "depth": 64, "num_warps": 2, "num_stages": 4}
    tiles = tiles_for(weight, TunedTable({OP: {"int4 64x96 rows 16": tuned}}))
    assert tiles.for_rows(2) == tiles.for_rows(16) == Tile(**tuned)
    assert tiles.for_rows(1) == default_tile(1, "int4")
    assert tiles.for_rows(10_000) == default_tile(ROW_CLASSES[-1], "int4")
    assert [row_class(rows) for rows in (0, 1, 2, 16, 17, 64, 65, 256, 257)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("rows", ROW_CLASSES)
@pytest.mark.parametrize("weight_format", ["int4", "int8", "float8"])
def test_candidates_are_distinct_and_begin_with_the_default(rows: int, weight_format: str):
    candidates = candidate_tiles(rows, weight_format)
    assert Tile(**candidates[0]) == default_tile(rows, weight_format)
    tiles = [Tile(**candidate) for candidate in candidates]
    assert len(set(tiles)) == len(tiles)
    assert all((tile.rows == 1) is (rows == 1) for tile in tiles)


def test_the_problems_of_quantized_weights_are_right_on_a_cpu():
    """Where tiles are not looked at: the references are checked against products with what the weights stand for."""
    problems = list(quantized_problems(((48, 64),), CPU, row_classes=(1, 16, 256)))
    assert len(problems) == 9
    for problem in problems:
        problem.check(problem.candidates[0])


@pytest.mark.parametrize("shape", ["axb", "12", "64x", "0x64", "64x-32", "64x33", "64x32x32"])
def test_a_shape_that_no_weight_has_is_a_usage_error(
    shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["tuning", "--shape", "4096x14336", "--shape", shape])
    with pytest.raises(SystemExit):
        command.main()
    assert f"such as 4096x14336, inputs a multiple of 32, got '{shape}'" in capsys.readouterr().err
