"""Reading a network from a checkpoint: this repository's files and those of the original, of any year.

The original pickled whole modules under class paths that moved over time; they are read as inert records, nothing in a
file is executed. What a file does not say (architecture, options) follows from the names and shapes of its tensors.
"""

import torch

from common.checkpoints import CheckpointError, read_foreign, record_state_dict
from shiftresnet.models import DEPTHS, Config, build_model

ORIGINAL_CLASSES = (
    "models.resnet.ResNet",
    "models.resnet.BasicBlock",
    "models.resnet.ShiftConv",
    "models.resnet.DepthWiseBlock",
    "models.resnet.DepthWiseWithSkipBlock",
    "models.resnet.ShuffleBlock",
    "models.resnet.ShuffleLayer",
    "models.resnet.MobileNetLikeBlock",
    "models.shiftresnet.ShiftConv",
    "models.depthwiseresnet.DepthWiseWithSkipBlock",
    "models.shiftnet_cuda_v2.nn.GenericShift_cuda",
    "models.shiftnet_cuda_v2.nn.Shift3x3_cuda",
    "shiftnet_cuda_v2.nn.GenericShift_cuda",
    "shiftnet_cuda_v2.nn.Shift3x3_cuda",
)


def _nicest(candidate: float, fits) -> float:
    """`candidate` with as few decimals as still `fits`: shapes alone do not determine a reduction exactly."""
    for digits in range(1, 8):
        rounded = round(candidate, digits)
        if rounded > 0 and fits(rounded):
            return rounded
    return candidate


def _fits(shapes: dict, options: dict) -> bool:
    """Whether the network of these options has exactly these shapes; old files lack the batch counters."""
    try:
        with torch.device("meta"):
            built = build_model(Config(**options)).state_dict()
    except ValueError:
        return False
    ours = {name: tuple(value.shape) for name, value in built.items() if not name.endswith("num_batches_tracked")}
    return ours == {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}


def _candidates(shapes: dict, depth: int) -> list[tuple[dict, float | None]]:
    """Option sets worth trying for a network with these shapes, each with a first guess of its reduction."""
    middle, width = shapes["layer3.0.conv1.weight"][0], shapes["linear.weight"][1]
    of_middle = width / (middle + 0.5)  # the centre of the reductions that are truncated to this width
    if "layer1.0.depth1.weight" in shapes:
        return [({"arch": f"resnet{depth}", "reduction_mode": "mobile"}, of_middle)]
    if "layer1.0.depth.weight" in shapes:
        historical = [
            ({"arch": f"resnet{depth}", "reduction_mode": mode}, of_middle) for mode in ("depthwise", "shuffle")
        ]
        return [
            ({"arch": f"depthwiseresnet{depth}"}, None),
            ({"arch": f"depthwiseresnet{depth}"}, of_middle),
            *historical,
        ]
    if shapes["layer1.0.conv1.weight"][2:] == (1, 1):
        return [({"arch": f"shiftresnet{depth}", "expansion": middle / width}, None)]
    net, block = ({"arch": f"resnet{depth}", "reduction_mode": mode} for mode in ("net", "block"))
    return [
        (net, None),
        (net, (64 / (width + 0.5)) ** 2),
        (block, of_middle),
        ({**block, "project_on_mid": True}, of_middle),
    ]


def infer_config(state_dict: dict) -> Config:
    """The configuration of a network from the names and shapes in its state dict.

    Raises ValueError if they are not those of a network of this paper.
    """
    try:
        shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
        blocks = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layer1."))
        candidates = _candidates(shapes, {n: depth for depth, n in DEPTHS.items()}[blocks])
        base = {"num_classes": shapes["linear.weight"][0]}
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ValueError("its layers are not those of a CIFAR ResNet of this paper") from None
    if "layer1.0.shortcut.0.weight" in shapes and "layer1.1.shortcut.0.weight" not in shapes:
        base["first_stride"] = 2
    for options, guess in candidates:
        options = {**base, **options}
        if guess is not None:
            options["reduction"] = _nicest(guess, lambda r, options=options: _fits(shapes, {**options, "reduction": r}))
        if _fits(shapes, options):
            return Config(**options)
    raise ValueError("its layers have shapes that no network of this paper has")


def read_network(path) -> dict:
    """Read a checkpoint of this repository or of the original without executing anything in it.

    Returns {net: state dict, config: Config, acc: percent or None, epoch: int or None, channels_last: bool}.
    Raises CheckpointError if the file is missing, damaged, hostile, or holds another kind of network.
    """
    content = read_foreign(path, ORIGINAL_CLASSES)
    if not isinstance(content, dict):
        content = {"net": content}
    net = content.get("net", content.get("state_dict", content))
    if not isinstance(net, dict):
        net = record_state_dict(net)
    net = {str(name).removeprefix("module."): value for name, value in net.items()}
    try:
        config = Config(**content["config"]) if isinstance(content.get("config"), dict) else infer_config(net)
        build_model(config).load_state_dict(net)
        acc, epoch = content.get("acc"), content.get("epoch")
        return {
            "net": net,
            "config": config,
            "acc": None if acc is None else float(acc),
            "epoch": None if epoch is None else int(epoch),
            "channels_last": bool(content.get("channels_last", False)),
        }
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a checkpoint of a ShiftResNet network: {reason}") from None
