"""The GPU check up to the point where it needs a GPU, and what it makes of what its parts write."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = (
    "gpu_check", "gpu_figures", "gpu_steps", "gpu_checkpoint", "gpu_ceilings", "gpu_attention", "gpu_engine",
    "gpu_compile", "gpu_variants", "gpu_quantized", "gpu_peers",
)  # fmt: skip
MACHINE: dict[str, Any] = {
    "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "safetensors": "0.8.0", "pytest": "9.0",
    "vllm": None, "python": "3.12.3", "gpu": "NVIDIA H200", "cuda": "13.0", "memory_gib": 139.8, "capability": "9.0",
}  # fmt: skip


@pytest.fixture
def modules(load_script: Callable[[str], ModuleType]) -> dict[str, ModuleType]:
    return {name: load_script(name) for name in NAMES}


def _with_parts(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, **parts: Any) -> ModuleType:
    """The check with other parts, on a machine that seems to have a GPU."""
    check = modules["gpu_check"]
    monkeypatch.setattr(check, "PARTS", parts)
    monkeypatch.setattr(check, "probe", lambda: MACHINE)
    return check


def test_without_a_gpu_it_says_what_is_missing(
    modules: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = modules["gpu_check"]
    monkeypatch.setattr(check, "probe", lambda: {**MACHINE, "gpu": None, "cuda": None})
    assert check.main([]) == 1
    assert "without CUDA" in capsys.readouterr().err
    assert "nvidia-smi" in check.why_not({**MACHINE, "gpu": None})
    assert "pip install triton pytest" in check.why_not({**MACHINE, "triton": None, "pytest": None})
    assert check.why_not(MACHINE) == ""


def test_the_probe_knows_this_machine(modules: dict[str, ModuleType]) -> None:
    found = modules["gpu_check"].probe()
    assert found.keys() == MACHINE.keys()
    assert found["torch"] is not None


def test_parts_are_chosen_by_name(modules: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    check = modules["gpu_check"]
    with pytest.raises(SystemExit):
        check.main(["--only", "kernels,nonsense"])
    assert "nonsense: no such part; there are kernels, compile, attention" in capsys.readouterr().err


def test_every_part_is_there(modules: dict[str, ModuleType]) -> None:
    for name, part in modules["gpu_check"].PARTS.items():
        assert bool(part.tests) != bool(part.script), name
        files = part.tests or (f"benchmarks/{part.script}",)
        assert all((BENCHMARKS.parent / file).is_file() for file in files), name


class SlowPart(subprocess.Popen[bytes]):
    """A part's process; the time of one whose script is `slow` is over as soon as it has written what it found."""

    def wait(self, timeout: float | None = None) -> int:
        script = Path(self.args[1])  # type: ignore[index]
        if timeout is None or script.stem != "slow":
            return super().wait(timeout)
        while not script.with_suffix(".written").exists():
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_parts_run_and_what_they_find_is_written_down(
    modules: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    part = modules["gpu_check"].Part
    script = tmp_path / "part.py"
    script.write_text(
        "import json, sys, time\n"
        "figure = {'name': 'decode', 'value': 0.9, 'unit': 'of the floor', 'target': 0.85, 'detail': 'fast'}\n"
        "open(sys.argv[sys.argv.index('--json') + 1], 'w').write(json.dumps([figure, {**figure, 'value': 0.2}]))\n"
        "open(sys.argv[0].replace('.py', '.written'), 'w').close()\n"
        "time.sleep(600 * ('slow' in sys.argv[0]))\n"
        "print('went wrong')\n"
        "sys.exit('broken' in sys.argv[0])\n"
    )
    for name in ("broken", "slow"):
        (tmp_path / f"{name}.py").write_text(script.read_text())
    monkeypatch.setattr(subprocess, "Popen", SlowPart)
    check = _with_parts(
        modules,
        monkeypatch,
        slow=part(20, script=str(tmp_path / "slow.py")),
        good=part(20, script=str(script)),
        bad=part(20, script=str(tmp_path / "broken.py")),
    )
    path = tmp_path / "result.json"
    assert check.main(["--only", "slow,good,bad", "--budget", "1200", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "went wrong" in out
    assert "decode" in out
    assert re.search(r"NOT COMPLETE: slow \(stopped after \d+ s\), bad \(ended with status 1\)", out)
    report = json.loads(path.read_text())
    assert report["machine"] == MACHINE
    assert report["command"] == "scripts/gpu-check --only slow,good,bad"
    assert report["parts"]["good"]["problem"] == ""
    assert [figure["met"] for figure in report["figures"]] == [True, False] * 3


def test_all_parts_end_within_the_time_and_leave_what_they_do_not_need(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = modules["gpu_check"]
    there = {None, "transformers"}
    monkeypatch.setattr(check, "_is_there", lambda package: package in there)
    ends = check.deadlines(tuple(check.PARTS), 480.0)
    assert list(ends) == list(check.PARTS)
    assert ends["vllm"] == 480.0
    seconds = [end - begin for begin, end in zip([0.0, *ends.values()], ends.values(), strict=False)]
    assert all(share >= check.PARTS[name].share for name, share in zip(ends, seconds, strict=True) if name != "vllm")
    assert seconds[-1] < 4.0
    there.add("vllm")
    assert check.deadlines(tuple(check.PARTS), 480.0)["vllm"] == 480.0
    assert check.deadlines(("engine",), 480.0) == {"engine": 480.0}


def test_what_has_no_time_left_is_not_begun(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = _with_parts(modules, monkeypatch, never=modules["gpu_check"].Part(10, script="nothing.py"))
    (outcome,) = check.run_parts(["never"], 0.0, None)
    assert outcome.problem == "no time was left"


def test_results_of_tests_are_read(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    check = modules["gpu_check"]
    path = tmp_path / "kernels.jsonl"
    assert check.read_tests("kernels", path)[1] == "no test ran"
    outcomes = ["passed"] * 9 + ["failed"] + ["skipped"] * 2
    path.write_text("".join(json.dumps({"test": "t", "outcome": outcome}) + "\n" for outcome in outcomes))
    (figure,), problem = check.read_tests("kernels", path)
    assert (figure.value, figure.met, problem) == (0.9, False, "1 tests failed")
    path.write_text(json.dumps({"test": "t", "outcome": "skipped"}) + "\n")
    (figure,), problem = check.read_tests("kernels", path)
    assert (figure.value, problem) == (None, "no test ran")


def test_tests_that_end_all_at_once_leave_what_they_have_found(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    check = modules["gpu_check"]
    part = check.Part(1, tests=(str(tmp_path / "test_dying.py"),))
    (tmp_path / "conftest.py").write_text("from tests.gpu.conftest import pytest_addoption, pytest_configure\n")
    (tmp_path / "test_dying.py").write_text(
        "import os\ndef test_one(): pass\ndef test_other(): assert False\ndef test_last(): os._exit(3)\n"
    )
    with pytest.MonkeyPatch.context() as patch:  # in one process: pytest-xdist outlives a test that ends its own
        patch.setattr(check.importlib.util, "find_spec", lambda name: None)
        command, wanted = check.command_of(part, "dying", tmp_path, None, [], 60.0)
    outcome = check._run("dying", part, command, wanted, 60.0)
    assert outcome.problem == "1 tests failed"
    assert outcome.figures[0].detail == "1 of 2 passed, 0 skipped"


def test_the_tests_for_gpus_are_right_themselves(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some of them, on a CPU: engines compute as on a GPU, and are compared with transformers."""
    monkeypatch.setenv("ROOTGRAFT_GPU_TESTS_ON", "cpu")
    check = modules["gpu_check"]
    directory = "tests/gpu"
    part = check.Part(
        1,
        tests=(
            f"{directory}/test_parity.py::test_the_own_decoder_is_what_is_compared[llama-tied]",
            f"{directory}/test_parity.py::test_bfloat16_is_as_exact_as_transformers[phi3-longrope]",
            f"{directory}/test_kernels.py::test_draws",
        ),
    )
    outcome = check._run("tests", part, *check.command_of(part, "tests", tmp_path, None, [], 240.0), 240.0)
    assert outcome.problem == ""
    assert outcome.figures[0].detail == "3 of 3 passed, 0 skipped"


def test_peers_are_compared_with_what_was_measured_before(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    check, figure = modules["gpu_check"], modules["gpu_figures"].Figure
    part = check.PARTS["vllm"]
    found = [figure("start", 20.0, "s"), figure("throughput, 512 requests", 20000.0, "tokens/s")]
    before = [check.Outcome("engine", 1.0, found)]
    command, _ = check.command_of(part, "vllm", tmp_path, None, before, 33.3)
    assert command[-6:] == ["--checkpoint", str(tmp_path / "model"), "--seconds", "33", "--ours", "20000.0"]
    command, _ = check.command_of(part, "vllm", tmp_path, Path("kept"), [], 33.3)
    assert command[-4:] == ["--checkpoint", "kept", "--seconds", "33"]


def test_a_peer_that_takes_too_long_is_slower_than_that(modules: dict[str, ModuleType]) -> None:
    peers = modules["gpu_peers"]
    rate, is_complete = peers.rate_within(lambda: 1000, 500.0)
    assert is_complete
    assert rate > 2
    stop = threading.Event()
    rate, is_complete = peers.rate_within(lambda: int(stop.wait(600)), 0.01)
    stop.set()
    assert not is_complete
    figure = peers.figure_of("vllm", (1000.0, False), 3000.0)
    assert (figure.value, figure.met) == (3.0, True)
    assert "less than 1,000" in figure.detail
    assert peers.figure_of("vllm", None, 3000.0, "vllm is not installed").met is None
    assert peers.measure("vllm", Path("nowhere"), 1.0, 9.0).detail == "vllm is not installed"


def test_random_variants_have_the_shapes_of_the_model(modules: dict[str, ModuleType]) -> None:
    variants, checkpoint = modules["gpu_variants"], modules["gpu_checkpoint"]
    config = {**checkpoint.LLAMA_8B, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 2}
    source = variants.RandomTerms(config)
    lora, other, sign = (source.read(Path(name)) for name in ("r16-0003", "r16-0004", "sign-0001"))
    assert len(lora.linears) == len(sign.linears) == 14
    assert lora.max_rank == 16
    assert lora.digest != other.digest
    down = "model.layers.1.mlp.down_proj"
    ours, theirs = lora.linears[down], other.linears[down]
    assert ours.a is not None
    assert theirs.a is not None
    assert ours.a.shape == (16, 96)
    assert not torch.equal(ours.a, theirs.a)
    (plane,) = sign.linears[down].signs
    assert plane.bits.shape == (64, 12)
    assert plane.column_scale is not None
    assert plane.column_scale.shape == (96,)


def test_the_engine_needs_no_package_of_the_server() -> None:
    """Nor do the benchmarks; transformers may look for some of them, so it comes first."""
    absent = ("alembic", "fastapi", "gguf", "psutil", "pydantic", "starlette", "sqlalchemy", "uvicorn", "zstandard")
    script = (
        "import sys, transformers.generation, transformers.models.llama.modeling_llama\n"
        f"sys.modules.update({{name: None for name in {absent!r}}})\n"
        "import gpu_engine, gpu_variants, gpu_quantized, gpu_peers, gpu_attention, gpu_compile\n"
        "import tests.gpu.test_parity, tests.gpu.test_graphs, tests.gpu.test_kernels\n"
    )
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_table(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    figures = modules["gpu_figures"]
    found = [
        figures.Figure("decode", 0.913, "of the floor", 0.85, "3.9 ms"),
        figures.Figure("start", 41.2, "s", 30.0, at_most=True),
        figures.Figure("against vLLM", None, "times", 1.0, "it is not installed"),
        figures.Figure("throughput", 20123.4, "tokens/s"),
    ]
    assert figures.format_table(found).splitlines()[1:] == [
        "decode        ≥ 0.85  0.913 of the floor  met           3.9 ms",
        "start         ≤ 30    41.2 s              MISSED",
        "against vLLM  ≥ 1     -                   not measured  it is not installed",
        "throughput            20,123 tokens/s",
    ]
    figures.write_figures(found, tmp_path / "figures.json")
    assert figures.read_figures(tmp_path / "figures.json") == found
    assert figures.read_figures(tmp_path / "nothing.json") == []


def test_gaps_of_a_trace(modules: dict[str, ModuleType]) -> None:
    gaps = modules["gpu_steps"].gaps
    assert gaps([(11.0, 12.0), (0.0, 10.0), (2.0, 4.0), (20.0, 21.0)]) == (21.0, 8.0, 9.0)
    with pytest.raises(ValueError):
        gaps([])


def test_floors_are_those_of_the_model(modules: dict[str, ModuleType]) -> None:
    checkpoint, steps, ceilings = (modules[name] for name in ("gpu_checkpoint", "gpu_steps", "gpu_ceilings"))
    config = checkpoint.LLAMA_8B
    shapes = dict(checkpoint.parameter_shapes(config))
    num_parameters = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes.values())
    assert num_parameters == 8_030_261_248
    assert checkpoint.kv_bytes_per_token(config) == 131072
    measured = ceilings.Ceilings(copy_bytes_s=4.3e12, bf16_flops=790e12)
    assert steps.decode_floor_s(config, 1, 1024, measured) == pytest.approx(3.52e-3, rel=0.01)
    assert steps.prefill_flops(config, 8192) == pytest.approx(1.32e14, rel=0.01)


def test_a_checkpoint_is_written_once_and_can_be_read(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    from adapters import plan_load

    checkpoint = modules["gpu_checkpoint"]
    config = {
        **checkpoint.LLAMA_8B,
        **dict.fromkeys(("hidden_size", "intermediate_size"), 64),
        "vocab_size": 700,
        "num_hidden_layers": 1,
        "head_dim": 2,
    }
    path = checkpoint.write_checkpoint(tmp_path / "model", config, "cpu")
    plan = plan_load(path, max_model_len=128)
    assert plan.vocab_size == 700
    (file,) = path.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    checkpoint.write_checkpoint(path, config, "cpu")
    assert file.stat().st_mtime_ns == written
