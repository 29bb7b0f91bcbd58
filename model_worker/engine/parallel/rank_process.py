"""A rank other than 0: `python -m model_worker.engine.parallel.rank_process STEPS VARIANTS`, started by rank 0.

It loads its share of the model, computes the batches that it is sent, and ends with rank 0, however that ends. Whatever
goes wrong in a step ends it too: the others' sums would wait for it for ever.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from model_worker.engine.gpu_memory import binding_variants
from model_worker.engine.lora.bound_variant import BoundVariant, VariantHost
from model_worker.engine.lora.loader_thread import loader_thread
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.causal_model import CausalModel
from model_worker.engine.parallel.messages import Assignment, Bind, Ready, Step, Weight, send
from model_worker.engine.parallel.process_group import STEP_TIMEOUT_S, ProcessGroup, join_store
from registry.errors import InternalError, RootgraftError

logger = logging.getLogger(__name__)


def main(steps: Connection, variants: Connection) -> None:
    """Load and compute; the arguments are this rank's ends of the connections of messages.py."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group of processes: rank 0 decides what happens
        signal.signal(number, signal.SIG_IGN)
    try:
        assignment: Assignment = steps.recv()
    except EOFError:
        return
    share = BoundShare()
    threading.Thread(target=_answer, args=(variants, share, torch.device(assignment.device)), daemon=True).start()
    try:
        runner, group = _load(assignment)
    except RootgraftError as error:
        logger.error("Rank %d could not load its share: %s", assignment.rank, error.message)
        send([steps], error)
        return
    gc.collect()
    gc.freeze()  # as on rank 0: else all ranks wait for a collection that walks through all that loading made
    share.model = runner.model
    send([steps], Ready())
    _compute(steps, runner, group, share)


class BoundShare:
    """What this rank has of the variants; used by both threads.

    Attributes:
        model: once it is loaded; nobody asks before.
        bound: by number.
    """

    def __init__(self) -> None:
        self.model: CausalModel | None = None
        self.bound: dict[int, BoundVariant] = {}

    def drop(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            self.bound.pop(number, None)


def _load(assignment: Assignment) -> tuple[ModelRunner, ProcessGroup]:
    device = torch.device(assignment.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = ProcessGroup(
        partial(join_store, assignment.port, assignment.num_ranks),
        rank=assignment.rank,
        size=assignment.num_ranks,
        device=device,
    )
    runner = ModelRunner(assignment.plan, assignment.config, device=assignment.device, group=group)
    group.wait_at_most(STEP_TIMEOUT_S)
    return runner, group


@torch.inference_mode()
def _compute(steps: Connection, runner: ModelRunner, group: ProcessGroup, share: BoundShare) -> None:
    """Until rank 0 is gone. A step's calls are those that rank 0 makes, in the same order."""
    while True:
        try:
            step: Step = steps.recv()
        except EOFError:
            return
        bound = {number: share.bound[key] for number, key in step.variants.items()}
        share.drop(step.dropped)
        runner.steps.move_blocks(step.batch.blocks)
        if step.batch.pending:  # tokens that only rank 0 has drawn
            group.broadcast(runner.steps.drawn)
        hidden = runner.steps.forward(step.batch, bound)
        for rows in step.batch.prompt_rows:
            runner.steps.prompt_logits(rows, hidden, bound)
        if len(step.batch.logit_rows):
            runner.steps.logits(step.batch, hidden, bound)


def _answer(variants: Connection, share: BoundShare, device: torch.device) -> None:
    """Until rank 0 is gone, with which this process ends, wherever its other thread waits."""
    loader = loader_thread()
    while True:
        try:
            request: Bind | Weight = variants.recv()
            send([variants], loader.submit(carry_out, request, share, device).result())
        except (EOFError, OSError):
            os._exit(0)
        except Exception:  # rank 0 waits for an answer, and sees that this process ends
            logger.exception("A rank could not answer.")
            os._exit(1)


def carry_out(request: Bind | Weight, share: BoundShare, device: torch.device) -> object:
    """The answer to a request; raises nothing, because rank 0 waits for one."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread has its own
        with binding_variants():
            return _weight(request, share) if isinstance(request, Weight) else _bind(request, share)
    except RootgraftError as error:
        error.__traceback__ = error.__cause__ = None  # it is sent
        return error
    except Exception as error:  # a bug: it ends this variant, not the server
        logger.exception("A rank could not do its part of a variant.")
        return InternalError(f"A rank could not do its part of the variant ({type(error).__name__}); see the log.")


def _weight(request: Weight, share: BoundShare) -> Tensor | None:
    assert isinstance(share.model, VariantHost)
    find = share.model.base_weight if request.kind == "weight" else share.model.base_bias
    try:
        return find(request.module).cpu()
    except KeyError:
        return None


def _bind(request: Bind, share: BoundShare) -> int:
    assert isinstance(share.model, VariantHost)
    share.drop(request.dropped)
    bound = share.bound[request.number] = share.model.bind(request.terms)
    return bound.num_bytes


def _run(steps: Connection, variants: Connection) -> int:
    """Its exit status; whatever goes wrong is in the log."""
    try:
        main(steps, variants)
    except Exception:
        logger.exception("A rank has failed.")
        return 1
    return 0


if __name__ == "__main__":
    status = _run(Connection(int(sys.argv[1])), Connection(int(sys.argv[2])))
    sys.stderr.flush()
    os._exit(status)  # NCCL's destructors would wait for sums to which the others do not come
