"""Training steps that wait for nothing, and their recording (--cuda-graph).

On a CPU the same function runs on the same fixed buffers, without a graph; tests/capture_gpu.py has the rest.
"""

import importlib
from pathlib import Path

import pytest
import torch

from deepshift import optim
from shiftresnet import capture as any_capture  # they are equal: test_the_five_copies_are_equal
from tests import step_cases

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("shiftresnet", "deepshift", "s3", "shared_bases", "epsilon_resnet")
ONE_OF_EACH = {case.paper: case for case in reversed(step_cases.CASES)}.values()
SCRIPTS = (
    "shiftresnet.main --arch=shiftresnet20", "deepshift.mnist", "deepshift.cifar10", "deepshift.imagenet",
    "s3.main --dataset=cifar10 --arch=resnet20", "s3.main_eval --dataset=cifar10 --arch=resnet20",
    "shared_bases.train_cifar10", "shared_bases.train_cifar100", "shared_bases.train_ilsvrc",
    "epsilon_resnet.cifarEpsilonResnet --cifar10", "epsilon_resnet.svhnEpsilonResnet",
    "epsilon_resnet.imagenetEpsilonResnet --gpu=0",
)  # fmt: skip


def test_the_five_copies_are_equal():
    texts = {paper: (ROOT / paper / "capture.py").read_bytes() for paper in PAPERS}
    different = [paper for paper, text in texts.items() if text != texts[PAPERS[0]]]
    assert not different, f"copy the edited capture.py over the others: {', '.join(different)} differ"


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


def test_losses_are_looked_at_every_hundred_steps_and_at_the_end():
    losses, looked = any_capture.LossLog("cpu"), []
    losses.every = 100
    losses.start(250)
    values = torch.arange(250.0)
    values[137], values[138] = float("nan"), float("inf")
    for done, value in enumerate(values, start=1):
        losses.add(value)
        if (bad := losses.first_bad(done)) is not None:
            looked.append((done, *bad))
    assert [entry[:2] for entry in looked] == [(200, 137)] and looked[0][2] != looked[0][2]
    buffer = losses.losses
    losses.start(250)
    assert losses.losses is buffer  # a recorded step goes on writing there
    for done in range(1, 251):
        losses.add(torch.tensor(-float("inf") if done == 250 else 1.0, dtype=torch.float64))
        assert losses.first_bad(done) == ((249, -float("inf")) if done == 250 else None)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.paper)
def test_a_loss_that_is_not_finite_is_named_alike_however_late_it_is_seen(case, monkeypatch):
    """Epoch and batch of the first one, whether each step is looked at or, as on a GPU, a hundred together."""
    capture, run = (importlib.import_module(f"{case.paper}.{name}") for name in ("capture", "run"))
    seen = []
    for every in (1, 100):
        original = capture.LossLog.__init__

        def late(self, device, every=every, original=original):
            original(self, device)
            self.every = every

        with monkeypatch.context() as patch, pytest.raises(run.RunError) as caught:
            patch.setattr(capture.LossLog, "__init__", late)
            step_cases.train(case, "cpu", by_graph=False, images=36, batch=8, rate=1e12)
        seen.append(str(caught.value))
    # what follows a first NaN is NaN; the first is the same one
    assert seen[0] == seen[1] and "epoch" in seen[0] and "batch" in seen[0] and "try" in seen[0]


@pytest.mark.parametrize("words", SCRIPTS)
def test_a_graph_on_a_cpu_is_refused_with_one_line(words, tmp_path, capsys):
    script, *flags = words.split()
    module, engine = importlib.import_module(script), importlib.import_module(script.split(".")[0] + ".engine")
    flags += ["--cuda-graph", "--embedded-data", "--device=cpu", f"--output-dir={tmp_path}", "--train-size=256"]
    assert engine.run_script(module.main, flags) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: --cuda-graph needs a GPU; leave it out on the CPU"
    assert not list(tmp_path.rglob("*.p*"))


def test_what_a_graph_does_not_go_with():
    fine = {"processes": 1, "amp": "bf16", "compiled": False}
    assert any_capture.why_not("cuda:1", **fine) is None
    refused = ({"processes": 2}, "torchrun"), ({"amp": "fp16"}, "--amp bf16"), ({"compiled": True}, "--compile")
    for change, words in refused:
        assert words in any_capture.why_not("cuda:1", **{**fine, **change})


def test_optimizers_that_count_their_steps_on_the_host_are_refused():
    parameter = torch.nn.Parameter(torch.ones(3))
    built = {name: optim.build_optimizer(name, [parameter], 0.1) for name in optim.OPTIMIZERS}
    refused = [name for name, optimizer in built.items() if not optim.make_capturable(optimizer, "cuda")]
    assert refused == ["adagrad"]


def test_a_checkpoint_does_not_decide_where_steps_are_counted():
    """A run with --cuda-graph goes on without it, and the other way round."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    recorded, plain = (optim.build_optimizer("radam", [parameter], 0.1) for parameter in parameters)
    parameters[0].grad = torch.ones(3)
    recorded.step()
    state = recorded.state_dict()
    state["param_groups"][0]["capturable"] = True
    optim.load_state(plain, state)
    assert plain.param_groups[0]["capturable"] is False
    parameters[1].grad = torch.ones(3)
    plain.step()  # would raise on a CPU
    with pytest.raises(ValueError, match="group"):
        optim.load_state(plain, {**state, "param_groups": state["param_groups"] * 2})


class PretendGraph:
    """Stands for a CUDA graph where there is no GPU: notes when it is recorded and replayed."""

    log: list = []

    def capture_begin(self, pool, capture_error_mode):
        self.log.append("record")

    def capture_end(self):
        pass

    def replay(self):
        self.log.append("replay")

    def pool(self):
        return "pool"


def test_steps_warm_up_are_recorded_and_replayed(monkeypatch):
    """Three as they are, then one recording for each learning rate; the shorter last batch of an epoch as it is."""
    graph, ran = any_capture.StepGraph("cpu"), []
    monkeypatch.setattr(PretendGraph, "log", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    graph.stream = Stream()

    class Loader:
        batch_sizes = [8, 8, 8, 8, 8, 3]

        def stage(self):
            ran.append("stage")

        def take(self, count):
            return "images", "targets"

    def step(images, targets, size):
        ran.append(size)
        return len(ran)

    for rate in (0.1, 0.1, 0.01):
        results = list(any_capture.run_steps(step, Loader(), graph=graph, kind=lambda rate=rate: (rate,)))
        assert len(results) == 6
    first = ["stage", 8, 8, 8, 8, 3]  # the fourth is recorded, which runs its Python code, and replayed twice
    assert ran == [*first, "stage", 3, "stage", 8, 3]
    assert PretendGraph.log == ["record", "replay", "replay", *["replay"] * 5, "record", *["replay"] * 5]


class Stream:
    """Stands for a CUDA stream."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, other):
        pass
