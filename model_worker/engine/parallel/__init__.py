"""One model computed by several processes, its ranks: each holds a share of every weight and of the KV cache.

sharding.py, variant_sharding.py                how weights and variants are divided, as data
transformers_divisions.py, divided_module.py    transformers' models, of which a rank keeps its share
divided_decoder.py, token_hooks.py              the same for the GPU's decoder; embedding and head of both

group.py, process_group.py                      sums over all ranks in the middle of a step
start.py, ranks.py                              rank 0 starts the others, talks to them, and watches them
rank_process.py, messages.py                    what another rank does, and what it is told
leading_steps.py, shared_variants.py            steps and variants on rank 0, which the others get too
"""
