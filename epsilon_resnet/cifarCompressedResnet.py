"""Test a compressed CIFAR network, or train it further (Yu et al., CVPR 2018).

    python epsilon_resnet/cifarCompressedResnet.py --gpu 0 --cifar10 \\
        --cfg train_log.cifar10-e_2.5-n_18/compressed_model_303420.cfg

The last line is `Error: <fraction>`, of 10,000 test images. With --epochs N
the network is trained N epochs more first, without gates; the result goes to
train_log.<output>/, with a compressed_model_<step>.cfg of its own.
Without --cifar10 or --cifar100 the data set is the checkpoint's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from epsilon_resnet import engine, flags, pruning
from epsilon_resnet.inputs import TEST_BATCH_SIZE
from epsilon_resnet.launch import run_training, test_batches_for
from epsilon_resnet.models import NUM_CLASSES
from epsilon_resnet.run import gpu_errors_explained
from epsilon_resnet.runs import RunError, command_line


def build_parser(doc: str = __doc__, dataset: str | None = None):
    """Flags of this script, and with a fixed data set those of svhnCompressedResnet.py."""
    parser = flags.new_parser(doc)
    parser.add_argument("--gpu", required=True, help="device; without CUDA the CPU is used")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="written by compressModel.py")
    parser.add_argument("-n", "--num_units", type=int, default=18, help="the .cfg's is used (default: %(default)s)")
    parser.add_argument("-o", "--output", help="training: suffix of the log directory (default: none)")
    if dataset is None:
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--cifar10", dest="dataset", action="store_const", const="cifar10", help="10 classes")
        which.add_argument("--cifar100", dest="dataset", action="store_const", const="cifar100", help="100 classes")
    else:
        parser.set_defaults(dataset=dataset)
    extra = parser.add_argument_group("added in this repository")
    flags.add_data_flags(extra)
    flags.add_training_flags(extra, "0, test only", "128 for each GPU", gated=False)
    parser.set_defaults(load=None)
    return parser


def dataset_of(args, network) -> str:
    """The flag's data set, else the checkpoint's, else CIFAR-10. Raises RunError if its classes do not fit."""
    dataset = args.dataset or network.content.get("dataset")
    if dataset is None:
        dataset = "cifar100" if network.config.num_classes == 100 else "cifar10"
    if NUM_CLASSES[dataset] != network.config.num_classes:
        raise RunError(f"the network has {network.config.num_classes} classes, {dataset} has {NUM_CLASSES[dataset]}")
    return dataset


def print_fields(compressed):
    """What the .cfg says, as the original prints it."""
    fields = compressed.fields
    print(f"N={fields['N']}\nstructure={fields['structure']}")
    print(f"discard_first_block={fields['discard_first_block']}\nmodel_path={compressed.path}")
    for name, kept, first in zip(
        compressed.network.build().group_names, fields["structure"], fields["discard_first_block"], strict=True
    ):
        print(f"{name}: {kept} blocks{' behind a bare shortcut' if first else ''}")


def fine_tune(args, compressed, script, argv):
    """Train a compressed network further and write it with its .cfg; returns it, or an exit status."""
    network, epochs = compressed.network, args.epochs
    args.lr_schedule = args.lr_schedule or f"0:0.01,{max(1, epochs * 2 // 3)}:0.001"
    args.command = command_line(script, argv)
    outcome = run_training(args, script, argv, None, network.config, network.state)
    if isinstance(outcome, int):
        return outcome
    _, run, training = outcome
    if training is None or not training.world.is_main:
        return 0
    network.state = training.net.state_dict()
    path = run.directory.resolve() / f"compressed_model_{training.step}.pth"
    discarded = compressed.fields["discarded_block"]
    fields = pruning.cfg_fields(network, discarded, path, training.step, training.val_error)
    cfg = pruning.write_compressed(network, fields, {"dataset": args.dataset, "pixel_mean": training.data.pixel_mean})
    print(f"trained further and saved at {cfg}")
    return 0


@gpu_errors_explained(TEST_BATCH_SIZE)
def run(args, script, argv) -> int:
    """Test, or train further with --epochs; returns the exit status."""
    compressed = pruning.read_compressed(args.cfg)
    if compressed.config.arch != "cifar":
        raise RunError(f"{args.cfg} is of an ImageNet network; use imagenetCompressedResnet.py")
    args.dataset, args.num_units = dataset_of(args, compressed.network), compressed.config.size
    args.log_name = f"train_log.{args.output}" if args.output else "train_log"
    print_fields(compressed)
    if args.epochs:
        return fine_tune(args, compressed, script, argv)
    _, device = engine.join_world(args.gpu, args.device)
    batches = test_batches_for(args, device, compressed.network.pixel_mean)
    result = engine.evaluate(compressed.network.build().to(device), batches)
    print(f"Error: {result['errors'][0]!r}")
    return 0


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    flags.check(parser, args)
    print(f"is_cifar10 {args.dataset != 'cifar100'}")
    return run(args, __file__, argv)


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
