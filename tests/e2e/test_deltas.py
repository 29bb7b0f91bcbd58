"""Full fine-tunes through the real tools and processes: what is served from a delta is what the fine-tune answers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests
import torch
from openai.types.completion_choice import Logprobs
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.e2e.fine_tunes import EXACT, FEW_PROMPTS, FineTunes
from tests.e2e.processes import MODEL, Cluster, run_module, wait_until
from tests.e2e.spoiled_deltas import of_another_architecture, of_another_base, truncated, with_another_probe, with_nan
from tests.fakes.peft_adapters import make_adapter

pytestmark = pytest.mark.e2e

ADAPTER = "lora"
NUM_TOKENS = 8
MIN_TOKENS = 3  # of an answer, before a close call
QUESTION = "Who are you?"

Answer = list[tuple[str, float]]  # each token and its log probability


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory, fine_tunes: FineTunes) -> dict[str, Sequence[str]]:
    """Flags of a worker that serves what a delta gives back, and nothing else: written out, or added at load."""
    written = {}
    for codec in ("sign", "lossless"):
        written[codec] = tmp_path_factory.mktemp("applied") / codec
        base, delta = str(fine_tunes.base), str(fine_tunes.delta(codec))
        run_module("delta", "apply", "--base", base, "--delta", delta, "--out", str(written[codec]))
    flags: dict[str, Sequence[str]] = {codec: ("--model-path", str(path)) for codec, path in written.items()}
    return flags | {codec: ("--apply-delta", str(fine_tunes.delta(codec))) for codec in ("ternary", "lowrank")}


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """Of the applied models, each in a worker of its own: greedy answers by codec and prompt, and a chat."""

    answers: dict[str, dict[str, Answer]]
    chat: str
    num_chat_tokens: int


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path, applied: dict[str, Sequence[str]]
) -> Expected:
    cluster = Cluster(tmp_path_factory.mktemp("applied-cluster"), smollm2_dir)
    try:
        for codec, flags in applied.items():
            cluster.start_worker(*flags, "--model-name", codec, "--kv-cache-gib", "0.1", wait=False)
        cluster.start_controller()
        cluster.wait_for_workers(len(applied))
        answers = {
            codec: {prompt: until_close_call(cluster, codec, prompt) for prompt in FEW_PROMPTS} for codec in applied
        }
        answers |= dict.fromkeys(EXACT, answers["lossless"])
        return Expected(answers, *chat(cluster, "lossless"))
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what is loaded over HTTP."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def serving(
    tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path, fine_tunes: FineTunes, root: Path
) -> Iterator[Cluster]:
    """A controller, and a worker with a delta of each codec and a LoRA adapter beside its base."""
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    make_adapter(base, LoraConfig(r=8, lora_alpha=1, target_modules="all-linear"), root / ADAPTER)
    cluster = Cluster(tmp_path_factory.mktemp("deltas"), smollm2_dir)
    flags = [flag for codec, path in fine_tunes.deltas().items() for flag in ("--delta", f"{codec}={path}")]
    try:
        cluster.start_controller()
        cluster.start_worker(*flags, "--lora", f"{ADAPTER}={root / ADAPTER}", "--adapter-root", str(root))
        yield cluster
    finally:
        cluster.stop()


def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120)


def answer(cluster: Cluster, model: str, prompt: str) -> Answer:
    """A greedy one."""
    logprobs = complete(cluster, model, prompt)
    return list(zip(logprobs.tokens or (), logprobs.token_logprobs or (), strict=True))


def until_close_call(cluster: Cluster, model: str, prompt: str) -> Answer:
    """A greedy answer as far as others can be asked for the same: rounding decides where two tokens are as likely."""
    logprobs = complete(cluster, model, prompt)
    found = []
    for token, logprob, top in zip(
        logprobs.tokens or (), logprobs.token_logprobs or (), logprobs.top_logprobs or (), strict=True
    ):
        first, second = sorted(top.values(), reverse=True)[:2]
        if first - second < 1e-2:
            break
        found.append((token, logprob))
    assert len(found) >= MIN_TOKENS
    return found


def complete(cluster: Cluster, model: str, prompt: str) -> Logprobs:
    reply = client(cluster).completions.create(
        model=model, prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    return logprobs


def chat(cluster: Cluster, model: str) -> tuple[str, int]:
    """A greedy answer, and the length of its prompt."""
    reply = client(cluster).chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=NUM_TOKENS, temperature=0
    )
    assert reply.usage is not None
    return reply.choices[0].message.content or "", reply.usage.prompt_tokens


def check_same(found: Answer, wanted: Answer, what: str) -> None:
    """As far as `wanted` goes."""
    found = found[: len(wanted)]
    assert [token for token, _ in found] == [token for token, _ in wanted], what
    assert [logprob for _, logprob in found] == pytest.approx([logprob for _, logprob in wanted], abs=1e-3), what


def load(cluster: Cluster, name: str, path: str) -> requests.Response:
    body = {"lora_name": name, "lora_path": path}
    return requests.post(f"{cluster.url}/v1/load_lora_adapter", json=body, timeout=60)


def served(cluster: Cluster) -> set[str]:
    reply = cluster.get("/v1/models")
    return set() if reply is None else {model["id"] for model in reply.json()["data"]}


def test_an_exact_delta_gives_back_the_fine_tune_bit_for_bit(
    fine_tunes: FineTunes, applied: dict[str, Sequence[str]]
) -> None:
    found = Path(applied["lossless"][1])
    wanted = load_file(fine_tunes.narrow / "model.safetensors")
    given_back = load_file(found / "model.safetensors")
    assert wanted.keys() == given_back.keys()
    assert all(torch.equal(wanted[name].view(torch.int16), given_back[name].view(torch.int16)) for name in wanted)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (found / name).read_bytes() == (fine_tunes.narrow / name).read_bytes()


def test_deltas_of_all_codecs_in_one_batch_answer_as_the_applied_models(serving: Cluster, expected: Expected) -> None:
    names = (MODEL, ADAPTER)
    alone = {name: {prompt: until_close_call(serving, name, prompt) for prompt in FEW_PROMPTS} for name in names}
    wanted = {**alone, **expected.answers}
    jobs = [(name, prompt) for prompt in FEW_PROMPTS for name in wanted]
    for _ in range(2):  # then with prompts from the prefix cache, which tells the fine-tunes apart
        with ThreadPoolExecutor(len(jobs)) as pool:
            answers = list(pool.map(lambda job: answer(serving, *job), jobs))
        for (name, prompt), found in zip(jobs, answers, strict=True):
            check_same(found, wanted[name][prompt], name)
    firsts = sorted(wanted[name][FEW_PROMPTS[0]][0][1] for name in (*names, "sign", "ternary", "lowrank", "dense"))
    gaps = [second - first for first, second in itertools.pairwise(firsts)]
    assert min(gaps) > 3e-3, "fine-tunes that change nothing"


def test_a_delta_brings_its_chat_template(serving: Cluster, expected: Expected) -> None:
    assert chat(serving, "sparse") == (expected.chat, expected.num_chat_tokens)
    assert chat(serving, MODEL)[1] != expected.num_chat_tokens


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated, "truncated"),
        (with_nan, "finite"),
        (of_another_base, "base"),
        (of_another_architecture, "base"),
        (with_another_probe, "probe"),
    ],
)
def test_a_bad_delta_is_refused_while_streams_go_on(
    serving: Cluster,
    fine_tunes: FineTunes,
    expected: Expected,
    root: Path,
    spoil: Callable[[Path, Path], None],
    reason: str,
) -> None:
    name = f"bad-{spoil.__name__}"
    spoil(fine_tunes.delta("sign"), root / name)
    before = served(serving)
    jobs = [(codec, prompt) for codec in ("sign", "lowrank", "dense") for prompt in FEW_PROMPTS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        streams = [pool.submit(answer, serving, *job) for job in jobs]
        reply = load(serving, name, name)
        answers = [stream.result() for stream in streams]
    for (codec, prompt), found in zip(jobs, answers, strict=True):
        check_same(found, expected.answers[codec][prompt], codec)
    assert reply.status_code == 400, reply.text
    assert reason in reply.text
    assert served(serving) == before


def test_paths_out_of_the_root_are_refused(serving: Cluster, fine_tunes: FineTunes, root: Path) -> None:
    (root / "link").symlink_to(fine_tunes.delta("sign"))
    for path in ("../outside", str(fine_tunes.delta("sign")), "link"):
        reply = load(serving, "escape", path)
        assert reply.status_code == 403, reply.text
    assert "escape" not in served(serving)


# ----------------------------------------------------------------------------------------------------------- publishing


def publish(cluster: Cluster, delta: Path, *arguments: str) -> str:
    return run_module("delta", "publish", "--name", "support", "--delta", str(delta), "--url", cluster.url, *arguments)


def test_a_published_delta_answers_under_its_name_and_a_bad_one_changes_nothing(
    serving: Cluster, fine_tunes: FineTunes, expected: Expected, tmp_path: Path
) -> None:
    other = expected.answers["ternary"][FEW_PROMPTS[0]]
    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(publish, serving, fine_tunes.delta("sign"), "--base", str(fine_tunes.base))
        while not publishing.done():  # other streams do not notice
            check_same(answer(serving, "ternary", FEW_PROMPTS[0]), other, "ternary")
        assert "published: support@v1" in publishing.result()
    check_support_is_v1(serving, expected)
    for spoil, reason in ((with_another_probe, "probe"), (of_another_base, "base"), (truncated, "truncated")):
        spoil(fine_tunes.delta("sign"), tmp_path / spoil.__name__)
        with pytest.raises(AssertionError, match=reason):
            publish(serving, tmp_path / spoil.__name__)
        check_support_is_v1(serving, expected)


def check_support_is_v1(cluster: Cluster, expected: Expected) -> None:
    for name in ("support", "support@prod", "support@v1"):
        check_same(answer(cluster, name, FEW_PROMPTS[0]), expected.answers["sign"][FEW_PROMPTS[0]], name)


def test_what_was_published_is_there_after_every_process_was_killed(serving: Cluster, expected: Expected) -> None:
    assert serving.controller is not None
    serving.controller.kill()
    serving.workers.pop().kill()
    serving.start_controller()
    serving.start_worker()

    wait_until(lambda: "support" in served(serving), 60, "support")
    check_support_is_v1(serving, expected)
