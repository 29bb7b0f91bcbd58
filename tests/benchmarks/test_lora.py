"""`benchmarks/lora.py` and the adapters that it makes, against a server that only keeps their names and tiers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from aiohttp import web
from transformers import LlamaConfig, LlamaForCausalLM

from delta.peft.reader import read_peft_adapter
from tests.fakes.app_server import serving
from tests.fakes.peft_adapters import TinyBase
from tests.fakes.script_in_loop import run_in_this_loop


@pytest.fixture
def lora(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("lora")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
        )
    )  # fmt: skip


@pytest.fixture
def model_path(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class FakeAdapterServer:
    """Answers a word every millisecond; `host_places` adapters stay in memory, the last used ones.

    Attributes:
        models: of the generate requests, in order.
        activation_s: how long an activation stops all streams.
    """

    def __init__(self, host_places: int = 100) -> None:
        self.host_places = host_places
        self.models: list[str] = []
        self.paths: dict[str, Path] = {}
        self.loads: dict[str, int] = {}
        self.resident: list[str] = []
        self.active: set[str] = set()
        self.activation_s = 0.05
        self.refuse: str | None = None
        self._stopped = asyncio.Lock()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        name = body["model"]
        self.models.append(name)
        if name == self.refuse or (name != "m" and name not in self.paths):
            return web.json_response({"error": {"message": f"no {name}"}}, status=404)
        if name in self.paths:
            self._use(name)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            async with self._stopped:
                await response.write(b"data: " + json.dumps({"choices": [{"text": "w "}]}).encode() + b"\n\n")
            await asyncio.sleep(0.001)
        usage = {"prompt_tokens": 3, "completion_tokens": body["max_tokens"]}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    def _use(self, name: str) -> None:
        if name in self.resident:
            self.resident.remove(name)
        else:
            self.loads[name] += 1
        self.resident.append(name)
        del self.resident[: -self.host_places]

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        if not (await asyncio.to_thread((path / "adapter_config.json").is_file)):
            return web.json_response({"error": {"message": f"nothing at {path}"}}, status=400)
        if name not in self.paths:
            self.paths[name], self.loads[name] = path, 0
            self._use(name)
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        del self.paths[name]
        self.resident.remove(name)
        self.active.discard(name)
        return web.Response(text="Success")

    async def move(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.match_info["verb"] == "evict":
            self.resident.remove(name)
        else:
            async with self._stopped:
                await asyncio.sleep(self.activation_s)
            self._use(name)
            self.active.add(name)
        return web.json_response(self._info(name))

    async def show(self, request: web.Request) -> web.Response:
        return web.json_response(self._info(request.match_info["name"]))

    async def list(self, request: web.Request) -> web.Response:
        return web.json_response({"variants": [self._info(name) for name in self.paths]})

    def _info(self, name: str) -> dict[str, Any]:
        state = "active" if name in self.active else "in_host_memory" if name in self.resident else "on_disk"
        return {"name": name, "workers": [{"status": {"state": state, "loads_total": self.loads[name]}}]}


@asynccontextmanager
async def running(server: FakeAdapterServer) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_post("/v1/load_lora_adapter", server.load)
    app.router.add_post("/v1/unload_lora_adapter", server.unload)
    app.router.add_get("/admin/variants", server.list)
    app.router.add_get("/admin/variants/{name}", server.show)
    app.router.add_post("/admin/variants/{name}/{verb}", server.move)
    async with serving(app) as url:
        yield url


class Bench:
    """Calls the script; `report` is what it wrote."""

    def __init__(self, lora: ModuleType, model_path: Path, directory: Path) -> None:
        self._lora = lora
        self._file = directory / "results.json"
        self._arguments = ["--model", "m", "--model-path", str(model_path), "--adapter-root", str(directory / "root")]
        self._arguments += ["--json", str(self._file), "--output-tokens", "12", "--requests-per-stream", "1"]

    async def run(self, url: str, *arguments: str) -> int:
        return await run_in_this_loop(self._lora.main, ["--url", url, *self._arguments, *arguments], None)

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._file.read_text())
        return found


@pytest.fixture
def bench(lora: ModuleType, model_path: Path, tmp_path: Path) -> Bench:
    return Bench(lora, model_path, tmp_path)


# --------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_read_by_our_reader(
    lora: ModuleType, model: LlamaForCausalLM, model_path: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    shapes = lora.linear_shapes(model_path)
    assert len(shapes) == 7 * 2
    adapters = lora.AdapterSet("a", (2, 4), 3)
    lora.make_adapters(adapters, shapes, tmp_path / "root", dtype=dtype, seed=1)
    digests = set()
    for name, rank in zip(adapters.names, (2, 4, 2), strict=True):
        terms = read_peft_adapter(tmp_path / "root" / name, TinyBase(model))
        assert set(terms.linears) == set(shapes)
        assert {term.a.shape[0] for term in terms.linears.values()} == {rank}
        digests.add(terms.digest)
    assert len(digests) == 3


def test_adapters_are_the_same_for_a_seed(lora: ModuleType, model_path: Path, tmp_path: Path) -> None:
    shapes = lora.linear_shapes(model_path)

    def made(directory: str, seed: int) -> bytes:
        lora.make_adapters(lora.AdapterSet("a", (2,), 1), shapes, tmp_path / directory, dtype=torch.float32, seed=seed)
        return (tmp_path / directory / "a-0000" / "adapter_model.safetensors").read_bytes()

    assert made("one", 1) == made("two", 1) != made("three", 2)


async def test_only_the_files_are_made(bench: Bench, tmp_path: Path) -> None:
    assert await bench.run("http://127.0.0.1:1", "--cases", "ranks", "--make-only") == 0
    ranks = [
        json.loads((tmp_path / "root" / f"mixed-{number:04d}" / "adapter_config.json").read_text())["r"]
        for number in range(8)
    ]
    assert (min(ranks), max(ranks), sum(ranks)) == (8, 64, 8 * 32)


# ------------------------------------------------------------------------------------------------------------ cases


async def test_base_and_adapters_run_in_turns(bench: Bench) -> None:
    server = FakeAdapterServer()
    async with running(server) as url:
        assert await bench.run(url, "--cases", "base,r16-8,ranks", "--rounds", "2") == 0
    cases = bench.report["cases"]
    assert set(cases["base"]["ratios"]) == {"base", "base again"}
    assert cases["r16-8"]["ratios"]["base"] == 1.0
    assert [result["num_requests"] for result in cases["r16-8"]["rounds"]["adapters"]] == [8, 8]
    assert set(cases["ranks"]["tokens_per_s"]) == {"base", "mixed", "equal"}
    assert "cost_mixed_over_equal" in cases["ranks"]
    adapters = [f"r16-{number:04d}" for number in range(8)]
    after = server.models[2 * 8 + 2 :]  # the case base and its two warm-ups
    turns = [sorted(after[begin : begin + 8]) for begin in range(9, 9 + 4 * 8, 8)]
    assert turns == [["m"] * 8, adapters] * 2


async def test_hits_are_compared_with_the_optimum(bench: Bench) -> None:
    server = FakeAdapterServer(host_places=8)
    async with running(server) as url, running(FakeAdapterServer()) as resident_url:
        assert await bench.run(
            url, "--cases", "zipf", "--rounds", "2", "--num-registered", "40", "--registered-rank", "2",
            "--host-places", "8", "--resident-url", resident_url,
        ) == 0  # fmt: skip
    found = bench.report["cases"]["zipf"]
    residency = found["residency"]
    assert residency["requests"] == 2 * 32
    assert 0 < residency["hit_share"] < 1
    assert residency["hit_share"] == 1 - residency["loads_from_disk"] / 64
    assert residency["of_optimum"] == residency["hit_share"] / residency["optimum_hit_share"]
    assert found["of_all_resident"] == found["ratios"]["zipf"] / found["ratios"]["all resident"]


async def test_streams_notice_an_activation(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(FakeAdapterServer()) as url:
        status = await bench.run(url, "--cases", "activation", "--activations", "1", "--output-tokens", "200")
    output = capsys.readouterr()
    assert status == 0, output.err
    activations = bench.report["cases"]["activation"]["activations"]
    assert [one["source"] for one in activations] == ["host memory", "disk"]
    for one in activations:
        assert one["median_ms"] >= 50
        assert one["longest_gap_over_median"][1] > one["undisturbed_over_median"][0]
    assert "| activation | from disk |" in output.out


async def test_failed_requests_are_counted_and_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeAdapterServer()
    server.refuse = "r16-0003"
    async with running(server) as url:
        assert await bench.run(url, "--cases", "r16-8", "--rounds", "1") == 1
    assert "r16-8: adapters: 1 failed: HTTP 404: no r16-0003" in capsys.readouterr().err


async def test_the_other_cases_run_when_one_cannot(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeAdapterServer()
    server.refuse = "m"
    async with running(server) as url:
        assert await bench.run(url, "--cases", "base,r16-8") == 1
    errors = capsys.readouterr().err
    assert "lora.py: base: base: HTTP 404: no m" in errors
    assert "lora.py: r16-8: base: HTTP 404: no m" in errors
    assert set(bench.report["cases"]) == {"base", "r16-8"}


async def test_a_server_that_is_not_there(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert await bench.run("http://127.0.0.1:1", "--cases", "activation") == 1
    assert "lora.py: activation: " in capsys.readouterr().err


def test_unknown_cases_are_refused(lora: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lora.parse_arguments(["--model-path", "x", "--adapter-root", "y", "--cases", "base,other"])
    assert "there is no case other" in capsys.readouterr().err
