"""What quantization costs in quality: a model with its weights in each precision against the same model in another.

    python benchmarks/quality.py --model-path DIR --precision bfloat16,int8,int4 --json results.json

The text is computed teacher-forced, in windows, by the engine's own model and KV cache. At each position, with p the
distribution of the reference and q that of the measured model over the next token:

    perplexity          exp(mean of -log q(token that follows in the text))
    KL                  mean of sum over tokens of p log(p / q), in nats
    top-1 agreement     share of positions where p and q have the same most likely token

A precision is a type of the weights (float32, bfloat16, float16), int8, int4, or stored: a GGUF file's own blocks. With
all but float32 and float16, keys and values are kept in what the worker would choose for --dtype auto.

--shift-channels N measures another checkpoint of the same function, in which all channels are N places further on
(shifted_checkpoint.py). Where a checkpoint was dequantized from groups of 32, quantizing it again on the same groups is
nearly exact and says little; the groups of the shifted one each lie across two of the old.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from arguments import new_file, positive_int
from precisions import PRECISIONS, precision_names
from report import describe_run, now, write_report
from shifted_checkpoint import write_shifted

from adapters import plan_load
from adapters.quantization import WeightPrecision
from adapters.tokenizer import load_tokenizer
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.ops.cpu.kernels import build_kernels
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.engine.ops.paged_attention import AttentionMetadata
from registry.paths import default_cache_dir

TEXT = Path(__file__).parent / "data" / "varied.txt"

_CHUNK = 256  # tokens of a step
_BLOCK_SIZE = 16
_MAX_GROUPS = 4  # layer groups that the KV cache has room for
_LOGIT_ROWS = 64  # rows of logits that are held at once


@dataclass(frozen=True, slots=True)
class Quality:
    """One precision, or several values of one: means over all positions of the text.

    Attributes:
        weights_bytes: what the plan counts for the weights.
        kl_error: standard error of `kl`.
    """

    precision: str
    weights: str
    dtype: str
    weights_bytes: int
    perplexity: float
    kl: float
    kl_error: float
    top1_agreement: float


class Measured:
    """A model in one precision."""

    def __init__(self, path: Path, precision: str, kernels: KernelLibrary, window: int, num_threads: int) -> None:
        dtype, quantization = PRECISIONS[precision]
        self.plan = plan_load(
            path,
            dtype=dtype,
            quantization=quantization,
            max_model_len=window,
            max_num_batched_tokens=_CHUNK,
            native_model_types=NATIVE_MODEL_TYPES,
        )
        config = EngineConfig(
            cache=CacheConfig(block_size=_BLOCK_SIZE, num_blocks=_MAX_GROUPS * -(-window // _BLOCK_SIZE)),
            scheduler=SchedulerConfig(max_num_batched_tokens=_CHUNK),
            num_threads=num_threads,
            model_impl="native",
        )
        self.runner = ModelRunner(self.plan, config, kernels=kernels)

    def log_probabilities(self, token_ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Log-probabilities of what follows each token, [up to 64, vocab] float32 at a time."""
        model = self.runner.model
        for start in range(0, len(token_ids), _CHUNK):
            chunk = torch.tensor(token_ids[start : start + _CHUNK])
            positions = torch.arange(start, start + len(chunk))
            (first, slots), *further = [
                self._batch_of_group(group, positions, len(token_ids)) for group in range(len(self.runner.groups))
            ]
            model.context.metadata, model.context.slot_mapping = first, slots
            model.context.further_groups = tuple(further)
            hidden = model(chunk, positions).clone()
            for rows in hidden.split(_LOGIT_ROWS):
                yield model.logits(rows).log_softmax(dim=-1)

    def _batch_of_group(
        self, group: int, positions: torch.Tensor, num_tokens: int
    ) -> tuple[AttentionMetadata, torch.Tensor]:
        """The blocks of a layer group follow each other."""
        block_size = self.runner.block_size
        num_blocks = -(-num_tokens // block_size)
        end = int(positions[-1]) + 1
        metadata = AttentionMetadata(
            block_tables=torch.arange(group * num_blocks, (group + 1) * num_blocks, dtype=torch.int32)[None],
            query_start=(0, len(positions)),
            seq_lens=(end,),
            positions=positions,
        )
        return metadata, group * num_blocks * block_size + positions


@torch.inference_mode()
def compare(measured: Measured, reference: Measured, windows: Sequence[Sequence[int]], precision: str) -> Quality:
    losses, divergences, agreements = [], [], []
    for window in windows:
        following = torch.tensor(window[1:])
        start = 0
        for q, p in zip(measured.log_probabilities(window), reference.log_probabilities(window), strict=True):
            tokens = following[start : start + len(q)]
            start += len(q)
            q, p = q[: len(tokens)], p[: len(tokens)]  # after the last token of the window there is none
            losses.append(-q.gather(1, tokens[:, None])[:, 0])
            divergences.append((p.exp() * (p - q)).sum(dim=1))
            agreements.append((p.argmax(dim=1) == q.argmax(dim=1)).float())
    loss, kl, agreement = torch.cat(losses), torch.cat(divergences), torch.cat(agreements)
    plan = measured.plan
    return Quality(
        precision=precision,
        weights=WeightPrecision(plan.quantization, plan.kept_types).describe(plan.checkpoint),
        dtype=plan.dtype,
        weights_bytes=plan.memory.weights_bytes,
        perplexity=round(math.exp(float(loss.mean())), 4),
        kl=round(float(kl.mean()), 6),
        kl_error=round(float(kl.std()) / math.sqrt(len(kl)), 6),
        top1_agreement=round(float(agreement.mean()), 5),
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint directory or GGUF file")
    parser.add_argument("--precision", default="float32,bfloat16,int8,int4", metavar="NAME,...", type=precision_names)
    parser.add_argument("--reference", choices=tuple(PRECISIONS), default="float32", help="(default: %(default)s)")
    parser.add_argument("--reference-path", type=Path, help="its checkpoint (default: that of --model-path)")
    parser.add_argument("--shift-channels", type=int, metavar="N", help="measure a checkpoint shifted by N channels")
    parser.add_argument("--text", type=Path, default=TEXT, help="(default: benchmarks/data/varied.txt)")
    parser.add_argument(
        "--window", type=positive_int, default=1024, help="tokens of one sequence (default: %(default)s)"
    )
    parser.add_argument("--num-threads", type=positive_int, default=1, help="(default: %(default)s)")
    parser.add_argument("--json", type=new_file, help="file for settings, machine and results")
    options = parser.parse_args(arguments)
    kernels = build_kernels(default_cache_dir(os.environ))
    reference = Measured(
        options.reference_path or options.model_path, options.reference, kernels, options.window, options.num_threads
    )
    token_ids = load_tokenizer(reference.plan.tokenizer_path).encode(options.text.read_text(encoding="utf-8"))
    windows = [token_ids[start : start + options.window] for start in range(0, len(token_ids), options.window)]
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        path = options.model_path
        if options.shift_channels is not None:
            path = write_shifted(options.model_path, Path(scratch) / "shifted", options.shift_channels)
        for precision in options.precision:
            measured = Measured(path, precision, kernels, options.window, options.num_threads)
            results.append(compare(measured, reference, windows, precision))
            print(json.dumps(asdict(results[-1])), flush=True)
    if options.json is not None:
        report = {
            **describe_run("quality.py", arguments, now()),
            "kernels": kernels.level.name,
            "quantized_activations": kernels.level.has_integer_dot,
            "text": options.text.name,
            "num_tokens": len(token_ids),
            "results": [asdict(result) for result in results],
        }
        write_report(report, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
