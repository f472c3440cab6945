"""Train ShiftResNet and its baselines on CIFAR (Wu et al., CVPR 2018).

    python shiftresnet/main.py --arch=shiftresnet20 --expansion=3

Published (arXiv 1711.08141): 89.56% top-1 on CIFAR-10 after 160 epochs. The
network with the best test accuracy is kept in checkpoint/<arch><options>.t7, the
rest of the run (metrics.jsonl, TensorBoard events, last.pt for --resume) in
checkpoint/<arch><options>/.

Without a download:  add --embedded-data
Several processes:   torchrun --nproc_per_node=2 shiftresnet/main.py ...
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from shiftresnet import engine
from shiftresnet.count import count_flops, count_parameters
from shiftresnet.models import ARCHITECTURES, NUM_CLASSES, REDUCTION_MODES, Config, build_model
from shiftresnet.run import fp16_refusal, gpu_errors_explained
from shiftresnet.runs import Run, RunError, command_line, describe_run, read_metrics
from shiftresnet.training import RECIPES, Training, changed_flags, train


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_original_flags(parser)
    _add_our_flags(parser.add_argument_group("added in this repository"))
    return parser


def _add_original_flags(parser):
    parser.add_argument("--lr", type=float, default=0.1, help="initial learning rate (default: %(default)s)")
    parser.add_argument(
        "--resume", "-r", action="store_true", help="go on after the last finished epoch of the same command"
    )
    parser.add_argument(
        "--batch_size",
        "-b",
        type=int,
        default=128,
        help="training batch, over all processes together (default: %(default)s)",
    )
    parser.add_argument(
        "--arch",
        "-a",
        default="shiftresnet110",
        choices=ARCHITECTURES,
        metavar="ARCH",
        help=f"network, one of {', '.join(ARCHITECTURES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--expansion",
        "-e",
        type=float,
        default=1.0,
        help="shiftresnet*: middle width of a block over its output width (default: %(default)g)",
    )
    parser.add_argument(
        "--reduction",
        type=float,
        default=1.0,
        help="resnet*, depthwiseresnet*: how many times smaller; below 1 is larger (default: %(default)g)",
    )
    parser.add_argument(
        "--reduction-mode",
        default="net",
        choices=REDUCTION_MODES,
        help="resnet*: what --reduction makes smaller (default: %(default)s)",
    )
    parser.add_argument("--dataset", default="cifar10", choices=tuple(NUM_CLASSES), help="default: %(default)s")
    parser.add_argument(
        "--datadir",
        "--data-dir",
        dest="data_dir",
        default="./data/",
        metavar="DIR",
        help="where data sets are, downloaded there if missing (default: %(default)s)",
    )


def _add_our_flags(extra):
    extra.add_argument(
        "--recipe",
        default="final",
        choices=tuple(RECIPES),
        help="schedule and initialisation: of the original's last version, or of the published tables "
        "(default: %(default)s)",
    )
    extra.add_argument(
        "--epochs", type=int, help="length of training; the schedule scales with it (default: 164, published 160)"
    )
    extra.add_argument("--embedded-data", action="store_true", help="train on scikit-learn's digits, no download")
    extra.add_argument("--train-size", type=int, metavar="N", help="first N training images only (default: all)")
    extra.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
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
        "--auto-resume",
        action="store_true",
        help="for sweeps: start, go on, or do nothing if this run is finished already",
    )
    extra.add_argument("--debug", action="store_true", help="show the traceback of an error")


def parse_args(argv=None) -> tuple[argparse.Namespace, Config]:
    """Flags and the network that they name. Mistakes end with one line and exit status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.command = command_line(argv)
    args.epochs = RECIPES[args.recipe].epochs if args.epochs is None else args.epochs
    for name in ("batch_size", "epochs", "train_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(
                f"--{name.replace('_', '-') if name != 'batch_size' else name} must be at least 1, not {value}"
            )
    if not 0 < args.lr < float("inf"):
        parser.error(f"--lr must be a positive number, not {args.lr:g}")
    if args.amp == "fp16" and (refusal := fp16_refusal(args.device)):
        parser.error(refusal)
    try:
        config = Config(args.arch, args.expansion, args.reduction, args.reduction_mode, NUM_CLASSES[args.dataset])
        with torch.device("meta"):
            build_model(config)
    except ValueError as error:
        parser.error(str(error))
    return args, config


def run_paths(args, config: Config) -> tuple[str, str]:
    """Directory of the run and path of its best checkpoint (the original's name)."""
    name = config.arch + config.suffix()
    return os.path.join(args.output_dir, name), os.path.join(args.output_dir, f"{name}.t7")


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


def main(argv=None):
    args, config = parse_args(argv)
    with gpu_errors_explained(args.batch_size, "--batch_size"):
        run_training(args, config)


def run_training(args, config: Config):
    """All that follows the flags. Raises RunError where the run cannot begin or go on."""
    world, device = engine.join_world(args.device)
    say = print if world.is_main else (lambda *text, **options: None)
    run = Run(*run_paths(args, config), is_writer=world.is_main)
    if args.auto_resume and (result := finished_result(args, run)) is not None:
        say(f"already finished: {result['top1']:.3f}% after {result['epochs']} epochs ({run.metrics_path})")
        return
    run.prepare()
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    training = Training(args, config, device, world)
    say("==> Preparing data..")
    say(f"Using path: {run.best_path}")
    resumed = False
    if args.resume or args.auto_resume:
        resumed = training.resume(run)
        if not resumed and args.resume:
            raise RunError(
                f"no checkpoint to go on with: neither {run.last_path} nor {run.best_path} exists; "
                "leave --resume out to start"
            )
    if resumed:
        say(f"==> Resuming from checkpoint.. {run.last_path if run.last_path.exists() else run.best_path}")
    else:
        say("==> Building model..")
        if args.reduction != 1:
            say(f"==> {args.arch} with reduction {args.reduction:.2f}")
    loaders = training.loaders()
    header = describe_run(args, config, device, count_parameters(training.net), count_flops(training.net, "true"))
    run.start_log({**header, "seed": training.seed}, training.first_epoch if resumed else None)
    if device.type == "cuda" and torch.cuda.device_count() > 1 and world.size == 1:
        say("note: one GPU is used; start with torchrun --nproc_per_node=N for several")
    try:
        with gpu_errors_explained(args.batch_size, "--batch_size"):
            result = train(training, run, loaders)
        run.log_result(result)
    except RunError as error:
        kept = f"; the last good checkpoint is {run.last_path}" if run.last_path.exists() else ""
        raise RunError(f"{error}{kept}") from None
    finally:
        run.close()
    say(
        f"\nFinished: {result['top1']:.3f}% after {args.epochs} epochs; best {result['best_top1']:.3f}% at epoch "
        f"{result['best_epoch']} (chosen on the test set), kept in {run.best_path}"
    )


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
