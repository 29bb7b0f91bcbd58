"""What a rank reads, and the memory that it takes for that, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model_worker.engine.models.decoder_parameters import parameter_shapes
from model_worker.engine.models.decoder_spec import read_spec

ROOT = Path(__file__).parents[3]
MIB = 2**20
NUM_RANKS = 2
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SCRIPT = """
import json, sys, threading
from pathlib import Path
import torch
from adapters.weights import iterate_weights
from adapters.stretches import Stretches
from model_worker.engine.load_report import LoadReport
from model_worker.engine.loader import load_model
from model_worker.engine.parallel.group import OneRank
from model_worker.engine.staged_weights import stage_weights
from tests.fakes.tiny_models import make_tiny_plan

def own_bytes():  # without what is mapped from files
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

class Peak:
    def __enter__(self):
        self.before = self.most = own_bytes()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.ended.wait(0.001):
            self.most = max(self.most, own_bytes())
    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()
        self.most = max(self.most, own_bytes()) - self.before

path, rank, num_ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
plan, cpu, report = make_tiny_plan(path, dtype="bfloat16"), torch.device("cpu"), LoadReport()
torch.set_num_threads(1)
torch.randn(1000, 1000).to(torch.bfloat16).float()
with Peak() as loading:
    model = load_model(plan, cpu, report, group=OneRank(rank, num_ranks))
share = sum({parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}.values())
del model
def half(name, shape):
    return Stretches(len(shape) - 1, ((0, shape[-1] // 2),))
with Peak() as staging:
    for _, tensor in stage_weights(iterate_weights(plan, select=half), cpu, num_slots=4, slot_bytes=2**22):
        del tensor
read = sum(tensor.num_bytes for tensor in report.tensors)
print(json.dumps({"share": share, "read": read, "loading": loading.most, "staging": staging.most}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    (path / "config.json").write_text(json.dumps(CONFIG))
    shapes = parameter_shapes(read_spec(CONFIG, 512))
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path / "model.safetensors"
    )
    return path


def _load(checkpoint: Path, rank: int) -> dict[str, int]:
    run = [sys.executable, "-c", SCRIPT, str(checkpoint), str(rank), str(NUM_RANKS)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    ended = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, check=True, text=True)
    found: dict[str, int] = json.loads(ended.stdout)
    return found


def test_ranks_together_read_the_file_once_and_none_holds_more_than_its_share(checkpoint: Path) -> None:
    num_bytes = (checkpoint / "model.safetensors").stat().st_size
    ranks = [_load(checkpoint, rank) for rank in range(NUM_RANKS)]
    assert num_bytes > 200 * MIB
    assert sum(rank["read"] for rank in ranks) < 1.001 * num_bytes
    for rank in ranks:
        assert rank["share"] < 0.501 * num_bytes
        assert rank["loading"] < rank["share"] + 16 * MIB
        # Four slots of 4 MiB, the largest tensor (32 MiB), and what is on its way beside it.
        assert rank["staging"] < 60 * MIB
