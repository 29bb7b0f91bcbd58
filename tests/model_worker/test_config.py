from __future__ import annotations

from pathlib import Path

import pytest

from model_worker.config import DEFAULT_CONTROLLER, GivenVariant, SignatureConfig, parse_config
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from registry.errors import InvalidRequestError

MODEL = ["--model-path", "m"]


def test_defaults() -> None:
    config = parse_config(MODEL, worker_token=None)
    assert config.controller == DEFAULT_CONTROLLER
    assert config.port is None
    assert config.worker_token is None
    assert config.deltas == ()
    assert config.variants == ()
    assert config.adapter_root is None
    assert config.quantization == "auto"
    assert config.engine == EngineConfig()


def test_engine_flags_are_generated_from_its_config() -> None:
    flags = ["--num-blocks", "7", "--max-num-seqs", "3", "--no-enable-prefix-caching", "--num-threads", "1"]
    assert parse_config([*MODEL, *flags], worker_token=None).engine == EngineConfig(
        CacheConfig(num_blocks=7, enable_prefix_caching=False), SchedulerConfig(max_num_seqs=3), num_threads=1
    )


def test_worker_flags() -> None:
    flags = [
        "--controller",
        "http://c:1/",
        "--port",
        "0",
        "--apply-delta",
        "a",
        "--apply-delta",
        "b",
        "--drain-timeout",
        "2.5",
    ]
    config = parse_config([*MODEL, *flags, "--quantization", "int4"], worker_token=None)
    assert config.controller == "http://c:1"
    assert config.port == 0
    assert config.deltas == (Path("a"), Path("b"))
    assert config.drain_timeout_s == 2.5
    assert config.quantization == "int4"


def test_fine_tunes_of_the_command_line(tmp_path: Path) -> None:
    flags = ["--lora", f"org/pirate={tmp_path}", "--delta", f"sage={tmp_path}", "--lora", f"poet={tmp_path},pin"]
    config = parse_config([*MODEL, *flags, "--adapter-root", str(tmp_path)], worker_token=None)
    assert config.variants == (
        GivenVariant("--lora", "org/pirate", tmp_path, pinned=False),
        GivenVariant("--lora", "poet", tmp_path, pinned=True),
        GivenVariant("--delta", "sage", tmp_path, pinned=False),
    )
    assert config.adapter_root == tmp_path
    assert config.signatures == SignatureConfig("off", ())


def test_whom_to_trust() -> None:
    flags = ["--signatures", "require", "--signature-key", "a.pem", "--signature-key", "b.pem"]
    signatures = parse_config([*MODEL, *flags], worker_token=None).signatures
    assert signatures == SignatureConfig("require", (Path("a.pem"), Path("b.pem")))


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--lora", "a=.", "--lora", "a=..,pin"], "more than once"),
        (["--lora", "a=.", "--delta", "a=.."], "more than once"),
        (["--lora", "a=no-such-directory"], "no-such-directory"),
        (["--lora", "a=., pin"], "is no directory"),
        (["--adapter-root", "no-such-directory"], "--adapter-root"),
        (["--signatures", "require"], "add --signature-key FILE"),
        (["--signature-key", "a.pem"], "add that"),
    ],
)
def test_adapters_that_cannot_be_there_are_refused_before_anything_is_loaded(flags: list[str], remedy: str) -> None:
    with pytest.raises(InvalidRequestError, match=remedy):
        parse_config([*MODEL, *flags], worker_token=None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-threads", "500000"], "--num-threads must be at most"),
        (["--num-blocks", "7", "--kv-cache-gib", "1"], "--num-blocks 7 and --kv-cache-gib 1.0 both size .* leave one"),
        (["--no-controller", "--advertise-url", "http://h:1"], "--advertise-url .* leave one of them out"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse_config([*MODEL, *flags], worker_token=None)


def test_standalone() -> None:
    assert parse_config([*MODEL, "--no-controller"], worker_token=None).controller is None


@pytest.mark.parametrize(
    ("flags", "environment", "token"),
    [([], None, None), ([], "", None), ([], "env", "env"), (["--worker-token", "flag"], "env", "flag")],
)
def test_a_flag_wins_over_the_environment(flags: list[str], environment: str | None, token: str | None) -> None:
    assert parse_config([*MODEL, *flags], worker_token=environment).worker_token == token


@pytest.mark.parametrize("token", ["a\nb", " a", "é"])
def test_a_token_that_no_header_can_hold_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_config(MODEL, worker_token=token)


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "65536"],
        ["--port", "-1"],
        ["--controller", "localhost:8000"],
        ["--drain-timeout", "-1"],
        ["--drain-timeout", "nan"],
        ["--max-model-len", "0"],
        ["--dtype", "int3"],
        ["--quantization", "int3"],
        ["--lora", "path"],
        ["--lora", "a="],
        ["--lora", "=path"],
        ["--lora", "a=,pin"],
        ["--lora", "a b=path"],
        ["--lora", "a@v1=path"],
        ["--delta", "path"],
        ["--controller", "http://c", "--no-controller"],
    ],
)
def test_bad_flags_are_a_usage_error(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config([*MODEL, *flags], worker_token=None)
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_a_worker_that_a_network_can_reach_needs_a_token(host: str) -> None:
    with pytest.raises(InvalidRequestError, match="--worker-token"):
        parse_config(["--model-path", "x", "--host", host], worker_token=None)
    assert parse_config(["--model-path", "x", "--host", host], worker_token="secret").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_a_worker_on_loopback_needs_none(host: str) -> None:
    assert parse_config(["--model-path", "x", "--host", host], worker_token=None).worker_token is None


def test_steps_are_larger_on_gpus_unless_flags_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--model-path", "m", "--max-num-seqs", "7"]
    on_cpu = parse_config([*argv, "--device", "cpu"], worker_token=None).engine.scheduler
    assert (on_cpu.max_num_seqs, on_cpu.max_num_batched_tokens, on_cpu.max_mixed_prefill_tokens) == (7, 512, 128)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device in ("auto", "cuda", "cuda:1"):
        on_gpu = parse_config([*argv, "--device", device], worker_token=None).engine.scheduler
        assert (on_gpu.max_num_seqs, on_gpu.max_num_batched_tokens, on_gpu.max_mixed_prefill_tokens) == (7, 8192, 2048)


def test_a_device_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequestError, match="got 'gpu'"):
        parse_config(["--model-path", "m", "--device", "gpu"], worker_token=None)
