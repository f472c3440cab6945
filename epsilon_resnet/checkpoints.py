"""Reading a network from a file: checkpoints of training runs, compressed models, and plain state dicts."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from common.checkpoints import CheckpointError, read_foreign
from epsilon_resnet.models import IMAGENET_BLOCKS, Config, ResNet, build_model, config_from_dict


@dataclass
class Network:
    """A network as a file holds it: state dict, configuration, threshold of its gates, and the file's other entries."""

    state: dict[str, Tensor]
    config: Config
    epsilon: float
    content: dict

    def build(self) -> ResNet:
        """The network with its weights, on the CPU, in evaluation mode."""
        with torch.device("meta"):  # initial weights would take longer than all the rest
            model = build_model(self.config, self.epsilon)
        model.load_state_dict({name: value.clone() for name, value in self.state.items()}, assign=True)
        return model.eval()

    @property
    def pixel_mean(self) -> Tensor | None:
        return self.content.get("pixel_mean")


def infer_config(state: dict[str, Tensor]) -> Config:
    """The configuration of an uncompressed network from the names and shapes in its state dict.

    Raises ValueError if they are not those of a network of this paper.
    """
    names = "\n".join(state)
    try:
        classes = state["linear.weight"].shape[0]
        gated = "side_output.linear.weight" in state
        if "res1.0.conv1.weight" in state:
            n = 1 + max(map(int, re.findall(r"^res1\.(\d+)\.", names, re.M)))
            return Config("cifar", n, classes, gated)
        blocks = [set(re.findall(rf"^group{group}\.(block\d+)\.", names, re.M)) for group in range(4)]
        structure, bottleneck = tuple(map(len, blocks)), "group0.block0.conv3.weight" in state
        depths = [d for d, full in IMAGENET_BLOCKS.items() if full == structure and (d >= 50) == bottleneck]
        return Config("imagenet", depths[0], classes, gated)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ValueError("its layers are not those of an uncompressed network of this paper") from None


def read_network(path) -> Network:
    """Read a network without executing anything in the file.

    Raises CheckpointError if the file is missing, damaged, hostile, or holds another kind of network.
    """
    content = read_foreign(path)
    try:
        if not isinstance(content, dict):
            raise ValueError("it is no dict")
        state = content.get("model", content)
        state = {str(name).removeprefix("module."): value for name, value in state.items()}
        config = config_from_dict(content["config"]) if isinstance(content.get("config"), dict) else infer_config(state)
        network = Network(state, config, float(content.get("epsilon", 0.0)), content if "model" in content else {})
        network.build()
        return network
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a checkpoint of an epsilon-ResNet network: {reason}") from None
