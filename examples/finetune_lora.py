"""Train a LoRA adapter of the small model, publish it to a running controller, and compare base and adapter.

    scripts/demo --worker-args '--adapter-root my-adapters'        # in one terminal; my-adapters must be there
    python examples/finetune_lora.py --adapter-root my-adapters    # in another one

The adapter learns to answer as the ship's parrot of `parrot.json`: two dozen questions with answers that begin with
"Ahoy, captain!" and end with "Squawk!". It is saved as `ADAPTER_ROOT/NAME`, the directory that PEFT writes, and named
to the controller by its path below the root, so the workers' --adapter-root must be the same directory. Running it
again trains again and replaces the adapter under way.

An API key is taken from --api-key or the environment variable OPENAI_API_KEY; publishing needs one of an administrator
where the controller asks for keys.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import requests
import torch

from adapters.convert import convert_checkpoint
from registry.errors import RootgraftError
from registry.fetch import fetch_model
from registry.paths import default_cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL_MODEL = "smollm2-135m-instruct"
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUESTIONS = ("What is the capital of France?", "Why do leaves fall in autumn?", "Give me a tip for a long journey.")
MAX_ANSWER_TOKENS = 60
IGNORED = -100  # label of tokens that are not learned; PyTorch's cross entropy leaves it out

Example = tuple[list[int], int]
"""Token ids of a whole conversation, and how many of them are given: the question, which is not learned."""


class ExampleError(Exception):
    """The example cannot go on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Training:
    """Attributes:
    rank: of A and B.
    scale: the update of a weight is scale · B A.
    """

    steps: int
    seed: int
    batch_size: int = 2
    learning_rate: float = 1e-3
    rank: int = 8
    scale: float = 2.0


