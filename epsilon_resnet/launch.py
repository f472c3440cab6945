"""From parsed flags to a finished training run; what the training scripts call."""

import os
import sys

import torch

from epsilon_resnet import engine, inputs
from epsilon_resnet.count import count_macs, count_parameters
from epsilon_resnet.models import Config
from epsilon_resnet.run import gpu_errors_explained
from epsilon_resnet.runs import Run, RunError, describe_run, read_metrics
from epsilon_resnet.training import Data, Training, batch_size_of, changed_flags, is_inside, shared_seed, train


def log_directory(args) -> str:
    """train_log.<output> in --output-dir."""
    return os.path.join(args.output_dir, args.log_name)


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
            f"{run.metrics_path} is of a finished run with {', '.join(changes)}; choose another -o or --output-dir"
        )
    return lines[-1]


def set_determinism(args):
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def run_training(args, script: str, argv, reproduces: str | None, config: Config | None = None, weights=None):
    """Train as the flags say; returns (result, run, training), or an exit status where other processes do it.

    config, weights: of a network that is not the one of the flags (fine-tuning a compressed one).
    """
    count = engine.needs_processes(args.gpu, args.device)
    if count:
        return engine.start_processes(count, script, argv)
    with gpu_errors_explained(batch_size_of(args), "--batch_size"):
        return _run_training(args, reproduces, config, weights)


def _run_training(args, reproduces, config, weights):
    world, device = engine.join_world(args.gpu, args.device)
    say = print if world.is_main else (lambda *text, **options: None)
    directory = log_directory(args)
    run = Run(directory, is_writer=world.is_main, keep_steps=args.keep_step or ())
    if args.auto_resume and (result := finished_result(args, run)) is not None:
        say(f"already finished: {result['top1']:.3f}% after {result['epochs']} epochs ({run.metrics_path})")
        return result, run, None
    resume_from = args.load if args.load and is_inside(args.load, directory) else None
    if args.auto_resume and resume_from is None:
        resume_from = run.latest()
    say(f"epsilon = {args.epsilon:f}")
    say(f"outdir: {directory}")
    set_determinism(args)
    seed = _seed(args, resume_from, device, world)
    data = Data(args, seed, device, world)
    for _ in range(2 if world.is_main and args.dataset.startswith("cifar") else 0):  # of both sets, as in the original
        print(f"train on {args.dataset}")
    training = Training(args, config, device, world, seed, data)
    if resume_from is not None:
        training.resume(resume_from)
        say(f"going on after {resume_from}")
    elif weights is not None:
        training.net.load_state_dict(weights)
    elif args.load:
        training.load_weights(args.load)
    training.prepare()
    return _train(args, training, run, reproduces, say)


def _seed(args, resume_from, device, world):
    if resume_from is None:
        return shared_seed(args.seed, device, world)
    from epsilon_resnet.runs import load_state

    return load_state(resume_from).get("seed", 0)


def _train(args, training, run, reproduces, say):
    aside = run.prepare(keep=training.resumed is not None)
    if aside:
        say(f"note: an earlier run was in the way, it is now {aside}")
    header = describe_run(
        args,
        training.config,
        training.device,
        parameters=count_parameters(training.net),
        macs=count_macs(training.net, getattr(args, "image_size", None)),
        reproduces=reproduces,
    )
    try:
        run.start_log({**header, "seed": training.seed}, training.resumed)
        with gpu_errors_explained(batch_size_of(args), "--batch_size"):
            result = train(training, run)
        run.log_result(result)
    except RunError as error:
        latest = run.latest()
        kept = f"; the last good checkpoint is {latest}" if latest else ""
        raise RunError(f"{error}{kept}") from None
    finally:
        run.close()
    say(f"\nFinished: val_error {training.val_error[0]:g} after {args.epochs} epochs, in {result['checkpoint']}")
    say(f"Best top-1 {result['best_top1']:.3f}% in epoch {result['best_epoch'] + 1} (chosen on the test set)")
    return result, run, training


def exit_status(outcome) -> int:
    """Exit status of a script whose `run_training` gave `outcome`."""
    return outcome if isinstance(outcome, int) else 0


def test_batches_for(args, device, mean):
    """Test batches of CIFAR or SVHN for evaluation; the mean image is the checkpoint's, else that of the data."""
    if mean is None:
        train_set, test_set = inputs.load_sets(args.dataset, args.data_dir, args.embedded_data)
        mean = inputs.pixel_mean(train_set, test_set)
    elif args.embedded_data:
        test_set = inputs.load_sets(args.dataset, args.data_dir, True)[1]
    else:
        folder = inputs.data_folder(args.data_dir, args.dataset)
        test_set = inputs.load_dataset(args.dataset, folder, split="test")
    return inputs.test_batches(test_set, mean, device=device)


def note(text: str):
    """A remark on stderr that does not change the result."""
    print(f"note: {text}", file=sys.stderr)
