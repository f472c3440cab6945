"""What a trained network costs: numbers, operations, bits, energy of one inference, latency on this machine.

The counts are those of the papers' own count.py, of the network that a run's header describes. Where a paper's count
lacks one (bits of float networks), it is derived here from the same network.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reporting.records import ReportError

# Energy of one 32-bit operation in pJ at 45 nm. M. Horowitz, "Computing's energy problem", ISSCC 2014; the shift, which
# is not in it, from You et al., "ShiftAddNet", NeurIPS 2020 (0.13 also in their GATECH-EIC/ShiftAddNAS, hw_utils.py).
PICOJOULES = {"float multiplication": 3.7, "float addition": 0.9, "integer addition": 0.1, "shift": 0.13}
FLOAT_BITS = 32
WARM_UP, REPEATS = 5, 25


@dataclass(frozen=True)
class Costs:
    """Of one network and one image. macs = multiplications + shifts: each product is added once.

    params: numbers that inference needs, one per weight. bits: of these and batch norm's statistics, as stored.
    """

    params: int
    macs: int
    multiplications: int
    shifts: int
    bits: int

    @property
    def microjoules(self) -> float:
        """Energy of the products and sums: float where a weight is float, 32-bit fixed point where it is a shift."""
        cost = PICOJOULES
        float_mac = cost["float multiplication"] + cost["float addition"]
        return (self.multiplications * float_mac + self.shifts * (cost["shift"] + cost["integer addition"])) / 1e6


@dataclass(frozen=True)
class Network:
    """A network by description: label in words, input (C, H, W), how to build it and how to count it.

    is_plain: without the paper's method, what the paper compares with.
    """

    label: str
    is_plain: bool
    input_shape: tuple[int, int, int]
    build: Callable
    count: Callable


def describe(paper: str, config: dict) -> Network:
    """The network of a run's header. Raises ReportError if this version of the paper's code cannot build it."""
    try:
        return NETWORKS[paper](config)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{paper}: no costs of the network {config}: {error}") from None


def count(network: Network) -> Costs:
    """Costs of a network, from shapes alone. Raises ReportError if it cannot be built."""
    import torch

    try:
        with torch.device("meta"):
            model = network.build()
        return network.count(model)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ReportError(f"no costs of {network.label}: {str(error).splitlines()[0]}") from None


def latency_ms(network: Network) -> float:
    """Median time of one image (batch 1, fp32, eager, CPU), weights random: speed does not depend on them."""
    import torch

    model, image, times = network.build().eval(), torch.randn(1, *network.input_shape), []
    with torch.inference_mode():
        for number in range(WARM_UP + REPEATS):
            start = time.perf_counter()
            model(image)
            if number >= WARM_UP:
                times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def load() -> str:
    """How busy this machine has been in the last minute, in words; "" where the system does not say."""
    try:
        return f"{os.getloadavg()[0]:.1f} busy processes on {os.cpu_count()} processors"
    except (AttributeError, OSError):
        return ""


def machine() -> str:
    """Processor and threads in words."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}, PyTorch {torch.__version__}"


def _float_bits(model, params: int, skip: str = "-") -> int:
    """Bits of `params` numbers and of batch norm's statistics; modules whose name starts with `skip` do not count."""
    statistics_ = (b.numel() for name, b in model.named_buffers()
                   if name.endswith(("running_mean", "running_var")) and not name.startswith(skip))  # fmt: skip
    return FLOAT_BITS * (params + sum(statistics_))


def _float_costs(model, params, macs, skip="-"):
    return Costs(params, macs, macs, 0, _float_bits(model, params, skip))


def _shiftresnet(config):
    from shiftresnet.count import count_flops, count_parameters
    from shiftresnet.models import Config, build_model

    described = Config(**config)
    label = described.arch
    if described.expansion != 1 or described.family == "shiftresnet":
        label += f", expansion {described.expansion:g}"
    if described.reduction != 1:
        label += f", {described.reduction_mode} reduction {described.reduction:g}"
    return Network(label, described.family != "shiftresnet", (3, 32, 32), lambda: build_model(described),
                   lambda model: _float_costs(model, count_parameters(model), count_flops(model, "true")))  # fmt: skip


def _deepshift(config):
    from deepshift.checkpoints import from_config
    from deepshift.zoo import INPUT_SHAPES

    kind = f"DeepShift-{config['shift_type']}, {config['weight_bits']} bits" if config["layers"] else "float"
    shape = INPUT_SHAPES[config["dataset"]]

    def count_(model):
        from deepshift.count import by_kind, layer_costs

        total, signs = by_kind(model, shape)[-1], 0
        if config["shift_type"] == "PS":  # trains a shift and a sign for each weight; inference needs one number
            signs = sum(model.get_submodule(name).sign.numel() for name, cost in layer_costs(model, shape).items()
                        if cost["shifts"])  # fmt: skip
        return Costs(total["parameters"] - signs, total["MACs"], total["multiplications"], total["shifts"],
                     total["bits"])  # fmt: skip

    return Network(f"{config['arch']}, {kind}", kind == "float", shape, lambda: from_config(config), count_)


def _s3(config):
    from s3.count import describe_counts
    from s3.network import Config

    described = Config(**config)
    kind = "float" if described.method == "float" else f"{described.method}, {described.bits} bits"
    shape = (3, 224, 224) if described.family == "imagenet" else (3, 32, 32)

    def count_(model):
        counts = describe_counts(model, shape)
        return Costs(counts["params_effective"], counts["macs"], counts["macs_fp32"], counts["macs_quantised"],
                     counts["size_bits"])  # fmt: skip

    return Network(f"{described.arch}, {kind}", kind == "float", shape, described.build, count_)


def _shared_bases(config):
    from shared_bases.count import count_macs, count_parameters
    from shared_bases.models import IMAGE_SIZES, Config, build_model

    described = Config(**config)
    size = IMAGE_SIZES[described.dataset]
    ranks = "".join(f", {name[0]} = {value}" for name, value in described.ranks().items())
    is_plain = "Shared" not in described.model
    return Network(described.model + ranks, is_plain, (3, size, size), lambda: build_model(described),
                   lambda model: _float_costs(model, count_parameters(model), count_macs(model, size)))  # fmt: skip


def _epsilon_resnet(config):
    from epsilon_resnet.count import count_macs, count_parameters
    from epsilon_resnet.models import Config, build_model

    described = Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})
    label = f"epsilon-ResNet-{described.layers}" if described.gated else f"ResNet-{described.layers}"
    if described.structure is not None:
        label += f", {sum(described.structure)} of {len(described.block_names)} blocks kept"
    size = described.image_size
    is_plain = not described.gated and described.structure is None
    return Network(label, is_plain, (3, size, size), lambda: build_model(described),
                   lambda model: _float_costs(model, count_parameters(model, side_branch=False), count_macs(model),
                                              "side_output."))  # fmt: skip


NETWORKS = {
    "shiftresnet": _shiftresnet,
    "deepshift": _deepshift,
    "s3": _s3,
    "shared_bases": _shared_bases,
    "epsilon_resnet": _epsilon_resnet,
}
