"""Two ranks train, test and count like one: the loops of the papers, on networks that look at each image alone.

Batch norm would not: each process normalises by its own part of a batch, as in the originals. So it is replaced by
group norm, with the same parameters, which the optimizer of the script holds already.
"""

from unittest import mock

import torch
from torch import nn

from tests.ranks import run_in_ranks
from tests.step_cases import random_images

IMAGES, BATCH = 7, 5  # two steps: 5 images, of which rank 0 gets 2, and 2
CPU = torch.device("cpu")
DEEPSHIFT = ["--arch=lenet", "--embedded-data", f"--batch-size={BATCH}", "--seed=3", "--device=cpu", "--lr=0.01",
             "--wd=0.01"]  # fmt: skip
DEEPSHIFT_CASES = {
    "Q": ["--shift-type=Q"],
    "PS": ["--shift-type=PS", "--lr-sign=0.02"],
    "accumulated": ["--shift-type=Q"],
}
S3 = ["--dataset=digits", "--arch=resnet8", f"--batch-size={BATCH}", "--seed=3", "--device=cpu", "--epochs=2"]
S3_CASES = {"s3": ["--rs=0.01"], "denseshift": ["--method=denseshift"]}


class Quiet:
    """The lines of a pass, not printed."""

    def loaded(self):
        pass

    def advance(self, *found):
        pass


def without_batch_norm(net):
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                group = nn.GroupNorm(1, child.num_features)
                group.weight, group.bias = child.weight, child.bias
                setattr(module, name, group)


def everything(net, optimizer, *results):
    found = {f"net {name}": tensor.detach() for name, tensor in net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer {index} {name}": value for name, value in state.items() if value is not None}
    numbers = [[result.loss, result.top1, result.top5, float(result.seen)] for result in results]
    return found | {"results": torch.tensor(numbers, dtype=torch.float64)}


def shifted_by_rank(net, rank):
    """Running statistics that are others in each rank, as after an epoch."""
    generator = torch.Generator().manual_seed(rank)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape, generator=generator))
    return net


def deepshift_steps(rank, size):
    """Per case the weights after two steps and a test of a network with batch norm."""
    from deepshift import cifar10, engine
    from deepshift.training import Training

    found, world, task = {}, engine.World(rank, size, rank, size), cifar10.Cifar10(cifar10.parse_args)
    for name, flags in DEEPSHIFT_CASES.items():
        args = cifar10.parse_args([*DEEPSHIFT, *flags])
        args.batch_multiplier = 2 if name == "accumulated" else 1  # of imagenet.py, whose networks are larger
        with mock.patch("deepshift.tasks.load_digits_set", random_images(IMAGES)):
            training = Training(task, args, CPU, world)
            loader, test = task.loaders(args, training.seed, CPU, world)
        step = training.new_step()
        training.set_rates(0)
        trained = engine.train_one_epoch(step, loader, Quiet(), epoch=0)
        tested = engine.evaluate(training.net, test, world=world)
        found[name] = everything(training.net, training.optimizer, trained, tested)
    args = cifar10.parse_args([*DEEPSHIFT, "--arch=resnet20"])
    net = shifted_by_rank(Training(task, args, CPU, world).net, rank)
    found["batch norm"] = everything(net, torch.optim.SGD(net.parameters()), engine.evaluate(net, test, world=world))
    return found


def s3_steps(rank, size):
    from s3 import engine, inputs, main
    from s3.training import Training

    found, world = {}, engine.World(rank, size, rank, size)
    for name, flags in S3_CASES.items():
        args = main.parse_args([*S3, *flags])
        with mock.patch("s3.inputs.load_digits_set", random_images(IMAGES)):
            loaders = inputs.make_loaders(args, 3, CPU, world)
        training = Training(main.S3Task(), args, CPU, world, 3, 10)
        without_batch_norm(training.net)
        step = training.new_step()
        training.set_rate(0)
        trained = engine.train_one_epoch(step, loaders.train, Quiet(), epoch=0)
        tested = engine.evaluate(training.net, loaders.test, world=world)
        found[name] = everything(training.net, training.optimizer, trained, tested)
    net = shifted_by_rank(Training(main.S3Task(), args, CPU, world, 3, 10).net, rank)
    tested = engine.evaluate(net, loaders.test, world=world)
    found["batch norm"] = everything(net, torch.optim.SGD(net.parameters()), tested)
    return found


def steps(rank, size):
    return {"deepshift": deepshift_steps(rank, size), "s3": s3_steps(rank, size)}


def test_two_ranks_end_where_one_does():
    alone, (first, second) = steps(0, 1), run_in_ranks("tests.test_ranks:steps")
    for paper, cases in alone.items():
        for case, expected in cases.items():
            assert expected["results"][:, 3].tolist() == [IMAGES] * len(expected["results"]), "images counted"
            assert any("momentum" in name for name in expected) == (case != "batch norm")
            for name, value in expected.items():
                one, two = first[paper][case][name], second[paper][case][name]
                assert torch.equal(one, two), f"{paper}, {case}: {name} differs between the ranks"
                # float32, whose sums over a batch of 5 in two parts are rounded in another order
                difference = (one - value).abs().max()
                assert difference <= 1e-4 * value.abs().max(), f"{paper}, {case}: {name} is off by {difference}"
