"""An inspection as JSON: sizes in bytes, times in nanoseconds or seconds as the names say."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from model_worker.inspection.inspection import Inspection
from model_worker.inspection.op_totals import overhead_share, totals_by_kind, totals_by_layer

SCHEMA_VERSION = 1


def to_json(inspection: Inspection) -> dict[str, Any]:
    """Every field of the inspection, and the sums that its readers need; a section not asked for is null."""
    shown: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(inspection)}
    if inspection.footprint is not None:
        names = inspection.footprint.precisions
        shown["footprint"] |= {
            "num_parameters": inspection.footprint.num_parameters,
            "weights_bytes": {name: inspection.footprint.weights_bytes(name) for name in names},
        }
    if inspection.load is not None:
        load = inspection.load
        shown["load"] |= {"file_bytes": load.file_bytes, "total_s": load.total_s, "bytes_per_s": load.bytes_per_s}
    if inspection.trace is not None:
        for phase, trace in (("prefill", inspection.trace.prefill), ("decode", inspection.trace.decode)):
            shown["trace"][phase] |= {
                "overhead_share": overhead_share(trace),
                "by_kind": [dataclasses.asdict(total) for total in totals_by_kind(trace)],
                "by_layer": [dataclasses.asdict(total) for total in totals_by_layer(trace)],
            }
    return shown


def format_json(inspection: Inspection) -> str:
    return json.dumps(to_json(inspection), indent=1, ensure_ascii=False) + "\n"
