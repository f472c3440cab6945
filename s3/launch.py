"""From parsed flags to a finished run: what the `main` of both scripts calls."""

import os

import torch
import torch.distributed as dist

from s3 import engine
from s3.count import count_macs, count_parameters
from s3.inputs import SIZE, make_loaders
from s3.packed import pack_layers, put_back, use_kernels
from s3.run import gpu_errors_explained
from s3.runs import Run, RunError, describe_run, read_metrics
from s3.training import Task, Training, changed_flags, shared_seed, train


def run_task(task: Task, args) -> int:
    """What the scripts' `main` does after the flags are parsed; returns the exit status."""
    with gpu_errors_explained(args.batch_size, "--batch-size"):
        return _run_task(task, args)


def _run_task(task, args):
    count = engine.processes_to_start(args)
    if count:
        return engine.start_processes(args, count)
    world, device = engine.join_world(args)
    say = print if world.is_main else (lambda *text, **options: None)
    run = Run(args.output_dir, is_writer=world.is_main)
    if args.auto_resume and not args.evaluate and (result := finished_result(args, run)) is not None:
        say(f"already finished: {result['top1']:.3f}% after {result['epochs']} epochs ({run.metrics_path})")
        return 0
    if args.resume and not os.path.isfile(args.resume):
        say(f"=> no checkpoint found at '{args.resume}'")
        raise RunError(f"--resume {args.resume}: there is no such file; correct the path, or leave --resume out")
    _set_determinism(args)
    seed = shared_seed(args.seed, device, world)
    task.announce(args, say)
    if device.type == "cpu":
        say("using CPU, this will be slow")
    loaders = make_loaders(args, seed, device, world)
    training = Training(task, args, device, world, seed, _classes(args, loaders))
    resumed = _load(training, run)
    if args.evaluate:
        return _evaluate(training, loaders.test)
    if training.seed != seed:  # the checkpoint's
        loaders.train.load_state_dict({"seed": training.seed, "epoch": 0})
    run.prepare()
    return _train(training, run, loaders, resumed)


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


def _set_determinism(args):
    """As in the original --seed makes cuDNN deterministic; there its benchmark, left on, undid that."""
    torch.backends.cudnn.deterministic = args.seed is not None
    torch.backends.cudnn.benchmark = args.seed is None and not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _classes(args, loaders) -> int:
    if args.num_classes is None:
        return loaders.classes
    if args.num_classes < loaders.classes:
        raise RunError(f"--num-classes {args.num_classes}: the data has {loaders.classes} classes; give at least these")
    return args.num_classes


def _load(training, run) -> bool:
    """--resume and --auto-resume. True if the run goes on where one was."""
    args, before = training.args, training.first_epoch
    if args.auto_resume and run.checkpoint_path.exists() and not args.evaluate:
        training.resume(str(run.checkpoint_path), exact=True)
    elif args.resume:
        training.resume(args.resume, exact=False)
    elif args.evaluate and not args.pretrained:
        training.say("warning: an untrained network is evaluated; give --resume")
    return training.first_epoch > before


class KernelCheck:
    """Lets a network compute on packed weights, and compares every batch with the float path.

    Raises RunError if no weights can be packed.
    """

    def __init__(self, net):
        self.net, packed = net, pack_layers(net)
        if not packed:
            raise RunError("--use-kernel: the network has no weights of 2 to 4 bits; give a converted checkpoint")
        self.size, self.bits = sum(w.nbytes for w in packed.values()), sorted({w.bits for w in packed.values()})
        self.plain = use_kernels(net, packed)
        self.kernels = {name: net.get_submodule(name) for name in packed}
        self.error, self.largest, self.changed = 0.0, 0.0, 0

    def compare(self, images, logits):
        put_back(self.net, self.plain)
        expected = engine.logits_of(self.net.eval()(images))
        put_back(self.net, self.kernels)
        self.error = max(self.error, (logits - expected).abs().max().item())
        self.largest = max(self.largest, expected.abs().max().item())
        self.changed += int((logits.argmax(1) != expected.argmax(1)).sum())


def _evaluate(training: Training, loader) -> int:
    """Test, with --use-kernel on packed weights, compared with the float path."""
    args, say, check = training.args, training.say, None
    if args.use_kernel:
        check = KernelCheck(training.net)
        say(f"packed kernels: {len(check.kernels)} layers, {' and '.join(map(str, check.bits))} bits, "
            f"{check.size:,} bytes of weights")  # fmt: skip
    lines = engine.BatchLines("Test: ", len(loader), args.print_freq, training.world.is_main)
    compare = None if check is None else check.compare
    result = engine.evaluate(training.net, loader, lines, world=training.world, compare=compare)
    say(engine.summary_line(result.top1, result.top5))
    if check is not None:
        say(f"packed kernels: off by at most {check.error:.3g} on logits up to {check.largest:.3g}; "
            f"{check.changed} predictions differ from the float path")  # fmt: skip
    _tell_damaged(training, loader)
    return 0


def _train(training, run, loaders, resumed) -> int:
    args = training.args
    size = args.image_size if args.dataset == "imagenet" else SIZE
    macs = sum(count_macs(training.net, (3, size, size)).values())
    counts = {"params": count_parameters(training.net), "macs": macs}
    reproduces = training.task.published_command(args, training.classes)
    config = training.task.describe(args, training.classes)
    header = {**describe_run(args, config, training.device, counts, reproduces), "seed": training.seed}
    try:
        run.start_log(header, training.first_epoch if resumed else None)
        with gpu_errors_explained(args.batch_size, "--batch-size"):
            result = train(training, run, loaders)
        run.log_result(result)
    except (RunError, OSError) as error:  # OSError: a full disk under the events
        kept = f"; the last good checkpoint is {run.checkpoint_path}" if run.checkpoint_path.exists() else ""
        raise RunError(f"{error}{kept}") from None
    finally:
        run.close()
    for loader in (loaders.train, loaders.test):
        _tell_damaged(training, loader)
    training.say(f"Finished: {result['top1']:.3f}% after {args.epochs} epochs; best {result['best_top1']:.3f}% at "
                 f"epoch {result['best_epoch']} (chosen on the test set); in {run.directory}")  # fmt: skip
    return 0


def _tell_damaged(training, loader):
    """How many images --skip-damaged left out, over all processes."""
    if not training.args.skip_damaged or training.args.dataset != "imagenet":
        return
    number = torch.tensor([len(loader.damaged)], device=training.device)
    if training.world.size > 1:
        dist.all_reduce(number)
    if number:
        split = "train" if loader.train else "val"
        training.say(f"{int(number)} of {loader.num_images} images of {split}/ are damaged and were left out")
