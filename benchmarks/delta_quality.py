"""How close deltas of one bit a weight come to their fine-tunes: ours against a scalar BitDelta delta.

    python benchmarks/delta_quality.py --base DIR --targets T1,T2 --json results.json

For each full fine-tune of the base, over the default prompts that no delta is made for (`delta/quality.py`):

    bitdelta    signs and one scale a matrix, the mean of |D|, for the linear layers; all else as in the fine-tune
    sign-r16    what `python -m delta make --codec sign --residual lowrank --rank 16` makes: every matrix of the model,
                for the inputs of the other default prompts
    sign-r16-any-inputs    the same with `--no-quality`, which knows no inputs

KL(fine-tune ‖ delta) in nats a token, the share of tokens with the same most likely successor, and of the fine-tune's
own answers the share of tokens that are the same. Bytes are those of the linear layers' terms.

Source: BitDelta, arXiv 2402.10193.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arguments import new_file
from report import describe_run, now, write_report
from torch import Tensor

from delta.apply import given_back
from delta.artifact import open_delta
from delta.checkpoint_tensors import open_checkpoint
from delta.codecs.policy import CodecPolicy
from delta.codecs.sign import encode_sign_with_one_scale
from delta.make import Calibration, Labels, make_delta
from delta.quality import QualityMeter
from delta.quality_prompts import default_prompts
from delta.reconstruct import reconstruct

POLICY = CodecPolicy("sign", residuals=("lowrank",), rank=16)
KINDS = ("bitdelta", "sign-r16", "sign-r16-any-inputs")


def scalar_bitdelta(base: Path, target: Path, linears: frozenset[str]) -> tuple[dict[str, Tensor], int]:
    """The weights that such a delta gives back, and the bytes of its terms."""
    weights, num_bytes = {}, 0
    with open_checkpoint(base) as ours, open_checkpoint(target) as theirs:
        for name in theirs.names():
            weights[name] = after = theirs.read(name)
            if name in linears:
                before = ours.read(name)
                term = encode_sign_with_one_scale(after.float() - before.float())
                num_bytes += term.parts["bits"].nbytes + term.parts["row_scale"].itemsize
                weights[name] = reconstruct(before, (term,), term.parts["row_scale"].dtype, tuple(after.shape))
    return weights, num_bytes


def shipped(
    base: Path, target: Path, calibration: Calibration | None, linears: frozenset[str], delta: Path
) -> tuple[dict[str, Tensor], int]:
    """The weights that a delta of ours gives back, and the bytes of its terms."""
    made = make_delta(base, target, delta, POLICY, labels=Labels(), calibration=calibration, report=print)
    with open_checkpoint(base) as ours, open_delta(delta) as opened:
        return dict(given_back(ours, opened)), sum(
            made.tensors[name].num_bytes for name in linears & made.tensors.keys()
        )


def measure(base: Path, target: Path, directory: Path) -> dict[str, Any]:
    """Every kind of delta of one fine-tune."""
    measured, others = default_prompts().halves()
    meter = QualityMeter(base, target, measured, calibration=(others,))
    with open_checkpoint(target) as tensors:
        linears = frozenset(tensors.names()) & meter.inputs.keys()
    found: dict[str, Any] = {}
    for kind in KINDS:
        if kind == "bitdelta":
            weights, num_bytes = scalar_bitdelta(base, target, linears)
        else:
            calibration = Calibration(measured.name, meter.inputs) if kind == "sign-r16" else None
            weights, num_bytes = shipped(base, target, calibration, linears, directory / kind)
        quality, _ = meter.measure(weights)
        found[kind] = {"bytes_of_linears": num_bytes, **asdict(quality)}
        print(f"{target.name} {kind}: {found[kind]}", file=sys.stderr, flush=True)
    found["kl_of_sign_r16_over_bitdelta"] = found["sign-r16"]["kl_mean"] / found["bitdelta"]["kl_mean"]
    return found


def table(found: Mapping[str, Any]) -> str:
    rows = ["| fine-tune | delta | bytes of linears | KL | base's KL | same top-1 | same answers |", "|" + "---|" * 7]
    for target, kinds in found.items():
        for kind in KINDS:
            at = kinds[kind]
            rows.append(
                f"| {target} | {kind} | {at['bytes_of_linears']:,} | {at['kl_mean']:.4f} | {at['base_kl_mean']:.3f} | "
                f"{at['top1']:.1%} | {at['answers']:.1%} |"
            )
    return "\n".join(rows)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="delta_quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, type=Path, metavar="DIR", help="safetensors directory")
    parser.add_argument("--targets", required=True, metavar="DIR,DIR,...", help="full fine-tunes of it")
    parser.add_argument("--json", type=new_file, help="file for machine and results")
    options = parser.parse_args(arguments)
    started_at = now()
    targets = [Path(part) for part in options.targets.split(",")]
    found = {}
    for target in targets:
        with tempfile.TemporaryDirectory(prefix="delta-quality-") as directory:
            found[target.name] = measure(options.base, target, Path(directory))
    print(table(found))
    if options.json is not None:
        names = ["--base", options.base.name, "--targets", ",".join(target.name for target in targets)]
        report = {
            **describe_run("delta_quality.py", names, started_at),
            "found": found,
        }
        write_report(report, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
