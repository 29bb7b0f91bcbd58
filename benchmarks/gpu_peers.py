"""The same requests through another engine on the same GPU: tokens a second, and how many times as many ours makes.

    python benchmarks/gpu_peers.py --peer transformers --checkpoint DIR --ours 20000 --json FILE

`transformers` is its continuous batching (`generate_batch`), `vllm` is vLLM, where it is installed. Requests and model
are those of gpu_engine.py; time is from the first request to the last token, after a warm-up.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_checkpoint import DEVICE, LLAMA_8B, write_checkpoint
from gpu_engine import MAX_MODEL_LEN, NUM_REQUESTS, TOKENS_IN, TOKENS_OUT, seconds_of_process
from gpu_figures import Figure, Findings
from gpu_steps import random_prompts

TARGETS = {"transformers": 3.0, "vllm": 1.0}
SECONDS = 75.0  # for all, loading and warm-up included
_SECONDS_TO_END = 3.0
BATCHING: dict[str, Any] = {}  # settings of transformers' continuous batching: all as it chooses

Generate = Callable[[list[list[int]], int], int]
"""Prompts and how many tokens each gets -> tokens that came."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", choices=tuple(TARGETS), required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of the model of random weights")
    parser.add_argument("--ours", type=float, metavar="TOKENS_S", help="what gpu_engine.py measured")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="for all of it (%(default)g)")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    options = parser.parse_args(arguments)
    end_s = time.perf_counter() + options.seconds - seconds_of_process() - _SECONDS_TO_END
    figure = measure(options.peer, options.checkpoint, options.ours, end_s)
    findings = Findings(options.json)
    findings.add(figure)
    print(findings.table(), flush=True)
    os._exit(0)  # a run that was given up goes on in a thread


def measure(peer: str, checkpoint: Path, ours: float | None, end_s: float) -> Figure:
    """Args:
    end_s: of time.perf_counter, when the measured run is given up.
    """
    if importlib.util.find_spec(peer) is None:
        return figure_of(peer, None, ours, detail=f"{peer} is not installed")
    write_checkpoint(checkpoint, LLAMA_8B, DEVICE)
    generate = {"transformers": _transformers, "vllm": _vllm}[peer](checkpoint)
    generate(random_prompts(8, 64, LLAMA_8B["vocab_size"], seed=1), 8)
    prompts = random_prompts(NUM_REQUESTS, TOKENS_IN, LLAMA_8B["vocab_size"], seed=4000)
    limit_s = end_s - time.perf_counter()
    if limit_s < 1:
        return figure_of(peer, None, ours, detail="loading and warming up took all the time")
    return figure_of(peer, rate_within(lambda: generate(prompts, TOKENS_OUT), limit_s), ours)


def rate_within(run: Callable[[], int], limit_s: float) -> tuple[float, bool]:
    """Tokens a second, and whether that is all of them; a run that does not end in time is slower than the rate given.

    Raises:
        RuntimeError: it failed.
    """
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(run()), daemon=True)
    begin_s = time.perf_counter()
    thread.start()
    thread.join(limit_s)
    elapsed_s = time.perf_counter() - begin_s
    if thread.is_alive():
        return NUM_REQUESTS * TOKENS_OUT / elapsed_s, False
    if not found:
        raise RuntimeError("it failed; its message is above")
    return found[0] / elapsed_s, True


def figure_of(peer: str, rate: tuple[float, bool] | None, ours: float | None, detail: str = "") -> Figure:
    name, target = f"throughput against {peer}", TARGETS[peer]
    if rate is None:
        return Figure(name, None, "times", target, detail)
    tokens_s, is_complete = rate
    detail = f"{'' if is_complete else 'less than '}{tokens_s:,.0f} tokens/s"
    if ours is None:
        return Figure(f"{name}: its own", tokens_s, "tokens/s", None, detail)
    return Figure(name, ours / tokens_s, "times", target, f"ours {ours:,.0f}, {peer} {detail}")


def _transformers(checkpoint: Path) -> Generate:
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa").to(DEVICE).eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        settings = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers = model.generate_batch(
            inputs=prompts,
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(**BATCHING),
            progress_bar=False,
        )
        if len(answers) < len(prompts):  # it logs what has gone wrong, and goes on
            raise RuntimeError(f"transformers answered {len(answers)} of {len(prompts)} requests")
        return sum(len(answer.generated_tokens) for answer in answers.values())

    return generate


def _vllm(checkpoint: Path) -> Generate:
    import vllm

    llm = vllm.LLM(
        str(checkpoint), dtype="bfloat16", max_model_len=MAX_MODEL_LEN, max_num_seqs=256, enable_prefix_caching=False
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    return generate


if __name__ == "__main__":
    main()