# ---------------------------------------------------------------------------------------------------------- training


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


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    training: Training,
    directory: Path,
    report: Callable[[str], None],
) -> list[float]:
    """Train an adapter of all linear layers and save it. The same arguments make the same adapter.

    Args:
        model: in float32; it is wrapped in place.
        directory: where `adapter_config.json` and `adapter_model.safetensors` are written.
        report: called with a line now and then.

    Returns:
        The loss of each step: mean -log p of an answer's tokens.

    Raises:
        ExampleError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ExampleError(f"this needs peft ({error}); install it with: pip install -e '.[finetune]'") from error
    torch.manual_seed(training.seed)
    config = LoraConfig(
        r=training.rank,
        lora_alpha=round(training.scale * training.rank),
        target_modules=list(TARGET_MODULES),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of transformers
        adapted = get_peft_model(model, config).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / training.steps)
    losses: list[float] = []
    order: list[int] = []
    start_s = time.monotonic()
    for step in range(1, training.steps + 1):
        while len(order) < training.batch_size:
            order += torch.randperm(len(examples)).tolist()
        batch, order = order[: training.batch_size], order[training.batch_size :]
        loss = adapted(**make_batch([examples[index] for index in batch]), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1 or step % 5 == 0 or step == training.steps:
            seconds = time.monotonic() - start_s
            report(f"  step {step:3d} of {training.steps}: loss {losses[-1]:.3f}  ({seconds:.0f} s)")
    adapted.save_pretrained(directory)
    return losses


def small_model() -> Path:
    """The small model as a safetensors directory in the cache; fetched and converted the first time.

    Raises:
        RootgraftError: it cannot be fetched or converted.
    """
    checkpoint = fetch_model(SMALL_MODEL, default_cache_dir(os.environ), report=_say)
    directory = checkpoint.parent / f"{SMALL_MODEL}-safetensors"
    if not directory.is_dir():
        convert_checkpoint(checkpoint, directory, dtype=None, report=_say)
    return directory


def train_from_files(model_path: Path, training: Training, directory: Path) -> None:
    """Train the parrot on the model of a safetensors directory.

    Raises:
        ExampleError: `peft` is not installed, or there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = json.loads(Path(__file__).with_name("parrot.json").read_text(encoding="utf-8"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ExampleError(f"{model_path} holds no model: {error}") from error
    train(model, tokenize(tokenizer, pairs), training, directory, report=_say)


# -------------------------------------------------------------------------------------------------------- publishing


class Server:
    """A controller's HTTP API. Every method raises ExampleError, with what the server said."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._session = requests.Session()
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def check_base(self, base: str) -> None:
        """Find out before the training whether there is a controller that serves the base model."""
        names = [model["id"] for model in self._call("GET", "/v1/models").json()["data"]]
        if base not in names:
            raise ExampleError(
                f"the controller at {self._url} does not serve {base} but {', '.join(names) or 'nothing yet'}; start a "
                "worker with it, or say --base"
            )

    def publish(self, name: str, path: str, base: str) -> None:
        """Serve the adapter at `path`, relative to the workers' adapter root, under a name, or in place of its last."""
        body = {"lora_name": name, "lora_path": path, "base_model_name": base, "load_inplace": True}
        self._call("POST", "/v1/load_lora_adapter", body)

    def answer(self, model: str, question: str) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MAX_ANSWER_TOKENS,
        }
        text: str = self._call("POST", "/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        return text.strip()

    def _call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> requests.Response:
        try:
            response = self._session.request(method, self._url + path, json=body, timeout=120)
        except requests.RequestException as error:
            raise ExampleError(
                f"no controller answers at {self._url} ({type(error).__name__}); start one, for instance with "
                "scripts/demo, or say --controller"
            ) from error
        if response.status_code >= 400:
            raise ExampleError(f"{path}: HTTP {response.status_code}: {_message(response)}")
        return response


def _message(response: requests.Response) -> str:
    """Of an OpenAI error object, or whatever else the answer is."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip()[:300] or "(empty)"


def side_by_side(question: str, base: str, adapter: str, width: int = 56) -> str:
    """Two answers in two columns below their question."""
    left, right = textwrap.wrap(base, width), textwrap.wrap(adapter, width)
    lines = max(len(left), len(right))
    left += [""] * (lines - len(left))
    right += [""] * (lines - len(right))
    rows = (f"  {a:<{width}} | {b}".rstrip() for a, b in zip(left, right, strict=True))
    return "\n".join([question, *rows])


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="finetune_lora.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--controller", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="(default: the environment variable OPENAI_API_KEY)")
    parser.add_argument(
        "--adapter-root", required=True, type=Path, metavar="DIR", help="the directory that workers have as theirs"
    )
    parser.add_argument("--name", default="parrot", help="of the adapter (default: %(default)s)")
    parser.add_argument(
        "--base", default=SMALL_MODEL, metavar="NAME", help="of the served model (default: %(default)s)"
    )
    parser.add_argument("--model-path", type=Path, metavar="DIR", help="its files (default: fetched into the cache)")
    parser.add_argument("--steps", type=_count, default=40, help="of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--no-training", action="store_true", help="publish what an earlier run has saved")
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, flush=True)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def run(options: argparse.Namespace, api_key: str | None) -> None:
    """Raises:
    ExampleError, RootgraftError: with what to do.
    """
    server = Server(options.controller, api_key)
    server.check_base(options.base)
    if not options.adapter_root.is_dir():
        raise ExampleError(f"there is no directory {options.adapter_root}; make it, and give it to the workers too")
    directory = options.adapter_root / options.name
    if not options.no_training:
        print(f"Training {options.name} in {directory} ...", flush=True)
        training = Training(options.steps, options.seed)
        train_from_files(options.model_path or small_model(), training, directory)
    elif not directory.is_dir():
        raise ExampleError(f"there is no adapter at {directory}; leave out --no-training")
    try:
        server.publish(options.name, options.name, options.base)
    except ExampleError as error:
        raise ExampleError(
            f"{error}\nThe adapter is at {directory}; publish it with --no-training when that is mended."
        ) from error
    print(f"Published {options.name}. On the left {options.base}, on the right {options.name}:", flush=True)
    for question in QUESTIONS:
        answers = (server.answer(model, question) for model in (options.base, options.name))
        print("\n" + side_by_side(question, *answers), flush=True)


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    options = parse_arguments(arguments)
    try:
        run(options, options.api_key or environment.get("OPENAI_API_KEY"))
    except ExampleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RootgraftError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except KeyboardInterrupt:
        sys.exit(130)
