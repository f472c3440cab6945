"""What train_cifar10.py, train_cifar100.py and train_ilsvrc.py have in common: flags, files, the run."""

import argparse
import os
import sys

import torch

from shared_bases import engine
from shared_bases.count import count_macs, count_parameters
from shared_bases.models import IMAGE_SIZES, MODELS, Config, model_key
from shared_bases.run import fp16_refusal, gpu_errors_explained
from shared_bases.runs import Run, RunError, command_line, describe_run, read_metrics
from shared_bases.training import SCHEDULES, Training, changed_flags, schedule_of, train

DEFAULTS = {
    "cifar10": {"weight_decay": 5e-4, "shared_rank": 16, "model": "ResNet56_DoubleShared", "data_dir": "./data/"},
    "cifar100": {"weight_decay": 5e-4, "shared_rank": 16, "model": "ResNet34_SingleShared", "data_dir": "./data/"},
    "ilsvrc": {
        "weight_decay": 1e-4,
        "shared_rank": 32,
        "model": "ResNet34_DoubleShared",
        "data_dir": "/media/data/ILSVRC2012/",
    },
}
FILE_PREFIX = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "ilsvrc": "ILSVRC"}
RECIPE_HELP = {
    "cifar100": "schedule: of the published tables (150, 75 and 75 epochs, the last two from the best network before "
    "them), the same steps without going back, or the original's last version, whose rate never falls",
    "ilsvrc": "schedule: of the original's last version, or of the published tables; they differ in the last 15 epochs "
    "of MobileNetV2*",
}


