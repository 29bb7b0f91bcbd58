"""python -m model_worker.engine.ops.tuning: measure the choices of the ops on this GPU, and write its table."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch

from compression.grouped_weight import GROUP
from model_worker.engine.ops.tuning.attention_problems import attention_problems
from model_worker.engine.ops.tuning.quantized_problems import quantized_problems
from model_worker.engine.ops.tuning.search import choices_of, search
from model_worker.engine.ops.tuning.tuned_table import write_table

_LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_worker.engine.ops.tuning", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("tuned"), help="folder of the tables (default: shipped)"
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="NxK",
        help="outputs and inputs of a weight; may be given again (default: those of an 8B Llama)",
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU.")
    device = torch.device("cuda", torch.cuda.current_device())
    found = []
    problems = chain(
        attention_problems(device, heads=(32, 8), head_dim=128, decode=(64, 8192), prompt=4096),
        quantized_problems(tuple(arguments.shape or _LLAMA_8B), device),
    )
    for problem in problems:
        answer = search(problem, _milliseconds)
        found.append(answer)
        default = "cannot be launched" if answer.default_ms is None else f"{answer.default_ms * 1e3:8.1f} us"
        print(f"{problem.shape_class:34} {answer.best_ms * 1e3:8.1f} us, default {default}  {dict(answer.choice)}")
    import triton

    made_with = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    print(write_table(torch.cuda.get_device_name(device), choices_of(found), made_with, arguments.output))


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if match is None or int(match[2]) % GROUP:
        raise argparse.ArgumentTypeError(
            f"expected outputs and inputs of a weight such as 4096x14336, inputs a multiple of {GROUP}, got {text!r}"
        )
    return int(match[1]), int(match[2])


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=50, return_mode="median"))


if __name__ == "__main__":
    main()
