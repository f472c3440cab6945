"""What tests/fake_cuda.py promises: faults of a GPU are seen, and who waits for it is counted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.fake import kernels
from tests.fake.child import run
from tests.fake.log import ROOT, steady
from tests.test_fake_cuda import require_device

MIXTURE = "Expected all tensors to be on the same device, but found cpu and cuda:0"


class WithForgottenTensor(nn.Module):
    """A network whose mean is no buffer, so that it stays behind when the network moves."""

    def __init__(self):
        super().__init__()
        self.layer, self.mean = nn.Linear(4, 3), torch.zeros(4)

    def forward(self, x):
        return self.layer(x - self.mean)


def forgotten_tensor():
    WithForgottenTensor().to("cuda")(torch.zeros(2, 4, device="cuda"))


def targets_on_the_host():
    F.cross_entropy(nn.Linear(4, 3, device="cuda")(torch.zeros(2, 4, device="cuda")), torch.tensor([0, 1]))


def two_gpus():
    torch.zeros(3, device="cuda:0") + torch.zeros(3, device="cuda:1")


def sum_on_the_host():
    torch.zeros(()).add_(torch.zeros((), device="cuda"))


def gradient_of_the_host():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return torch.zeros(grad.shape)

    Wrong.apply(torch.zeros(3, device="cuda", requires_grad=True)).sum().backward()


def device_without_a_number():
    torch.cuda.set_device(torch.device("cuda"))


def device_that_is_not_there():
    torch.zeros(3, device="cuda:1")


def numpy_of_the_device():
    torch.zeros(3, device="cuda").numpy()


def visible_devices_too_late():
    import os

    assert torch.cuda.device_count() == 2
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    torch.cuda.device_count()


FAULTS = [
    (forgotten_tensor, 1, MIXTURE),
    (targets_on_the_host, 1, MIXTURE),
    (two_gpus, 2, "but found cuda:0 and cuda:1"),
    (sum_on_the_host, 1, MIXTURE),
    (gradient_of_the_host, 1, r"WrongBackward returned an invalid gradient: ((3,), 'cpu') for ((3,), 'cuda:0')"),
    (device_without_a_number, 1, "Expected a torch.device with a specified index"),
    (device_that_is_not_there, 1, "invalid device ordinal"),
    (numpy_of_the_device, 1, "Use Tensor.cpu() to copy the tensor to host"),
    (visible_devices_too_late, 2, "before CUDA_VISIBLE_DEVICES became 1"),
]


@pytest.mark.parametrize(("fault", "gpus", "words"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_faults_of_devices_raise(fault, gpus, words, tmp_path):
    outcome = run(fault, gpus=gpus, folder=tmp_path)
    assert outcome["status"] == 1 and words in outcome["output"], outcome.text


def call_operator(returns: str):
    """An operator whose kernel gives float32 (4, 2) on x's device; its fake implementation `returns` something else."""
    wrong = {"dtype": lambda x: x.new_empty(4, 2, dtype=torch.float64), "shape": lambda x: x.new_empty(2, 4),
             "layout": lambda x: x.new_empty(2, 4).t(), "right": lambda x: x.new_empty(4, 2),
             "device": lambda x: torch.empty(4, 2, device="cuda:1")}  # fmt: skip
    library = torch.library.Library("effnets", "FRAGMENT")
    library.define("of_a_test(Tensor x) -> Tensor")
    library.impl("of_a_test", lambda x: x.new_zeros(4, 2), "CompositeExplicitAutograd")
    torch.library.register_fake("effnets::of_a_test", wrong[returns], lib=library)
    torch.ops.effnets.of_a_test(torch.zeros(2, device="cuda"))


@pytest.mark.parametrize("returns", ["right", "dtype", "shape", "layout", "device"])
def test_a_wrong_fake_implementation_raises(returns, tmp_path):
    outcome = run(call_operator, returns, gpus=2, folder=tmp_path)
    if returns == "right":
        assert outcome["status"] == 0, outcome.text
    else:
        assert outcome["status"] == 1 and "its fake implementation gives" in outcome["output"], outcome.text


def what_waits():
    x, host = torch.ones(4, device="cuda"), torch.ones(4)
    assert (x.sum().item(), x.tolist(), x.cpu().tolist()) == (1.0, [1.0] * 4, [1.0] * 4)
    assert not (x > 1).any() and (x > 0).all() and torch.equal(x, x)
    host.copy_(x)
    x[x > 0], x.nonzero(), repr(x)
    torch.cuda.synchronize()
    torch.tensor([1.0, 2.0], device="cuda"), host.to("cuda"), x.copy_(host), x[torch.tensor([0, 1])]
    host.to("cuda", non_blocking=True)


