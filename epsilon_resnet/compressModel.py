"""Remove the discarded blocks of a trained epsilon-ResNet (Yu et al., CVPR 2018).

    python epsilon_resnet/compressModel.py --dir train_log.cifar10-e_2.5-n_18 --step 303420

Writes compressed_model_<step>.cfg and .pth beside model-<step>.pth and prints
what is left: blocks, parameters, multiply-adds, measured inference time.

Which blocks go (--criterion):
  ema      the original's rule: closed in about the last 238 training batches
  weights  the last convolution has decayed to --tol of the live blocks' median
  gate     closed in every calibration batch

--verify runs both networks on test images and ends with exit status 1 if a
pruned block was not an identity there, or the logits differ.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools

import torch

from common.checkpoints import CheckpointError
from epsilon_resnet import engine, flags, imagenet_inputs, inputs, logfile, pruning
from epsilon_resnet.checkpoints import Network, read_network
from epsilon_resnet.count import comparison
from epsilon_resnet.launch import test_batches_for
from epsilon_resnet.models import Config, build_model
from epsilon_resnet.modules import is_closed
from epsilon_resnet.run import gpu_errors_explained
from epsilon_resnet.runs import RunError, load_state, model_files

TOLERANCE = 1e-6  # of the largest logit: what differs then is rounding


def build_parser():
    parser = flags.new_parser(__doc__)
    parser.add_argument("--dir", required=True, help="folder with one run's log.log in it, at any depth")
    parser.add_argument("--step", type=int, required=True, help="global step of the checkpoint to compress")
    extra = parser.add_argument_group("added in this repository")
    extra.add_argument(
        "--criterion", default="ema", choices=("ema", "weights", "gate"), help="see above (default: %(default)s)"
    )
    extra.add_argument("--tol", type=float, default=1e-2, help="of --criterion weights (default: %(default)s)")
    extra.add_argument("--verify", action="store_true", help="compare both networks on test images")
    extra.add_argument(
        "--images", type=int, default=1024, help="test images for --verify and --criterion gate (default: %(default)s)"
    )
    flags.add_data_flags(extra)
    extra.add_argument("--data", dest="data_dir", help="ImageNet: instead of --data-dir", default=None)
    extra.add_argument("--workers", type=int, default=2, help="processes that decode images (default: %(default)s)")
    return parser


def find_log(directory: str) -> Path:
    """The only log.log below a folder. Raises RunError if there is none or there are several."""
    found = sorted(Path(directory).rglob("log.log"))
    if len(found) != 1:
        names = f" ({', '.join(str(path.parent) for path in found)})" if found else f" in {directory}"
        raise RunError(f"No log.log or multiple log.log exists{names}; give the folder of one run with --dir")
    return found[0]


def find_model(folder: Path, step: int) -> Path:
    """model-<step>.pth in a folder. Raises RunError, saying which steps exist, if it is not there."""
    files = model_files(folder)
    if step not in files:
        steps = f"steps there: {', '.join(map(str, files))}" if files else "no checkpoint is there"
        raise RunError(f"the model file does not exist: model-{step}.pth in {folder}; {steps}")
    return files[step]


def read_states(log_path: Path, network: Network, step: int) -> tuple[dict[str, float], list[float]]:
    """(moving average of is_discarded by block, val_error) at a step: the checkpoint's, or else those of log.log.

    Raises RunError if neither has them, with the steps that the log has.
    """
    config, averages = network.config, network.content.get("ema")
    if isinstance(averages, dict):
        states = {name: averages.get(f"{name}/is_discarded") for name in config.block_names}
        if None not in states.values():
            return states, [float(value) for value in network.content.get("val_error", [])]
    lines = logfile.messages(log_path.read_text(errors="replace"))
    try:
        check_log(lines, config, log_path)
        discarded, val_error, matched = logfile.discarded_in_log(lines, step)
    except ValueError as error:
        steps = ", ".join(map(str, logfile.steps_in_log(lines))) or "none"
        raise RunError(f"{log_path}: {error}; steps in the log: {steps}") from None
    print("\n".join(matched))
    return {name: float(name in discarded) for name in config.block_names}, val_error


def check_log(lines: list[str], config: Config, log_path):
    """Raises RunError if a log is of another network than the checkpoint, ValueError if it does not say which."""
    arch, size, _ = logfile.network_in_log(lines)
    if (arch, size) != (config.arch, config.size):
        raise RunError(
            f"{log_path} is of {arch} {size}, the checkpoint of {config.arch} {config.size}: one is of another run"
        )


def calibration_batches(args, network: Network, device):
    """Test batches, about --images images, as evaluation sees them."""
    dataset = network.content.get("dataset") or ("cifar100" if network.config.num_classes == 100 else "cifar10")
    if network.config.arch == "imagenet":
        root = imagenet_inputs.folder(args.data_dir, args.embedded_data)
        batches = imagenet_inputs.validation_loader(
            root, inputs.TEST_BATCH_SIZE, size=network.config.image_size, workers=args.workers, device=device
        )
    else:
        args.dataset = dataset
        batches = test_batches_for(args, device, network.pixel_mean)
    return list(itertools.islice(batches, max(1, -(-args.images // inputs.TEST_BATCH_SIZE))))


def choose(args, network: Network, states: dict[str, float], batches) -> list[str]:
    """The blocks to discard, in network order."""
    if args.criterion == "ema":
        return pruning.by_average(states, network.config)
    if args.criterion == "weights":
        return pruning.by_weights(network.build(), states, args.tol)
    return pruning.by_gates(network.build().to(batches[0][0].device), batches)


def print_structure(network: Network, compressed: Network, discarded: list[str]):
    """What the original prints of the compressed network."""
    config = compressed.config
    for group, kept in enumerate(config.structure, 1 if config.arch == "cifar" else 0):
        print(f"#block in group{group}: {kept}")
    print(f"name_mapping: {pruning.name_mapping(network.config, discarded)}")
    first = dict(enumerate(config.discard_first_block, 1 if config.arch == "cifar" else 0))
    print(f"The first block is discarded: {first}")


def print_costs(network: Network, compressed: Network, device):
    """Counts and measured inference time before and after."""
    models = [network.build().to(device), compressed.build().to(device)]
    with torch.device("meta"):
        print("\n".join(comparison(build_model(network.config), build_model(compressed.config))))
    size, count = (32, 128) if network.config.arch == "cifar" else (224, 8)
    images = torch.randn(count, 3, size, size, device=device)
    before, after = pruning.inference_times(models, images)
    print(
        f"inference time ({count} images): {before * 1e3:.1f} ms -> {after * 1e3:.1f} ms ({before / after:.2f}x faster)"
    )


def verify(network: Network, compressed: Network, discarded: list[str], batches, device):
    """Compare both networks on test images. Raises RunError if a pruned block was open, or the logits differ."""
    full, small = network.build().to(device), compressed.build().to(device)
    peaks = pruning.responses(full, batches)
    largest = dict(zip(network.config.block_names, peaks.amax(0).tolist(), strict=True))
    for name in discarded:
        ratio = largest[name] / network.epsilon if network.epsilon else float(largest[name] > 0)
        print(f"{name}: max|F|/epsilon {ratio:.3g}")
    images = sum(len(targets) for _, targets in batches)
    difference, scale = pruning.logit_differences(full, small, batches)
    print(f"verified on {images} images: max |logit difference| {difference:.3g} (largest logit {scale:.3g})")
    closed = dict(zip(network.config.block_names, is_closed(peaks, network.epsilon).sum(0).tolist(), strict=True))
    live = [name for name in discarded if closed[name] < len(batches)]
    if live:
        raise RunError(f"{', '.join(live)} would be pruned but passed images on; use --criterion gate or weights")
    if difference > TOLERANCE * max(scale, 1.0):
        raise RunError(f"the networks differ by {difference:.3g} at logits of {scale:.3g}"
                       + blame(closed, discarded, len(batches)))  # fmt: skip


def blame(closed: dict[str, int], discarded: list[str], batches: int) -> str:
    """Which kept blocks make the networks differ. closed: by block, the number of batches whose gate was closed."""
    kept = {name: count for name, count in closed.items() if count and name not in discarded}
    always = [name for name, count in kept.items() if count == batches]
    if always:
        return f"; {', '.join(always)} is closed but was kept: see --criterion gate"
    if kept:
        names = ", ".join(f"{name} ({count} of {batches} batches)" for name, count in kept.items())
        return f"; gates between open and closed: {names}; train on until they settle"
    return ""


@gpu_errors_explained(inputs.TEST_BATCH_SIZE, "--images")
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.tol < 1 or args.images < 1:
        parser.error("--tol must be in [0, 1), --images at least 1")
    _, device = engine.join_world(None, args.device)
    log_path = find_log(args.dir)
    print(f"log.log is found at {log_path.parent}")
    path = find_model(log_path.parent, args.step)
    load_state(path)  # its checksums
    network = read_network(path)
    pruning.check_step(path, network, args.step)
    if not network.config.gated:
        raise CheckpointError(f"{path}: this network has no gates, there is nothing to compress")
    needs_images = args.verify or args.criterion == "gate"
    states, val_error = read_states(log_path, network, args.step)
    batches = calibration_batches(args, network, device) if needs_images else None
    discarded = choose(args, network, states, batches)
    compressed = pruning.compress_network(network, discarded)
    print_structure(network, compressed, discarded)
    if args.verify:
        verify(network, compressed, discarded, batches, device)
    target = path.resolve().with_name(f"compressed_model_{args.step}.pth")
    fields = pruning.cfg_fields(compressed, discarded, target, args.step, val_error)
    extra = {"dataset": network.content.get("dataset"), "pixel_mean": network.pixel_mean}
    pruning.write_compressed(compressed, fields, extra)
    print_costs(network, compressed, device)
    if not discarded:
        print("note: no block is discarded, the network keeps all of its blocks")
    print(f"The model is compressed and saved at {target}")


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
