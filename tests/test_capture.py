"""Recorded training steps (--cuda-graph): on a CPU the same function runs on the same fixed buffers, without a graph."""

import pytest
import torch

from tests import step_cases


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", step_cases.CASES, ids=lambda case: f"{case.paper} {case.name}")
def test_taken_batches_train_as_iterated_ones_do_bit_for_bit(case):
    """Two epochs of two full batches and a shorter one: weights, momentum, statistics and the epochs' numbers."""
    plain, _ = step_cases.train(case, "cpu", by_graph=False, images=20, batch=8)
    staged, _ = step_cases.train(case, "cpu", by_graph=True, images=20, batch=8)
    assert plain.keys() == staged.keys() and len(plain) > 20
    different = [name for name in plain if name != "results" and not torch.equal(plain[name], staged[name])]
    assert not different
    assert plain["results"] == staged["results"]
