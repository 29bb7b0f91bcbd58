"""Fine-tune all weights of the small model, publish what changed as a delta, and compare base, fine-tune and delta.

    python examples/finetune_full.py --out my-finetunes/support

The model learns to answer for the lamp shop of `support.json`. It is saved as an ordinary Hugging Face checkpoint in
bfloat16. `python -m delta make` then makes the delta OUT.delta and measures it, `python -m delta publish` gives it to
the controller, which rolls it out to the running workers. There its rows share a batch and one copy of the base's
weights with all others.

An API key is taken from --api-key or the environment variable OPENAI_API_KEY; publishing needs one of an administrator
where the controller asks for keys.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import command_line
import torch
from command_line import end_with_status, say
from serving import MAX_ANSWER_TOKENS, Server, side_by_side
from training import (
    ExampleError,
    Report,
    Training,
    fit,
    load,
    open_to_readers,
    read_pairs,
    small_model,
    tokenize,
)

from delta.delta_config import read_delta_config
from registry.companion_files import companion_files
from registry.staged_directory import staged_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT = Path(__file__).with_name("support.json")
Pairs = Sequence[tuple[str, str]]  # questions and answers
KEY_VARIABLE = "ROOTGRAFT_API_KEY"  # where `python -m delta` looks for an administrator's
LEARNING_RATE = 1e-4
QUESTIONS = ("How long is the warranty on your lamps?", "When is the shop open?", "May I send a lamp back?")


def train_model(base: Path, pairs: Pairs, training: Training, directory: Path, report: Report) -> list[float]:
    """Train all weights of the model in `base` and save it as `directory`, in bfloat16, in place of an earlier one.

    Config, tokenizer and chat template are the base's, byte for byte. The same arguments make the same model.

    Returns:
        The loss of each step.

    Raises:
        ExampleError: there is no model in `base`.
        CheckpointError: `directory` is there and no model.
        InternalError: the disk is full, or the directory cannot be written.
    """
    with staged_directory(directory, replaces=("config.json",)) as staging:
        model, tokenizer = load(base)
        losses = fit(model, tokenize(tokenizer, pairs), training, report)
        model.to(torch.bfloat16).save_pretrained(staging)
        for file in companion_files(base).values():
            shutil.copy(file, staging)
        open_to_readers(staging)
    return losses


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The most likely answer, computed here, without a server."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.eval().generate(**prompt, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
    text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def publish(
    name: str, base_name: str, base: Path, fine_tune: Path, pairs: Pairs, url: str, api_key: str | None
) -> Path:
    """Make the delta of a fine-tune, give it to the controller, and serve it under a name. -> the delta's directory

    Args:
        pairs: what the delta has to get right: its codecs are chosen by how well it does.

    Raises:
        ExampleError: it could not be made or published; `python -m delta` has said why.
    """
    delta = fine_tune.with_name(f"{fine_tune.name}.delta")
    prompts = fine_tune.with_name(f"{fine_tune.name}.prompts.json")
    prompts.write_text(json.dumps([_conversation(*pair) for pair in pairs], indent=2) + "\n", encoding="utf-8")
    environment = os.environ | ({KEY_VARIABLE: api_key} if api_key else {})
    make = ["make", "--base", base, "--target", fine_tune, "--out", delta, "--force", "--prompts", prompts]
    upload = ["publish", "--name", name, "--delta", delta, "--base", base, "--parent", base_name, "--url", url]
    for arguments in (make, upload):
        command = ["-m", "delta", *map(str, arguments)]
        say(f"$ python {shlex.join(command)}")
        if subprocess.run([sys.executable, *command], env=environment, check=False).returncode != 0:
            raise ExampleError(
                f"{name} was not published. The fine-tune is at {fine_tune}; go on with --no-training when that is "
                "mended."
            )
    return delta


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def size_and_quality(fine_tune: Path, delta: Path) -> str:
    """How large a delta is, and how far from its fine-tune."""
    sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in (fine_tune, delta)]
    lines = [f"fine-tune {sizes[0] / 1e6:.1f} MB, delta {sizes[1] / 1e6:.1f} MB: 1/{sizes[0] / sizes[1]:.1f} of it"]
    quality = read_delta_config(delta).quality
    if quality is not None:
        far = "" if quality.base_kl_mean is None else f" (that of the base: {quality.base_kl_mean:.4f})"
        lines.append(
            f"KL divergence from the fine-tune {quality.kl_mean:.4f} nats a token{far}, "
            f"same most likely token {quality.top1:.1%}, of the fine-tune's own answers {quality.answers:.1%}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace, api_key: str | None) -> None:
    """Raises:
    ExampleError, RootgraftError: with what to do.
    """
    server = Server(options.controller, api_key)
    server.check_base(options.base)
    base: Path = options.model_path or small_model(say)
    pairs = read_pairs(options.text)
    out: Path = options.out
    if not options.no_training:
        say(f"Training {options.name} in {out} ...")
        out.parent.mkdir(parents=True, exist_ok=True)
        training = Training(options.steps, options.seed, LEARNING_RATE)
        train_model(base, pairs, training, out, report=say)
    model, tokenizer = load(out)
    delta = publish(options.name, options.base, base, out, pairs, server.url, api_key)
    say("\n" + size_and_quality(out, delta))
    say(f"From left to right {options.base}, the fine-tune by itself, and the delta served as {options.name}:")
    for question in QUESTIONS:
        answers = [
            server.answer(options.base, question),
            answer(model, tokenizer, question),
            server.answer(options.name, question),
        ]
        say("\n" + side_by_side(question, answers))


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    parser = command_line.parser(__doc__, name="support", steps=80, text=TEXT)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the fine-tune is saved, as an ordinary checkpoint"
    )
    options = parser.parse_args(arguments)
    return end_with_status(lambda: run(options, options.api_key or environment.get("OPENAI_API_KEY")))


if __name__ == "__main__":
    command_line.start(main)
