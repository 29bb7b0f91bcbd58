"""`python -m model_worker`: load one model and serve it. `python -m model_worker inspect`: see inside it."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence

# Read by OpenMP when torch is loaded. The engine shares its cores with event loops, here and in the controller: long
# spinning at barriers then loses whole time slices, ten times the step (benchmarks/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "500")

import psutil
import torch

from adapters import plan_load
from adapters.plan_report import plan_rows
from model_worker.applied_model import applied_model
from model_worker.config import WorkerConfig, parse_config
from model_worker.engine.async_llm_engine import AsyncLLMEngine
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.machine import find_machine
from model_worker.engine.ops.cpu.build import start_background_build
from model_worker.engine.ops.cpu.machine_level import machine_levels
from model_worker.engine.step_profiler import make_profiler
from model_worker.identity import weights_digest
from model_worker.model_source import find_model
from model_worker.signature_check import make_signature_check
from model_worker.worker import Worker, bind
from registry.errors import RootgraftError
from registry.paths import default_cache_dir

TOKEN_VARIABLE = "ROOTGRAFT_WORKER_TOKEN"
_LEAVING_S = 30.0  # that the interpreter has for ending


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] == "inspect":
            return _inspect(argv[1:], environ)
        config = parse_config(argv, worker_token=environ.get(TOKEN_VARIABLE))
        logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        with bind(config.host, config.port) as sock:
            return _serve(config, sock, environ)
    except RootgraftError as error:
        print(f"error: {' '.join(error.message.split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while loading; later, SIGINT drains
        return 130


def _inspect(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    # Imported here because it needs transformers' modeling code, 3 s of import that serving need not spend.
    from model_worker.inspection import command

    return command.main(argv, environ)


def _serve(config: WorkerConfig, sock: socket.socket, environ: Mapping[str, str]) -> int:
    cache_dir = default_cache_dir(environ)
    check_signature = make_signature_check(config.signatures)
    if check_signature is not None:
        for delta in config.deltas:
            check_signature(delta)
    has_deltas = bool(config.deltas)
    source = find_model(config.model, name=config.model_name, cache_dir=cache_dir, report=_say, has_deltas=has_deltas)
    machine = find_machine(config.engine, cache_dir, quantization=config.quantization)
    plan = plan_load(
        applied_model(source.path, config.deltas, cache_dir),
        dtype=config.dtype,
        quantization=config.quantization,
        chat_template=config.chat_template,
        max_model_len=config.max_model_len,
        deltas=config.deltas,
        max_num_batched_tokens=config.engine.scheduler.max_num_batched_tokens,
        memory_bytes=machine.memory_bytes,
        native_bf16=machine.native_bf16,
        native_model_types=machine.native_model_types,
    )
    _say(f"Loading {source.name}:")
    for row, text in plan_rows(plan):
        _say(f"  {row:<14} {text}")
    engine_died = asyncio.Event()
    digest = weights_digest(plan, cache_dir)
    profiler = make_profiler(config.profile, title=f"model_worker {source.name}")
    inner = LLMEngine.from_plan(
        plan, config.engine, machine=machine, variant_digest=digest, profiler=profiler, report=_say
    )
    gc.collect()
    gc.freeze()  # else a full collection walks through all that loading made, and every stream stops for 0.1 s
    engine = AsyncLLMEngine(inner, on_failure=engine_died.set)
    resident = psutil.Process().memory_info().rss
    _say(f"Loaded: {inner.cache_summary()}; {torch.get_num_threads()} threads, {resident / 2**30:.2f} GiB of memory.")
    could_use_kernels = machine.device.type == "cpu" and config.engine.tensor_parallel_size == 1
    if could_use_kernels and machine.kernels is None and config.engine.model_impl != "transformers":
        start_background_build(machine_levels()[0], cache_dir)
    worker = Worker(
        engine,
        plan,
        config,
        sock,
        model_name=source.name,
        digest=digest,
        cache_dir=cache_dir,
        check_signature=check_signature,
        engine_died=engine_died,
    )
    return asyncio.run(worker.run(_say))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    status = main()
    # Where ranks were lost, NCCL may wait for them without bound. A thread of Python would not run any more.
    faulthandler.dump_traceback_later(_LEAVING_S, exit=True)
    sys.exit(status)