def add_model_flags(parser: argparse.ArgumentParser, dataset: str):
    """The flags that training and evaluation share."""
    defaults = DEFAULTS[dataset]
    parser.add_argument(
        "--shared_rank",
        type=int,
        default=defaults["shared_rank"],
        help="s, shared basis filters of the first group of layers; they double with its channels "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--unique_rank", type=int, default=1, help="u, own basis filters of each layer, likewise (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=256,
        help="images per step, over all processes together (default: %(default)s)",
    )
    parser.add_argument(
        "--visible_device",
        default="0",
        help="GPUs to use, as in CUDA_VISIBLE_DEVICES, whose value is kept if this is not given (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset_path",
        "--data-dir",
        dest="data_dir",
        default=defaults["data_dir"],
        metavar="DIR",
        help="where the data is, "
        + ("with train/ and val/" if dataset == "ilsvrc" else "downloaded there if missing")
        + " (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        default=defaults["model"],
        help=f"one of {', '.join(MODELS[dataset])}; also with hyphens (default: %(default)s)",
    )


def add_data_flags(extra, dataset: str, workers: int):
    """Flags of this repository that training and evaluation share."""
    extra.add_argument("--embedded-data", action="store_true", help="use scikit-learn's digits, no download")
    extra.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    if dataset == "ilsvrc":
        extra.add_argument(
            "--image-size", type=int, default=224, help="side of the images in pixels (default: %(default)s)"
        )
        extra.add_argument(
            "--workers", type=int, default=workers, help="processes that decode images (default: %(default)s)"
        )
    extra.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_optimizer_flags(parser: argparse.ArgumentParser, dataset: str, note: str = ""):
    parser.add_argument("--lr", type=float, default=0.1, help=f"initial learning rate{note} (default: %(default)s)")
    parser.add_argument("--momentum", type=float, default=0.9, help=f"momentum of SGD{note} (default: %(default)s)")
    parser.add_argument(
        "--weight_decay",
        type=float,
        default=DEFAULTS[dataset]["weight_decay"],
        help=f"weight decay of SGD, on every parameter{note} (default: %(default)s)",
    )
    # As in the original: an integer, so that file names say L10 by default and L10.0 for --lambdaR=10.
    parser.add_argument(
        "--lambdaR", type=float, default=10, help=f"weight of the orthogonality term{note} (default: %(default)s)"
    )
    parser.add_argument(
        "--starting_epoch", type=int, default=0, help=f"epochs that are done already{note} (default: %(default)s)"
    )


def build_parser(dataset: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_optimizer_flags(parser, dataset)
    add_model_flags(parser, dataset)
    parser.add_argument("--pretrained", metavar="FILE", help="checkpoint whose weights and optimizer to start from")
    extra = parser.add_argument_group("added in this repository")
    if dataset in RECIPE_HELP:
        names = tuple(SCHEDULES[dataset])
        extra.add_argument(
            "--recipe", default=names[0], choices=names, help=RECIPE_HELP[dataset] + " (default: %(default)s)"
        )
    extra.add_argument("--epochs", type=int, help="length of training; the schedule scales with it (default: 300"
                       + ("; ResNets 150)" if dataset == "ilsvrc" else ")"))  # fmt: skip
    extra.add_argument("--train-size", type=int, metavar="N", help="first N training images only (default: all)")
    extra.add_argument(
        "--amp", default="off", choices=("off", "bf16", "fp16"), help="mixed precision (default: %(default)s)"
    )
    extra.add_argument("--compile", action="store_true", help="torch.compile the network")
    extra.add_argument("--cuda-graph", action="store_true", help="record a training step once, replay it: one GPU")
    extra.add_argument("--channels-last", action="store_true", help="store activations as NHWC")
    extra.add_argument("--seed", type=int, help="same seed, same bits on the CPU (default: a new one, logged)")
    extra.add_argument("--deterministic", action="store_true", help="same bits on a GPU too, slower")
    text = "instead of ./checkpoint"
    extra.add_argument("--output-dir", type=os.path.expanduser, default="./checkpoint", metavar="DIR", help=text)
    extra.add_argument(
        "--resume", action="store_true", help="go on after the last finished epoch of the same command, bit for bit"
    )
    extra.add_argument(
        "--auto-resume", action="store_true", help="for sweeps: start, go on, or do nothing if it is finished already"
    )
    add_data_flags(extra, dataset, workers=16)
    return parser


def model_config(parser: argparse.ArgumentParser, args) -> Config:
    """The network of the flags; args.model becomes its key. Mistakes end with one line and exit status 2."""
    try:
        key = model_key(args.dataset, args.model)
        if key != args.model.replace("-", "_"):
            print(f"note: {args.model} is the README's name of {key}")
        args.model = key
        return Config(args.dataset, key, args.shared_rank, args.unique_rank)
    except ValueError as error:
        parser.error(str(error))


def check_numbers(parser: argparse.ArgumentParser, args, at_least: dict[str, int]):
    """End with one line and exit status 2 if a whole number is below its least value."""
    for flag, least in at_least.items():
        value = getattr(args, flag.replace("-", "_"), None)
        if value is not None and value < least:
            parser.error(f"--{flag} must be at least {least}, not {value}")


def parse_args(dataset: str, description: str, argv=None) -> tuple[argparse.Namespace, Config]:
    """Flags and the network that they name. Mistakes end with one line and exit status 2."""
    parser = build_parser(dataset, description)
    args = parser.parse_args(argv)
    args.dataset, args.command = dataset, command_line(argv)
    args.recipe = getattr(args, "recipe", next(iter(SCHEDULES[dataset])))
    args.image_size = getattr(args, "image_size", IMAGE_SIZES[dataset])
    config = model_config(parser, args)
    if args.epochs is None:
        args.epochs = schedule_of(dataset, args.model, args.recipe).epochs
    least = {"batch_size": 1, "epochs": 1, "train-size": 1, "starting_epoch": 0, "image-size": 32, "workers": 0}
    check_numbers(parser, args, least)
    if not 0 < args.lr < float("inf"):
        parser.error(f"--lr must be a positive number, not {args.lr:g}")
    for name in ("momentum", "weight_decay", "lambdaR"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name} must be a number that is not negative, not {getattr(args, name):g}")
    if args.starting_epoch >= args.epochs:
        parser.error(f"--starting_epoch {args.starting_epoch} leaves none of {args.epochs} epochs; give more --epochs")
    if args.amp == "fp16":
        # PyTorch looks at CUDA_VISIBLE_DEVICES only once, when it is first asked for a GPU.
        engine.show_devices(args.visible_device, args.device)
        if refusal := fp16_refusal(args.device):
            parser.error(refusal)
    return args, config


def run_paths(args) -> tuple[str, str]:
    """Directory of the run and path of its best checkpoint (the original's name)."""
    name = (
        f"{FILE_PREFIX[args.dataset]}-{args.model}-S{args.shared_rank}-U{args.unique_rank}-L{args.lambdaR}"
        f"-{args.visible_device}"
    )
    return os.path.join(args.output_dir, name), os.path.join(args.output_dir, f"{name}.pth")


def finished_result(args, run: Run) -> dict | None:
    """The result of a run that is finished already (--auto-resume), None if it is not.

    Raises RunError if that run was made with other flags, whose result would be mistaken for this one's.
    """
    lines = read_metrics(run.metrics_path)
    if not lines or lines[-1].get("type") != "result":
        return None
    changes = changed_flags(args, {**lines[0].get("args", {}), "seed": lines[0].get("seed")})
    if changes:
        raise RunError(
            f"{run.metrics_path} is of a finished run with {', '.join(changes)}; choose another --output-dir"
        )
    return lines[-1]


def use_all_gpus(args):
    """Start again under torchrun, one process for each visible GPU: what the original's ILSVRC2012 script did itself.

    Returns only where that is not needed.
    """
    if "WORLD_SIZE" in os.environ or args.device not in ("auto", "cuda") or torch.cuda.device_count() < 2:
        return
    count = torch.cuda.device_count()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    script = os.path.abspath(sys.argv[0])
    sys.stdout.flush()
    os.execv(sys.executable, [*launcher, script, *args.command[1:]])


def main(dataset: str, description: str, argv=None):
    args, config = parse_args(dataset, description, argv)
    with gpu_errors_explained(args.batch_size, "--batch_size"):
        run_training(dataset, args, config)


def run_training(dataset: str, args, config: Config):
    """All that follows the flags. Raises RunError where the run cannot begin or go on."""
    engine.show_devices(args.visible_device, args.device)
    if dataset == "ilsvrc":
        use_all_gpus(args)
    world, device = engine.join_world(args.device)
    say = print if world.is_main else (lambda *text, **options: None)
    run = Run(*run_paths(args), is_writer=world.is_main)
    if args.auto_resume and (result := finished_result(args, run)) is not None:
        say(f"already finished: {result['top1']:.3f}% after {result['epochs']} epochs ({run.metrics_path})")
        return
    if config.warning():
        say(config.warning())
    run.prepare()
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    training = Training(args, config, device, world)
    resumed = (args.resume or args.auto_resume) and training.resume(run)
    if args.resume and not resumed:
        raise RunError(f"no checkpoint to go on with: {run.last_path} does not exist; leave --resume out to start")
    if resumed:
        say(f"going on after epoch {training.done} ({run.last_path})")
    elif args.pretrained:
        epoch = training.start_from(args.pretrained)["epoch"]
        if epoch and not args.starting_epoch:
            say(f"note: training starts at epoch 1; --starting_epoch={epoch} goes on after the file's own epoch")
    loaders = training.loaders()
    if dataset == "ilsvrc" and device.type == "cuda":
        say(f"Let's use {world.size} GPUs!")
    macs = count_macs(training.net, args.image_size)
    header = describe_run(args, training.config, device, count_parameters(training.net), macs)
    run.start_log({**header, "seed": training.seed}, training.done if resumed else None)
    try:
        with gpu_errors_explained(args.batch_size, "--batch_size"):
            result = train(training, run, loaders)
        run.log_result(result)
    except RunError as error:
        kept = f"; the last good checkpoint is {run.last_path}" if run.last_path.exists() else ""
        raise RunError(f"{error}{kept}") from None
    finally:
        run.close()
    say(f"Last epoch: {result['top1']:.3f}% (the best was chosen on the test set; kept in {run.best_path})")
