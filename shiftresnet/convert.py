"""Convert a checkpoint of the original (.t7, any year) into a safe one.

    python shiftresnet/convert.py old/shiftresnet20_3.0.t7 shiftresnet20_3.0.t7

The new file holds {net: state dict, config, acc, epoch} and loads with
torch.load(..., weights_only=True). The old file is read without executing
anything in it and is left as it is.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.checkpoints import save_checkpoint
from shiftresnet import engine
from shiftresnet.checkpoints import read_network
from shiftresnet.runs import RunError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint to read")
    parser.add_argument("target", help="file to write; must not exist yet")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if os.path.exists(args.target):
        raise RunError(f"{args.target} exists already; remove it or choose another name")
    found = read_network(args.source)
    config = found["config"]
    save_checkpoint(args.target, {**found, "config": config.as_dict()})
    measured = "" if found["acc"] is None else f", {found['acc']:.2f}% at epoch {found['epoch']} according to the file"
    print(f"{args.target}: {config.arch}{config.suffix()}, {config.num_classes} classes{measured}")


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
