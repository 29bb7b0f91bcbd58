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
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import command_line
import torch
from command_line import end_with_status, say
from serving import Server, side_by_side
from training import (
    Example,
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

from registry.staged_directory import staged_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT = Path(__file__).with_name("parrot.json")
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
SCALE = 2.0  # the update of a weight is SCALE · B A
LEARNING_RATE = 1e-3
QUESTIONS = ("What is the capital of France?", "Why do leaves fall in autumn?", "Give me a tip for a long journey.")


def train_adapter(
    model: PreTrainedModel, examples: Sequence[Example], training: Training, directory: Path, report: Report
) -> list[float]:
    """Train an adapter of all linear layers and save it, in place of an earlier one in one step.

    The same arguments make the same adapter.

    Args:
        model: in float32; it is wrapped in place.
        directory: where `adapter_config.json` and `adapter_model.safetensors` are written.

    Returns:
        The loss of each step.

    Raises:
        ExampleError: `peft` is not installed.
        CheckpointError: `directory` is there and no adapter.
        InternalError: the disk is full, or the directory cannot be written.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ExampleError(f"this needs peft ({error}); install it with: pip install -e '.[finetune]'") from error
    torch.manual_seed(training.seed)  # A is random, B zero
    config = LoraConfig(
        r=RANK, lora_alpha=round(SCALE * RANK), target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of transformers
        adapted = get_peft_model(model, config)
    with staged_directory(directory, replaces=("adapter_config.json",)) as staging:
        losses = fit(adapted, examples, training, report)
        adapted.save_pretrained(staging)
        open_to_readers(staging)
    return losses


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_line.parser(__doc__, name="parrot", steps=40, text=TEXT)
    parser.add_argument(
        "--adapter-root", required=True, type=Path, metavar="DIR", help="the directory that workers have as theirs"
    )
    return parser.parse_args(arguments)


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
        say(f"Training {options.name} in {directory} ...")
        pairs = read_pairs(options.text)
        model, tokenizer = load(options.model_path or small_model(say))
        training = Training(options.steps, options.seed, LEARNING_RATE)
        train_adapter(model, tokenize(tokenizer, pairs), training, directory, report=say)
    elif not directory.is_dir():
        raise ExampleError(f"there is no adapter at {directory}; leave out --no-training")
    try:
        server.load_adapter(options.name, options.name, options.base)
    except ExampleError as error:
        raise ExampleError(
            f"{error}\nThe adapter is at {directory}; publish it with --no-training when that is mended."
        ) from error
    say(f"Published {options.name}. On the left {options.base}, on the right {options.name}:")
    for question in QUESTIONS:
        say("\n" + side_by_side(question, [server.answer(model, question) for model in (options.base, options.name)]))


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    options = parse_arguments(arguments)
    return end_with_status(lambda: run(options, options.api_key or environment.get("OPENAI_API_KEY")))


if __name__ == "__main__":
    command_line.start(main)
