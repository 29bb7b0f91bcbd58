"""The thread on which adapters are read and bound."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_NICENESS = 5  # the engine's threads go first, but it gets a quarter of a processor that they share


def loader_thread() -> ThreadPoolExecutor:
    """A thread of low priority, begun when there is work for it, whose tensor work stays on it.

    With helpers it would be slower: it has hundreds of small operations, and at the end of each it would wait for
    helpers that wait for a processor, all of which the engine uses.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="lora-loader", initializer=_keep_to_itself)


def _keep_to_itself() -> None:
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # That holds for this thread, and for those that use torch for the first time from now on: tell these otherwise.
    other = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    other.start()
    other.join()
