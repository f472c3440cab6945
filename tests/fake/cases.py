"""Every training script with the smallest run that has a middle, and what tests its files afterwards."""

from dataclasses import dataclass, field

import pytest

from tests.fake.log import ROOT

QUIET, FEW = "--print-freq=1000", ("--train-size=360", "--batch-size=120")
SMALL = ("--embedded-data", "--image-size=32")
MNIST = ("deepshift/mnist.py", "--type=conv", "--shift-type=PS", "--embedded-data", "--test-batch-size=120")
LENET = ("deepshift/cifar10.py", "--arch=lenet", "--embedded-data", "--batch-size=120", QUIET)
SQUEEZE = ("deepshift/imagenet.py", "--arch=squeezenet1_1", "--shift-type=PS", "--shift-depth=3", *SMALL, "--workers=0",
           "--batch-size=120", QUIET)  # fmt: skip
DIGITS = ("--dataset=digits", "--arch=resnet8", "--batch-size=120", QUIET)
PLAIN = ("s3/main_eval.py", "-e", *DIGITS, "--resume=plain.pth.tar")
BASES = {"10": "ResNet32_DoubleShared", "100": "ResNet34_SingleShared"}
COMPRESS = ("epsilon_resnet/compressModel.py", "--embedded-data")
PRUNED = "would be pruned but passed images on"  # what --verify finds in a network of ones


@dataclass(frozen=True)
class Case:
    """script and flags: of the training. evaluations: (script, *flags), and after `ends` the error it must end with."""

    script: str
    flags: tuple[str, ...]
    evaluations: tuple[tuple[str, ...], ...] = ()
    ends: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return str(ROOT / self.script)


def _shared_bases(number, *others):
    model, few = f"--model={BASES[number]}", ("--embedded-data", "--batch_size=120")
    file = f"--pretrained=checkpoint/CIFAR{number}-{BASES[number]}-S16-U1-L10-0.pth"
    return Case(f"shared_bases/train_cifar{number}.py", (model, *few, "--train-size=360"),
                ((f"shared_bases/eval_cifar{number}.py", model, *few, file), *others))  # fmt: skip


def _epsilon(name, *flags):
    """A CIFAR or SVHN script of epsilon-ResNet: 6 steps in two epochs, then compressed."""
    log, file = "train_log.x", "--cfg=train_log.x/compressed_model_6.cfg"
    few = ("--embedded-data", "--train-size=150", "--batch_size=50")
    compressed = (f"epsilon_resnet/{name}CompressedResnet.py", "--gpu=0", *flags, file, "--embedded-data")
    verified = (*COMPRESS, f"--dir={log}", "--step=6", "--verify", "--criterion=gate")
    return Case(
        f"epsilon_resnet/{name}EpsilonResnet.py",
        ("-n=2", "-o=x", *flags, *few),
        ((*COMPRESS, f"--dir={log}", "--step=6"), compressed, verified),
        {verified: PRUNED},
    )


def variant(name, *flags, gpus=1, environment=None, device="cuda:0"):
    """A case for one epoch, with other flags or on a machine that looks otherwise."""
    case = next(case for case in CASES if case.script == name)
    return pytest.param(case, flags, gpus, environment or {}, device, id=" ".join([name, *flags, *(environment or ())]))


