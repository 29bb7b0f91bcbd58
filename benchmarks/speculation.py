"""What speculative decoding gains where text repeats itself, and costs where it does not. Offline, in this process.

    python benchmarks/speculation.py --model-path SmolLM2-135M-Instruct.Q4_1.gguf --streams 1,8 --json results.json

Two engines hold the same model, one with `--speculation ngram`, one with `off`, and answer the same prompts in turns:

    repeat         a text to be repeated word for word; greedy
    chat           eight unlike questions; greedy
    chat-sampled   the same questions at temperature 1

The best of `--repeats` rounds is reported for each, because whatever else the machine does only adds to a run. Answers
that differ between the two are counted: there are none with kernels that compute a row alike in every batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass

from arguments import new_file
from report import describe_run, now, write_report

from model_worker.engine.config import EngineConfig, SpeculationConfig
from model_worker.engine.llm import LLM
from model_worker.engine.sampling_params import SamplingParams

_STORY = (
    "The lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the hundred and twelve "
    "steps, lit the lamp, and wrote the weather in his book. He had done so for thirty years, and in all that time he "
    "had missed only one night, when a storm took the roof off his house. Children from the village came on Sundays."
)
_QUESTIONS = (
    "Why is the sky blue?",
    "Write a poem about rain.",
    "How do I bake bread?",
    "What is a prime number?",
    "Tell me about Rome.",
    "Explain gravity to a child.",
    "Give me tips for a job interview.",
    "Describe the ocean.",
)
TASKS: dict[str, tuple[SequenceOf[str], float]] = {
    "repeat": ([f"Repeat this text word for word:\n\n{i}. {_STORY}" for i in range(1, 9)], 0.0),
    "chat": (_QUESTIONS, 0.0),
    "chat-sampled": (_QUESTIONS, 1.0),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One task at one number of streams; rates in output tokens per second, prompts included."""

    task: str
    num_streams: int
    off_tokens_per_s: float
    ngram_tokens_per_s: float
    speedup: float
    num_drafts: int
    num_accepted: int
    num_different_answers: int


def measure(engines: dict[str, LLM], task: str, num_streams: int, *, output_tokens: int, repeats: int) -> Result:
    messages, temperature = TASKS[task]
    best_s = dict.fromkeys(engines, float("inf"))
    answers: dict[str, list[list[int]]] = {}
    num_drafts = num_accepted = 0
    for _ in range(repeats):
        for name, llm in engines.items():
            prompts = [_render(llm, messages[i % len(messages)]) for i in range(num_streams)]
            params = [
                SamplingParams(temperature=temperature, seed=i, max_tokens=output_tokens, ignore_eos=True)
                for i in range(num_streams)
            ]
            before = llm.engine.stats()
            start_s = time.perf_counter()
            found = llm.generate(prompts, params)
            best_s[name] = min(best_s[name], time.perf_counter() - start_s)
            answers[name] = [generation.outputs[0].token_ids for generation in found]
            after = llm.engine.stats()
            num_drafts += after.draft_tokens_total - before.draft_tokens_total
            num_accepted += after.accepted_draft_tokens_total - before.accepted_draft_tokens_total
    num_tokens = num_streams * output_tokens
    return Result(
        task,
        num_streams,
        off_tokens_per_s=round(num_tokens / best_s["off"], 1),
        ngram_tokens_per_s=round(num_tokens / best_s["ngram"], 1),
        speedup=round(best_s["off"] / best_s["ngram"], 3),
        num_drafts=num_drafts,
        num_accepted=num_accepted,
        num_different_answers=sum(a != b for a, b in zip(answers["off"], answers["ngram"], strict=True)),
    )


def _render(llm: LLM, message: str) -> list[int]:
    assert llm.plan.chat_template is not None, "this benchmark needs a chat model"
    text = llm.plan.chat_template.render([{"role": "user", "content": message}])
    return llm.engine.tokenizer.encode(text, add_special_tokens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="checkpoint directory or GGUF file of a chat model")
    parser.add_argument("--streams", default="1,8", help="numbers of sequences at once, separated by commas")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=new_file, help="write the result here")
    args = parser.parse_args()
    started_at = now()
    engines = {
        name: LLM(args.model_path, EngineConfig(speculation=SpeculationConfig(speculation=name)), max_model_len=2048)
        for name in ("off", "ngram")
    }
    results = []
    for task in TASKS:
        for num_streams in map(int, args.streams.split(",")):
            result = measure(engines, task, num_streams, output_tokens=args.output_tokens, repeats=args.repeats)
            print(result)
            results.append(result)
    if args.json is not None:
        found = {"results": [asdict(result) for result in results]}
        write_report({**describe_run("speculation.py", sys.argv[1:], started_at), **found}, args.json)


if __name__ == "__main__":
    main()
