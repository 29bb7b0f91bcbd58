from __future__ import annotations

import threading

import torch

from model_worker.engine.lora.loader_thread import loader_thread


def test_only_the_loader_has_a_single_thread_for_tensors() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        thread = loader_thread()
        assert thread.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        later: list[int] = []
        other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert later == [2]
        assert thread.submit(torch.get_num_threads).result() == 1
        thread.shutdown()
    finally:
        torch.set_num_threads(before)