_WEIGHTS = "--resume=models/mnist/simple_conv/shift_ps_all_wb_5/weights"
_SQUEEZED = "--weights=models/imagenet/squeezenet1_1/shift_ps_3_wb_5/weights.packed"
_LOG = "train_log/imagenetEpsilonResnet"
_GPU = ("--gpu=0", "-d=18", *SMALL, "--workers=0")
CASES = [
    Case("shiftresnet/main.py", ("--arch=shiftresnet20", "--embedded-data", "--train-size=150", "--batch_size=50"),
         (("shiftresnet/eval.py", "--model=checkpoint/*.t7", "--embedded-data"),)),
    Case(MNIST[0], (*MNIST[1:], "--opt=radam", "--log-interval=1000", *FEW),
         ((*MNIST, "-e", f"{_WEIGHTS}.pth"), (*MNIST, "-e", f"{_WEIGHTS}.packed", "--use-kernel=True"))),
    Case(LENET[0], (*LENET[1:], "--shift-type=Q", "--opt=ranger", "--train-size=360"),
         ((*LENET, "--shift-type=Q", "-e", "--use-kernel=True",
           "--resume=models/cifar10/lenet/shift_q_all_wb_5/model_best.pth.tar"),
          (*LENET, "-e", "--use-kernel=True"))),
    Case(SQUEEZE[0], (*SQUEEZE[1:], "--train-size=360"),
         ((*SQUEEZE, "-e", _SQUEEZED), (*SQUEEZE, "-e", _SQUEEZED, "--use-kernel=True"))),
    Case("s3/main.py", (*DIGITS, "--train-size=360"),
         (("s3/main.py", "-e", *DIGITS, "--resume=model_best.pth.tar"),
          ("s3/convert.py", "model_best.pth.tar", "plain.pth.tar"), PLAIN, (*PLAIN, "--use-kernel"))),
    Case("s3/main_eval.py", ("--arch=resnet18", QUIET, *FEW, *SMALL, "--workers=0")),
    _shared_bases("10", ("shared_bases/modelsize.py", "--repeats=2")),
    _shared_bases("100"),
    Case("shared_bases/train_ilsvrc.py", ("--model=ResNet18", "--train-size=360", "--batch_size=120", *SMALL,
                                          "--workers=0"),
         (("shared_bases/eval_ilsvrc.py", "--model=ResNet18", *SMALL, "--workers=0", "--batch_size=120",
           "--pretrained=checkpoint/ILSVRC-ResNet18-S32-U1-L10-0.pth"),)),
    _epsilon("cifar", "--cifar10"),
    _epsilon("svhn"),
    Case("epsilon_resnet/imagenetEpsilonResnet.py", (*_GPU, "--train-size=150", "--batch_size=50"),
         (("epsilon_resnet/imagenetEpsilonResnet.py", *_GPU, "--eval", f"--load={_LOG}/model-6.pth"),
          (*COMPRESS, "--dir=train_log", "--step=6"),
          ("epsilon_resnet/imagenetCompressedResnet.py", *_GPU, "--eval", f"--load={_LOG}/compressed_model_6.pth",
           f"--cfg={_LOG}/compressed_model_6.cfg"))),
]  # fmt: skip

SCRIPTS = {script for case in CASES for script in (case.script, *(command[0] for command in case.evaluations))}
VARIANTS = [  # --amp=fp16: its scaler decides on the host
    variant("shiftresnet/main.py", "--arch=resnet20", "--reduction-mode=shuffle", "--amp=fp16"),
    variant("deepshift/cifar10.py", "--shift-type=PS", "--opt=adam", "--alternate-update=True"),
    variant("deepshift/cifar10.py", "--shift-type=PS", "--opt=rmsprop", "--freeze=True", "--rounding=stochastic"),
    variant("deepshift/cifar10.py", "--shift-type=PS", "--opt=adadelta", "--amp=fp16"),
    variant("deepshift/imagenet.py", "--workers=2"),
    variant("s3/main.py", "--method=denseshift", "--weight-bits=4", "--deterministic"),
    variant("s3/main.py", "--weight-bits=2", "--amp=fp16"),
    variant("shared_bases/train_ilsvrc.py", "--amp=fp16"),
    variant("epsilon_resnet/cifarEpsilonResnet.py", "--plain", "--amp=fp16"),
    variant("epsilon_resnet/imagenetEpsilonResnet.py", "--fake", "--steps_per_epoch=3"),
]
NAMES_OF_DEVICES = [
    variant("shiftresnet/main.py", "--device=cuda", gpus=2),
    variant("deepshift/cifar10.py", "--gpu=1", gpus=2, device="cuda:1"),
    variant("deepshift/cifar10.py", gpus=2, environment={"CUDA_VISIBLE_DEVICES": "1"}),
    variant("s3/main_eval.py", "--gpu=1", gpus=2, device="cuda:1"),
    variant("shared_bases/train_ilsvrc.py", "--visible_device=1", gpus=2),
    variant("epsilon_resnet/cifarEpsilonResnet.py", "--gpu=1", gpus=2, device="cuda:1"),
]
