"""Make a delta and measure how close it is to its fine-tune; with the codec "auto" as finely as that needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from delta.apply import given_back
from delta.artifact import open_delta
from delta.checkpoint_tensors import open_checkpoint
from delta.codecs.policy import CodecPolicy
from delta.delta_config import CONFIG_FILE, DeltaConfig
from delta.make import Calibration, Labels, make_delta, policy_reached
from delta.output_path import check_apart
from delta.quality import QualityMeter
from delta.quality_gate import QualityGate, QualityTooLowError
from delta.quality_prompts import QualityPrompts, default_prompts
from delta.quality_record import Probe, Quality
from registry.atomic_file import temporary_file
from registry.digest import Progress
from registry.staged_directory import check_target


def make_measured_delta(
    base: Path,
    target: Path,
    out: Path,
    policy: CodecPolicy,
    *,
    prompts: QualityPrompts,
    gate: QualityGate | None,
    labels: Labels,
    force: bool = False,
    report: Callable[[str], None],
    progress: Progress | None = None,
) -> DeltaConfig:
    """`make_delta`, and what its quality is; with the codec "auto" finer and finer, until the gate admits it.

    Every second prompt of those given and of the default ones is not measured: low-rank terms are made for the inputs
    that the fine-tune's layers get from them.

    Args:
        gate: None: admits everything.

    Raises:
        QualityTooLowError: the gate does not admit what a named codec makes.
        And all that `make_delta` and `QualityMeter` raise.
    """
    check_apart(out, base, target)
    # Before all that takes time: the output can be written, and both models are whole.
    check_target(out, (CONFIG_FILE,) if force else ())
    with temporary_file(out.parent), open_checkpoint(base), open_checkpoint(target):
        pass
    report("computing the fine-tune and the base")
    measured, others = prompts.halves()
    _, of_default = default_prompts().halves()
    calibrating = (others,) if others == of_default else (others, of_default)
    meter = QualityMeter(base, target, measured, calibration=calibrating)
    calibration = Calibration(prompts.name, meter.inputs)
    goal = None if gate is None else asdict(gate)
    policy = policy_reached(base, target, out, policy, calibration=calibration, goal=goal)

    def check(quality: Quality) -> None:
        if gate is not None and not gate.admits(quality):
            raise QualityTooLowError(
                f"the delta's KL divergence from the fine-tune is {quality.kl_mean:.4f} nats a token (the base's: "
                f"{quality.base_kl_mean or 0:.4f}), and of the fine-tune's answers {quality.answers:.1%} are the same; "
                f"asked for are {gate.asks_for(quality)}: take a finer codec, or other bounds with --max-kl and "
                "--min-answers if that is good enough"
            )

    def judge(directory: Path) -> tuple[Quality, Probe]:
        report("comparing the delta with the fine-tune")
        with open_checkpoint(base) as ours, open_delta(directory) as delta:
            return meter.measure(dict(given_back(ours, delta)), check=check)

    while True:
        try:
            return make_delta(
                base,
                target,
                out,
                policy,
                labels=labels,
                force=force,
                calibration=calibration,
                goal=goal,
                judge=judge,
                report=report,
                progress=progress,
            )
        except QualityTooLowError as error:
            finer = policy.finer() if policy.codec == "auto" else None
            if finer is None:
                raise
            report(f"{error.message.partition(';')[0]}; making it again with {_shown(finer)}")
            policy = finer


def _shown(policy: CodecPolicy) -> str:
    residuals = "".join(f" + {name}" for name in policy.residuals)
    return f"{policy.codec}{residuals}" + (f" of rank {policy.rank}" if "lowrank" in policy.residuals else "")
