"""One model computed by several processes, its ranks: each holds a share of every weight and of the KV cache.

sharding.py                  how weights are divided, as data
transformers_divisions.py    ... those of transformers' models
divided_module.py            such a model, of which a rank keeps its share
group.py, process_group.py   sums over all ranks in the middle of a step
"""