def what_does_not_wait():
    x, host = torch.ones(4, device="cuda"), torch.ones(4)
    host.pin_memory().to("cuda", non_blocking=True)
    x * 2 + host[0], x.add_(host[0]), torch.where(x > 0, x, 0.5), x.index_select(0, x.long())
    x.to("cuda"), x.clone(), x.max()
    torch.zeros(3, device="cuda"), torch.arange(3, device="cuda"), host.sum().item(), host.numpy(), x.shape
    nn.Linear(4, 2).double().half(), host[host > 0].tolist()


def test_waiting_is_counted(tmp_path):
    outcome = run(what_waits, folder=tmp_path)
    assert outcome["status"] == 0, outcome.text
    kinds = [row[0] for row in outcome["events"] for _ in range(row[-1])]
    assert {kind: kinds.count(kind) for kind in kinds} == {"read": 10, "wait": 1, "upload": 5}, outcome["events"]


def test_what_does_not_wait_is_not_counted(tmp_path):
    outcome = run(what_does_not_wait, folder=tmp_path)
    assert outcome["status"] == 0, outcome.text
    uploads = [row for row in outcome["events"] if row[0] != "upload"]
    assert not uploads and not outcome["events"], outcome["events"]


def train_with_reads(every: int):
    """Five steps, a read every so many and one at the end."""
    network, images = nn.Linear(4, 3).to("cuda"), torch.zeros(2, 4, device="cuda")
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network.train()
    for step in range(5):
        loss = network(images).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            loss.item()
    loss.item()


@pytest.mark.parametrize(("every", "often"), [(1, 1.0), (2, 1 / 3), (5, 0)])
def test_reads_of_a_step_are_told_from_those_around(every, often, tmp_path):
    outcome = run(train_with_reads, every, folder=tmp_path)
    assert outcome["parameters"] == {"cuda:0": 10}, outcome.text
    assert sum(steady(outcome, training=True).values()) == pytest.approx(often)


def record(what: str):
    """A graph of one addition, and what must not happen to it."""
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    stream = torch.cuda.default_stream() if what == "default stream" else torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        y = x + 1
        if what == "read":
            y.sum().item()
        if what == "upload":
            torch.tensor([1.0], device="cuda")
    if what == "freed":
        x = torch.ones(3, device="cuda")
    if what == "replaced":
        x.data = torch.ones(3, device="cuda")
    if what == "in place":
        x.copy_(y)
    graph.replay()


RECORDED = {"nothing": None, "in place": None, "read": "not permitted when stream is capturing",
            "upload": "not permitted when stream is capturing", "freed": "whose input of shape (3,) was freed",
            "replaced": "whose input of shape (3,) was freed", "default stream": "non-default stream"}  # fmt: skip


@pytest.mark.parametrize("what", RECORDED)
def test_faults_of_recorded_steps_raise(what, tmp_path):
    outcome = run(record, what, folder=tmp_path)
    words = RECORDED[what]
    assert outcome["status"] == (0 if words is None else 1) and (words or "") in outcome["output"], outcome.text
    assert outcome["replays"] == (words is None)


def test_work_on_the_host_is_noticed(tmp_path):
    """A script that quietly uses the CPU ends well, and fails the tests all the same."""
    flags = ["--type=linear", "--embedded-data", "--train-size=64", "--epochs=1", "--device=cpu"]
    outcome = run(str(ROOT / "deepshift" / "mnist.py"), *flags, folder=tmp_path)
    assert outcome["status"] == 0, outcome.text
    with pytest.raises(AssertionError, match="were not on cuda:0: .*deepshift/"):
        require_device(outcome, "mnist.py", "cuda:0")


GOOD = {"stem": "shift2d", "name": "shift2d_planes_4", "grid": [1, 1, 1], "block": [32, 4, 1],
        "kinds": ["u8", "u8", *["i4"] * 8], "shared": 0}  # fmt: skip
WRONG = [
    ({"name": "shift2d_planes_3"}, "has no kernel"),
    ({"kinds": ["u8", "u8", *["i4"] * 7]}, "arguments"),
    ({"kinds": ["u8", "u8", *["i4"] * 7, "i8"]}, "arguments"),
    ({"kinds": ["u8", "u8", *["i4"] * 7, "f4"]}, "arguments"),
    ({"grid": [1, 65536, 1]}, "grid"),
    ({"grid": [2**31, 1, 1]}, "grid"),
    ({"grid": [0, 1, 1]}, "grid"),
    ({"block": [1024, 2, 1]}, "threads"),
    ({"block": [1, 1, 128]}, "block"),
    ({"shared": 48 * 1024 + 1}, "shared memory"),
]


@pytest.mark.parametrize(("change", "words"), [({}, None), *WRONG])
def test_faults_of_launches_are_found(change, words):
    found = kernels.faults(GOOD | change)
    assert (not found) if words is None else (len(found) == 1 and words in found[0]), found
