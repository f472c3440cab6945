"""Print what is in a checkpoint of any kind, without executing anything in it.

    python -m common.checkpoints FILE

One line per entry: its place, and its shape, class or value. Classes other than those of torch.nn and torch.optim are
refused unless allowed by name; an allowed class is shown, never imported.
"""

import argparse
import sys

import torch

from common.checkpoints.errors import CheckpointError, printable
from common.checkpoints.foreign import read_foreign
from common.checkpoints.records import Record, RecordClass


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m common.checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="checkpoint: zip, legacy or tar format of PyTorch")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="a class that may occur (models.resnet.ResNet), or a prefix (models.); may be repeated; default: none",
    )
    return parser


def describe(tree):
    """Lines for everything in what `read_foreign` returned, depth first; an object met again is named, not repeated."""
    met, stack = {}, [("", tree)]
    while stack:
        place, node = stack.pop()
        children = _children(node)
        if children is not None and id(node) in met:
            yield f"{place}  the same object as {met[id(node)] or 'the whole file'}"
            continue
        met[id(node)] = place
        yield f"{place or '(whole file)'}  {_summary(node)}"
        for name, child in reversed(children or ()):
            name = "[tensor]" if isinstance(name, torch.Tensor) else printable(name, 80)  # optimizers use them as keys
            stack.append((f"{place}.{name}" if place else name, child))


def _children(node):
    if isinstance(node, Record):  # modules carry a dozen empty tables of hooks
        return [(k, v) for k, v in node.attributes.items() if not (k.startswith("_") and _is_empty(v))]
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, (list, tuple)) and not isinstance(node, torch.Size):
        return list(enumerate(node))
    return None


def _is_empty(value):
    return value is None or (isinstance(value, (dict, list, tuple, set)) and not value)


def _summary(node):
    if isinstance(node, torch.Tensor):
        values = f" = {node.item()!r}" if node.dim() == 0 else ""
        return f"{str(node.dtype).removeprefix('torch.')} {tuple(node.shape)}{values}"
    if isinstance(node, Record):
        return f"object of {printable(node.class_name)}"
    if isinstance(node, RecordClass):
        return f"class {printable(node.class_name)}"
    if isinstance(node, (dict, list, tuple, set)) and not isinstance(node, torch.Size):
        return f"{type(node).__name__} of {len(node)}"
    return printable(repr(node), 80)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        tree = read_foreign(args.file, args.allow)
    except ValueError as error:
        parser.error(str(error))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        for line in describe(tree):
            print(line)
    except BrokenPipeError:  # the reader, head or a pager, has seen enough
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
