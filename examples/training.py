"""What the examples' trainings share: a text of questions and answers, batches of it, and the loop over the steps."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adapters.convert import convert_checkpoint
from registry.fetch import fetch_model
from registry.paths import default_cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL_MODEL = "smollm2-135m-instruct"
IGNORED = -100  # label of tokens that are not learned; PyTorch's cross entropy leaves it out

Report = Callable[[str], None]
"""Called with a line for the user."""

Example = tuple[list[int], int]
"""Token ids of a whole conversation, and how many of them are given: the question, which is not learned."""


class ExampleError(Exception):
    """The example cannot go on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Training:
    """One run over shuffled examples with a learning rate that falls to zero."""

    steps: int
    seed: int
    learning_rate: float
    batch_size: int = 2


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Pairs of question and answer from a JSON file.

    Raises:
        ExampleError: there is no such file, or it holds something else.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
        return [(str(question), str(answer)) for question, answer in pairs]
    except (OSError, TypeError, ValueError) as error:
        raise ExampleError(f"{path} is no list of pairs [question, answer]: {error}") from error


def tokenize(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Example]:
    """Question and answer as the server's chat endpoint puts them, with the token that ends the answer."""
    examples = []
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        given_ids = tokenizer(given, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        examples.append((given_ids + answer_ids + [tokenizer.eos_token_id], len(given_ids)))
    return examples


def make_batch(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Pad on the right. -> input_ids, attention_mask, labels, each [len(examples), longest]"""
    longest = max(len(ids) for ids, _ in examples)
    input_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (ids, num_given) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, num_given : len(ids)] = torch.tensor(ids[num_given:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def fit(model: torch.nn.Module, examples: Sequence[Example], training: Training, report: Report) -> list[float]:
    """Train the parameters that require gradients with AdamW. The same arguments give the same values.

    Args:
        model: takes a batch and answers with a `loss`. In float32: bfloat16 takes three times as long
            where the processor has no instructions for it.

    Returns:
        The loss of each step: mean -log p of an answer's tokens.
    """
    torch.manual_seed(training.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / training.steps)
    losses: list[float] = []
    order: list[int] = []
    start_s = time.monotonic()
    model.train()
    for step in range(1, training.steps + 1):
        while len(order) < training.batch_size:
            order += torch.randperm(len(examples)).tolist()
        batch, order = order[: training.batch_size], order[training.batch_size :]
        loss = model(**make_batch([examples[index] for index in batch]), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1 or step % 5 == 0 or step == training.steps:
            seconds = time.monotonic() - start_s
            report(f"  step {step:3d} of {training.steps}: loss {losses[-1]:.3f}  ({seconds:.0f} s)")
    return losses


def small_model(report: Report) -> Path:
    """The small model as a safetensors directory in the cache; fetched and converted the first time.

    Raises:
        RootgraftError: it cannot be fetched or converted.
    """
    checkpoint = fetch_model(SMALL_MODEL, default_cache_dir(os.environ), report=report)
    directory = checkpoint.parent / f"{SMALL_MODEL}-safetensors"
    if not directory.is_dir():
        convert_checkpoint(checkpoint, directory, dtype=None, report=report)
    return directory


def load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in float32, and tokenizer of a safetensors directory.

    Raises:
        ExampleError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), tokenizer
    except (OSError, ValueError) as error:
        raise ExampleError(f"{directory} holds no model: {error}") from error


def open_to_readers(directory: Path) -> None:
    """Give the weights the mode of `config`-files beside them: safetensors keeps what it writes to its owner, whatever
    the umask, and a worker may run as somebody else."""
    mode_of = next(directory.glob("*config.json"))
    for weights in directory.glob("*.safetensors"):
        shutil.copymode(mode_of, weights)
