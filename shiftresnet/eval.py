"""Test saved networks: checkpoints of main.py and the original's .t7 files.

    python shiftresnet/eval.py --model='checkpoint/*_cifar100.t7' --dataset=cifar100

Prints for each file `Reading from model <path>` and a line that ends in
`Loss: 0.424 | Acc: 89.560% (8956/10000)`. Nothing in a file is executed. A
checkpoint of main.py gives the accuracy that training printed, to the last
digit, on the same device.
"""

import argparse
import glob
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.checkpoints import CheckpointError
from shiftresnet import engine
from shiftresnet.checkpoints import read_network
from shiftresnet.models import NUM_CLASSES, build_model
from shiftresnet.run import RunError, gpu_errors_explained


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        action="append",
        metavar="PATTERN",
        required=True,
        help="checkpoint file or glob pattern of files; may be given several times",
    )
    parser.add_argument(
        "--suppress-errors", action="store_true", help="go on with the next file when one cannot be tested"
    )
    parser.add_argument(
        "--dataset", default="cifar10", choices=tuple(NUM_CLASSES), help="test set (default: %(default)s)"
    )
    extra = parser.add_argument_group("added in this repository")
    extra.add_argument(
        "--data-dir",
        "--datadir",
        default="./data/",
        metavar="DIR",
        help="where data sets are, downloaded there if missing (default: %(default)s)",
    )
    extra.add_argument("--embedded-data", action="store_true", help="test on scikit-learn's digits, no download")
    extra.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    extra.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def matching_files(patterns: list[str]) -> list[str]:
    """Files of each pattern, in reverse order as in the original. Raises RunError if a pattern matches none."""
    files = []
    for pattern in patterns:
        # a file that is there is meant, whatever its name would match as a pattern
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern), reverse=True)
        if not found:
            raise RunError(f"no checkpoint matches {pattern}; train one with shiftresnet/main.py or correct --model")
        files += found
    return files


def test_file(path: str, dataset: str, images, device: torch.device) -> float:
    """Top-1 in percent of one checkpoint. Raises CheckpointError or RunError if it cannot be tested."""
    found = read_network(path)
    engine.require_classes(found["config"], dataset)
    model = build_model(found["config"])
    model.load_state_dict(found["net"])
    memory_format = torch.channels_last if found["channels_last"] else torch.contiguous_format
    model.to(device, memory_format=memory_format)
    loader = engine.test_loader(images, device, channels_last=found["channels_last"])
    return engine.evaluate(model, loader)[1]


@gpu_errors_explained(engine.TEST_BATCH_SIZE["cuda"])
def main(argv=None) -> dict[str, float]:
    """Test all files; returns {path: top-1 in percent}."""
    args = build_parser().parse_args(argv)
    _, device = engine.join_world(args.device)
    files = matching_files(args.model)
    images = engine.load_split(args.dataset, args.data_dir, "test", args.embedded_data)
    print("==> Resuming from checkpoint..")
    results = {}
    for path in files:
        print(f"Reading from model {path}", flush=True)
        try:
            results[path] = test_file(path, args.dataset, images, device)
        except (CheckpointError, RunError) as error:
            if not args.suppress_errors:
                raise
            print("The model may be malformed.")
            print(error)
        print(" ")
    if not results:
        raise RunError("none of the files could be tested")
    return results


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
