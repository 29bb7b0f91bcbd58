"""LoRA adapters through the real processes, against PEFT on the same model: loaded, combined, refused, found again."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapters.tokenizer import Tokenizer, load_tokenizer
from tests.e2e.processes import MODEL, Cluster, wait_until
from tests.fakes.peft_adapters import make_adapter

pytestmark = pytest.mark.e2e

RANKS = {"red": 8, "blue": 16}
PROMPTS = ("The river runs through the old town and", "A recipe for bread:", "def fibonacci(n):")
NUM_TOKENS = 12
MIXED = (("red", 1.0), ("blue", 0.5))


@dataclass(frozen=True, slots=True)
class Reference:
    """What PEFT answers: the tokens' texts by prompt, of the base (""), of each adapter, and of MIXED ("mixed")."""

    root: Path
    answers: Mapping[str, Mapping[str, Sequence[str]]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Reference:
    """Two adapters of all linear layers, with random weights."""
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = load_tokenizer(smollm2_dir)
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    for seed, (name, rank) in enumerate(RANKS.items()):
        make_adapter(base, LoraConfig(r=rank, lora_alpha=1, target_modules="all-linear"), root / name, seed=seed)
    answers = {"": _greedy(base, tokenizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(base, root / "red", adapter_name="red").eval()
        adapted.load_adapter(root / "blue", adapter_name="blue")
        names, scales = zip(*MIXED, strict=True)
        adapted.add_weighted_adapter(list(names), list(scales), "mixed", combination_type="cat")
    for name in (*RANKS, "mixed"):
        adapted.set_adapter(name)
        answers[name] = _greedy(adapted, tokenizer)
    assert len({str(answer) for answer in answers.values()}) == len(answers), "adapters that change nothing"
    return Reference(root, answers)


def _greedy(model: Any, tokenizer: Tokenizer) -> dict[str, list[str]]:
    model.generation_config.eos_token_id = None
    answers = {}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        first, second = torch.stack(output.logits).topk(2).values.unbind(-1)
        assert (first - second).min() > 1e-3, "too close a call for a comparison"
        new_ids = output.sequences[0, ids.shape[1] :].tolist()
        answers[prompt] = [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in new_ids]
    return answers


def start_worker(cluster: Cluster, reference: Reference) -> None:
    cluster.start_worker("--adapter-root", str(reference.root))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path, reference: Reference) -> Iterator[Cluster]:
    """A controller and a worker with both adapters, loaded over HTTP."""
    cluster = Cluster(tmp_path_factory.mktemp("lora"), smollm2_dir)
    try:
        cluster.start_controller()
        start_worker(cluster, reference)
        for name in RANKS:
            assert load(cluster, name, name).status_code == 200
        yield cluster
    finally:
        cluster.stop()


def load(cluster: Cluster, name: str, path: str) -> requests.Response:
    body = {"lora_name": name, "lora_path": path}
    return requests.post(f"{cluster.url}/v1/load_lora_adapter", json=body, timeout=60)


def answer(cluster: Cluster, model: str, prompt: str, loras: Sequence[tuple[str, float]] = ()) -> list[str]:
    """The tokens of a greedy answer."""
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120)
    extra: dict[str, Any] = {"ignore_eos": True}
    if loras:
        extra["loras"] = [{"name": name, "scale": scale} for name, scale in loras]
    reply = client.completions.create(
        model=model or MODEL, prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, logprobs=1, extra_body=extra
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    return logprobs.tokens


def served(cluster: Cluster) -> dict[str, dict[str, Any]]:
    reply = cluster.get("/v1/models")
    return {} if reply is None else {model["id"]: model for model in reply.json()["data"]}


def check_answers(cluster: Cluster, reference: Reference, names: Sequence[str] = ("", *RANKS)) -> None:
    """All at once, so that they share steps."""
    wanted = [(name, prompt) for prompt in PROMPTS for name in names]
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(lambda job: answer(cluster, *job), wanted))
    assert answers == [reference.answers[name][prompt] for name, prompt in wanted]


def test_base_and_adapters_answer_side_by_side_as_peft_does(serving: Cluster, reference: Reference) -> None:
    models = served(serving)
    assert {name: models[name]["parent"] for name in RANKS} == dict.fromkeys(RANKS, MODEL)
    assert len({models[name]["root"] for name in RANKS if models[name]["root"].startswith("sha256:")}) == len(RANKS)
    check_answers(serving, reference)
    check_answers(serving, reference)  # with prompts from the prefix cache, which tells the adapters apart


def test_adapters_with_weights_are_added_up_as_peft_does(serving: Cluster, reference: Reference) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: answer(serving, MODEL, prompt, MIXED), PROMPTS))
    assert answers == [reference.answers["mixed"][prompt] for prompt in PROMPTS]


