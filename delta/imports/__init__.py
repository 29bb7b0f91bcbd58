"""Fine-tunes that others store as differences, as deltas of ours.

write_import.py       what all have in common: `Changes`, and how a delta is written from them
bitdelta.py           BitDelta's diff.pt
weight_difference.py  a model directory that holds differences, as FastChat makes them
peft_adapter.py       a LoRA adapter, merged into the weights
"""
