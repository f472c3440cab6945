"""From parsed flags to a finished run: what the `main` of the three scripts calls, and testing (-e)."""

import os
import time

import torch
from torch import nn

from common.checkpoints import read_foreign
from deepshift import engine
from deepshift.convert import pack_layers, round_shift_weights, shift_layers, use_kernels
from deepshift.count import count_macs, count_parameters
from deepshift.run import gpu_errors_explained
from deepshift.runs import Run, RunError, describe_run, read_metrics, write_text
from deepshift.summary import summarise
from deepshift.training import Training, changed_flags, train


def kernel_check(training: Training, model: nn.Module):
    """Switch a rounded network to the integer kernels; returns what compares each batch with the float path.

    Raises RunError if the weights cannot be packed.
    """
    try:
        packed = {name: weights.to(training.device) for name, weights in pack_layers(model).items()}
    except ValueError as error:
        raise RunError(f"--use-kernel: {error}") from None
    use_kernels(model, packed)
    size = sum(weights.nbytes for weights in packed.values())
    training.say(f"integer kernels: {len(packed)} layers, {training.args.weight_bits} bits, {size:,} bytes of weights")
    found = {"error": 0.0, "largest": 0.0, "changed": 0}

    def compare(images, logits):
        use_kernels(model, None)
        expected = engine.logits_of(model(images))
        use_kernels(model, packed)
        found["error"] = max(found["error"], (logits - expected).abs().max().item())
        found["largest"] = max(found["largest"], expected.abs().max().item())
        found["changed"] += int((logits.argmax(1) != expected.argmax(1)).sum())

    return compare, found


def evaluate(training: Training, run: Run, loader) -> engine.Result:
    """Round the weights, test them, and write test_log.csv. With --use-kernel on the integer kernels."""
    from common.kernels import overflow_count

    args, task = training.args, training.task
    model, compare = round_shift_weights(training.net), None
    if args.use_kernel and shift_layers(model):
        compare, found = kernel_check(training, model)
        overflow_count(reset=True)
    lines = task.test_lines(args, loader, training.world.is_main)
    with gpu_errors_explained(*task.test_batch(args)):
        result = engine.evaluate(model, loader, lines, world=training.world, compare=compare)
    task.report(result, training.say)
    if compare is not None:
        use_kernels(model, None)
        overflows = overflow_count()
        training.say(
            f"fixed-point error: at most {found['error']:.3g} on logits up to {found['largest']:.3g}; "
            f"{found['changed']} of {result.seen} predictions differ from the float path; "
            f"{overflows} values did not fit 32 bits" + ("" if not overflows else ": use fewer --activation-bits")
        )
    run.write_csv("test_log.csv", task.test_rows(result))
    if args.print_weights:
        run.write_weights_log("weights_log.txt", model)
    return result


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


def run_task(task, args):
    """What the scripts' `main` does after the flags are parsed; returns the exit status."""
    with gpu_errors_explained(args.batch_size, "--batch-size"):
        return _run_task(task, args)


def _run_task(task, args):
    count = engine.processes_to_start(args)
    if count:
        return engine.start_processes(args, count)
    start = time.monotonic()
    world, device = engine.join_world(args)
    _set_determinism(args)
    training = Training(task, args, device, world)
    for note in args.notes:
        training.say(f"note: {note}")
    if device.type == "cuda":
        training.say(f"Use GPU: {device.index or 0} for training")
    run = Run(os.path.join(args.output_dir, task.dataset, args.arch, training.label), is_writer=world.is_main)
    if args.auto_resume and not args.evaluate and (result := finished_result(args, run)) is not None:
        training.say(f"already finished: {result['top1']:.3f}% after {result['epochs']} epochs ({run.metrics_path})")
        return 0
    resumed = _load(training, run)
    run.prepare()
    _describe(training, run)
    loaders = task.loaders(args, training.seed, device, world)
    if args.evaluate:
        evaluate(training, run, loaders[1])
    else:
        _train(training, run, loaders, resumed)
    training.say(f"Total Time: {time.monotonic() - start}")
    return 0


def _set_determinism(args):
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _load(training, run) -> bool:
    """--resume, --auto-resume and --opt-ckpt. True if the run goes on where one was."""
    args = training.args
    if getattr(args, "opt_ckpt", "") and not args.evaluate:
        content = read_weights_content(args.opt_ckpt)
        training.say("WARNING: lr, momentum, weight_decay of --opt-ckpt hold; --lr-schedule still sets the lr")
        training.load_optimizer(args.opt_ckpt, content)
    before = training.first_epoch
    if args.auto_resume and run.checkpoint_path.exists() and not args.evaluate:
        training.resume(str(run.checkpoint_path), exact=True)
    elif args.resume and os.path.isfile(args.resume):
        training.resume(args.resume, exact=False)
    elif args.resume and args.evaluate:
        raise RunError(f"no checkpoint found at '{args.resume}'; correct --resume")
    elif args.resume:  # as in the original, training begins anew
        training.say(f"=> no checkpoint found at '{args.resume}'")
    elif args.evaluate and not (args.weights or args.model or args.pretrained):
        training.say("warning: an untrained network is evaluated; give --resume, --weights or --model")
    return training.first_epoch > before


def read_weights_content(path: str):
    """The optimizer state of a file: its key `optimizer`, or all of it. Raises CheckpointError."""
    content = read_foreign(path)
    return content.get("optimizer", content) if isinstance(content, dict) else content


def _describe(training, run):
    """Summary and arguments, on the screen and as files."""
    args = training.args
    text = summarise(training.net, training.task.summary_shape)
    training.say(text)
    if args.save_model and training.world.is_main:
        hidden = ("command", "notes", "shift_type_given", "shift_depth_given")
        lines = [f"{name}: {value}\n" for name, value in sorted(vars(args).items()) if name not in hidden]
        write_text(run.directory / "command_args.txt", "".join(lines))
        write_text(run.directory / "model_summary.txt", text + "\n"
                   "WARNING: The summary function reports duplicate parameters for multi-GPU case\n")  # fmt: skip


def _train(training, run, loaders, resumed):
    task, args = training.task, training.args
    macs = sum(count_macs(training.net, task.input_shape).values())
    counts = {"params": count_parameters(training.net), "macs": macs}
    header = describe_run(args, training.config, training.device, counts, task.published_command(args))
    header["seed"] = training.seed
    run.start_log(header, task.columns, training.first_epoch if resumed else None, task.first_number)
    try:
        with gpu_errors_explained(args.batch_size, "--batch-size"):
            result = train(training, run, loaders)
        run.log_result(result)
    except RunError as error:
        kept = f"; the last good checkpoint is {run.checkpoint_path}" if run.checkpoint_path.exists() else ""
        raise RunError(f"{error}{kept}") from None
    finally:
        run.close()
    training.say(f"Finished: {result['top1']:.3f}% after {args.epochs} epochs; best {result['best_top1']:.3f}% at "
                 f"epoch {result['best_epoch']} (chosen on the test set); in {run.directory}")  # fmt: skip
