"""`python -m model_worker.engine.ops.cpu`: build the CPU kernels for this machine, so that no worker has to."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence

from model_worker.engine.ops.cpu.build import build_library, cached_library
from model_worker.engine.ops.cpu.machine_level import machine_levels
from registry.errors import RootgraftError
from registry.paths import default_cache_dir


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    levels = {level.name: level for level in machine_levels()}
    parser = argparse.ArgumentParser(
        prog="python -m model_worker.engine.ops.cpu", description=__doc__.split(": ", 1)[1]
    )
    parser.add_argument("--level", choices=levels, default=next(iter(levels)), help="(default: %(default)s, the best)")
    parser.add_argument("--list", action="store_true", help="list the levels that this machine runs, best first")
    options = parser.parse_args(argv)
    cache_dir = default_cache_dir(environ)
    if options.list:
        for level in levels.values():
            print(f"{level.name:<12} {cached_library(level, cache_dir) or 'not built'}")
        return 0
    began = time.monotonic()
    try:
        path = build_library(levels[options.level], cache_dir)
    except RootgraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.level}, {time.monotonic() - began:.1f} s")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
