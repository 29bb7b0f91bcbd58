"""Choices that were measured, shipped as tables by device, and the command that makes them.

    tuned/<device>.json      {"device": ..., "made_with": {...}, "ops": {op: {shape class: {choice: number}}}}

A table is read when a model is built. Nothing is ever measured in a request; what a table does not have, each op
chooses by its own defaults.

    python -m model_worker.engine.ops.tuning --output model_worker/engine/ops/tuning/tuned
"""