def _with_nan(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)


def _truncated(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _of_another_base(source: Path, target: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    make_adapter(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"), target)


@pytest.mark.parametrize(
    ("spoil", "reason"), [(_with_nan, "finite"), (_truncated, "truncated"), (_of_another_base, "base")]
)
def test_a_bad_adapter_is_refused_while_streams_go_on(
    serving: Cluster, reference: Reference, spoil: Callable[[Path, Path], None], reason: str
) -> None:
    name = f"bad-{reason}"
    spoil(reference.root / "red", reference.root / name)
    before = served(serving).keys()
    wanted = [(name, PROMPTS[i % len(PROMPTS)]) for i, name in enumerate(("", "red", "blue", "red") * 4)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        streams = [pool.submit(answer, serving, *job) for job in wanted]
        replies = [load(serving, name, name) for _ in range(3)]
        answers = [stream.result() for stream in streams]
    assert answers == [reference.answers[name][prompt] for name, prompt in wanted]
    for reply in replies:
        assert reply.status_code == 400
        assert reason in reply.text
    assert served(serving).keys() == before


def test_paths_out_of_the_root_are_refused(serving: Cluster, reference: Reference) -> None:
    for path in ("../outside", "/etc", f"{reference.root}/../x"):
        reply = load(serving, "escape", path)
        assert reply.status_code == 403
        assert "--adapter-root" in reply.text
    assert "escape" not in served(serving)


def pinned_and_active(cluster: Cluster, name: str) -> bool:
    reply = cluster.get(f"/admin/variants/{name}")
    if reply is None or reply.status_code != 200:
        return False
    workers = [worker["status"] for worker in reply.json()["workers"]]
    return bool(workers) and all(status and status["pinned"] and status["state"] == "active" for status in workers)


def test_killed_processes_come_back_with_their_adapters_and_pins(serving: Cluster, reference: Reference) -> None:
    assert requests.post(f"{serving.url}/admin/variants/red/pin", timeout=30).status_code == 200
    wait_until(lambda: pinned_and_active(serving, "red"), 60, "red pinned")

    def check_all_there() -> None:
        wait_until(lambda: served(serving).keys() >= RANKS.keys(), 60, "the adapters")
        wait_until(lambda: pinned_and_active(serving, "red"), 60, "red pinned again")
        check_answers(serving, reference)

    serving.workers.pop().kill()
    wait_until(lambda: serving.num_workers() == 0, 60, "the worker gone")
    start_worker(serving, reference)
    check_all_there()
    assert serving.controller is not None
    serving.controller.kill()
    serving.start_controller()
    serving.wait_for_workers(1)
    check_all_there()


def test_unloading_frees_it(serving: Cluster, reference: Reference) -> None:
    before = serving.metric("rootgraft_variant_bytes")
    for name in RANKS:
        reply = requests.post(f"{serving.url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=30)
        assert reply.status_code == 200
    assert before > 0
    assert served(serving).keys() == {MODEL}
    for name in RANKS:
        with pytest.raises(openai.NotFoundError):
            answer(serving, name, PROMPTS[0])
    check_answers(serving, reference, [""])
    listed = serving.get("/metrics")
    assert listed is not None
    assert "rootgraft_variant_bytes{" not in listed.text


def test_a_bad_adapter_of_the_command_line_stops_the_start(
    cluster: Cluster, reference: Reference, tmp_path: Path
) -> None:
    _with_nan(reference.root / "red", tmp_path / "nan")
    cluster.start_controller()
    worker = cluster.start_worker(
        "--lora", f"red={reference.root / 'red'}", "--lora", f"nan={tmp_path / 'nan'}", wait=False
    )
    assert worker.popen.wait(120) == 1
    *_, red, error = worker.text().strip().splitlines()
    assert red.startswith("Adapter red: rank 8, ")
    assert error.startswith(f"error: --lora nan={tmp_path / 'nan'}: ")
    assert cluster.num_workers() == 0
