"""Convert a trained S3 network: to plain PyTorch, or to 3 bits per weight.

    python s3/convert.py model_best.pth.tar \\
        s3-3bit-resnet18-pytorch-imagenet.pth.tar --packed resnet18.packed

The first file is what the published ones are: a checkpoint of the PyTorch
ImageNet example, names with module., every quantised convolution one tensor
of the values 0, +-1, +-2, +-4. The packed file has the same weights as codes
of 2 to 4 bits, the rest as float32. main_eval.py --resume reads both.

FILE may be a checkpoint of main.py, of the original, or a converted file.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.checkpoints import CheckpointError, save_checkpoint
from s3.checkpoints import load_network, read_weights
from s3.discrete import plain_state_dict
from s3.packed import packed_payload

EXAMPLE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}  # SGD of the PyTorch example, new


def origin(path: str) -> dict:
    """Epoch and best accuracy that a file tells; 0 where it does not."""
    content = read_weights(path).content
    content = content if isinstance(content, dict) else {}
    best = content.get("best_acc1")
    best = torch.tensor(0.0 if best is None else float(best), dtype=torch.float64)
    return {"epoch": int(content.get("epoch") or 0), "best_acc1": best}


def plain_payload(model: torch.nn.Module, config, told: dict) -> dict:
    """Checkpoint of the PyTorch ImageNet example; `scheduler` and `config` are not in the published files."""
    state = plain_state_dict(model)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    parameters = [torch.nn.Parameter(tensor) for name, tensor in state.items() if not name.endswith(buffers)]
    optimizer = torch.optim.SGD(parameters, **EXAMPLE)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    return {
        "epoch": told["epoch"],
        "arch": config.arch,
        "state_dict": state,
        "best_acc1": told["best_acc1"],
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "config": config.as_dict(),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", metavar="FILE", help="checkpoint to convert")
    add("output", metavar="OUTPUT", nargs="?", help="plain file to write (default: none)")
    add("--packed", metavar="OUTPUT", help="packed file to write (default: none)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def convert(args):
    """Write what the flags ask for. Raises CheckpointError if a file cannot be read or written."""
    model, config = load_network(args.file)
    if config.method == "float":
        raise CheckpointError(f"{args.file} has float weights: there is nothing to convert; give a trained S3 network")
    told = origin(args.file)
    if args.output:
        save_checkpoint(args.output, plain_payload(model, config, told))
        print(f"plain:  {args.output}  {os.path.getsize(args.output):,} bytes")
    if args.packed:
        save_checkpoint(args.packed, packed_payload(model, config.as_dict(), told))
        size, full = os.path.getsize(args.packed), 4 * sum(t.numel() for t in plain_state_dict(model).values())
        print(f"packed: {args.packed}  {size:,} bytes, {full / size:.2f} times smaller than float32")


def main(argv=None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.output and not args.packed:
        parser.error("give a file to write: OUTPUT, --packed OUTPUT or both")
    if args.file in (args.output, args.packed) or (args.output and args.output == args.packed):
        parser.error("the files must have different names; the trained one is not overwritten")
    try:
        convert(args)
    except CheckpointError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
