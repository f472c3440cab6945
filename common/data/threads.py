"""Run a function that releases the interpreter lock over a range, on as many threads as torch uses."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def run_chunks(function: Callable[[int, int], None], size: int, smallest: int) -> None:
    """Call function(start, stop) so that the calls cover [0, size) once; the calling thread takes the first part.

    No part is smaller than `smallest` unless it is the only one. Safe from several threads and after a fork, which
    numba's own parallel loops are not. Raises what the function raises.
    """
    parts = max(1, min(torch.get_num_threads(), size // smallest))
    bounds = [size * part // parts for part in range(parts + 1)]
    if parts == 1:
        return function(0, size)
    others = [_pool(os.getpid()).submit(function, *bounds[part : part + 2]) for part in range(1, parts)]
    try:
        function(*bounds[:2])
    finally:
        for other in others:
            other.result()


@functools.lru_cache(maxsize=1)
def _pool(process_id):
    """One pool per process: the threads of a pool do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="augment")
