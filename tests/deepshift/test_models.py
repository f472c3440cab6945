"""Sizes and names of all networks of the zoo: the table of the original, for float and fully converted networks."""

import csv
import json
import zlib
from pathlib import Path

import pytest
import torch

from deepshift.convert import convert_to_shift, shift_layers
from deepshift.count import count_macs, count_parameters, layer_costs
from deepshift.zoo import INPUT_SHAPES, architectures, build_model

# Measured on the original: parameters, convolutions, linear layers, keys, grouped convolutions, parameters after PS
# conversion at depth 1000, CRC-32 of the names and shapes.
with open(Path(__file__).with_name("zoo.csv"), newline="") as file:
    TABLE = list(csv.DictReader(file))


def names_of(model):
    return [f"{name} {json.dumps(list(value.shape))}" for name, value in model.state_dict().items()]


@pytest.mark.parametrize("row", TABLE, ids=[row["arch"] for row in TABLE])
def test_sizes_and_names(row):
    with torch.device("meta"):
        model = build_model(row["dataset"], row["arch"])
        kinds = [type(module) for module in model.modules()]
        assert count_parameters(model) == int(row["params"])
        assert kinds.count(torch.nn.Conv2d) == int(row["conv"])
        assert kinds.count(torch.nn.Linear) == int(row["linear"])
        grouped = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
        assert len(grouped) == int(row["grouped"])
        names = names_of(model)
        assert len(names) == int(row["keys"])
        if row["crc32"]:
            assert zlib.crc32("\n".join(names).encode()) == int(row["crc32"])
        if row["params_ps"]:
            convert_to_shift(model, 1000, "PS", row["arch"] != "simple_linear", convert_weights=True)
            assert count_parameters(model) == int(row["params_ps"])


def test_every_network_of_the_script_is_in_the_table():
    assert set(architectures("cifar10")) == {row["arch"] for row in TABLE if row["dataset"] == "cifar10"}


def test_depth_counts_from_the_end_and_takes_every_linear_layer():
    expected = {
        ("cifar10", "resnet20", 4): {"layer3.2.conv2", "layer3.2.conv1", "layer3.1.conv2", "layer3.1.conv1", "linear"},
        ("mnist", "simple_linear", 2): {"fc3", "fc2"},
        ("mnist", "simple_conv", 1): {"conv2", "fc1", "fc2"},
        ("cifar10", "lenet", 1): {"conv2", "fc1", "fc2", "fc3"},
    }
    for (dataset, arch, depth), names in expected.items():
        with torch.device("meta"):
            model, _ = convert_to_shift(build_model(dataset, arch), depth, "Q", arch != "simple_linear")
        assert set(shift_layers(model)) == names


def test_resnet1202_keeps_201_convolutions_at_depth_1000():
    with torch.device("meta"):
        model, count = convert_to_shift(build_model("cifar10", "resnet1202"), 1000, "PS")
    left = sum(type(module) is torch.nn.Conv2d for module in model.modules())
    assert (count, left) == (1000, 201)


@pytest.mark.parametrize("arch", ["lenet", "mobilenetv2"])
def test_operations_of_a_layer_follow_from_its_loops(arch):
    """Counted one product at a time, with groups and strides, against an independent formula."""
    model = build_model("cifar10", arch)
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o, name=name: sizes.update({name: o.shape[2] * o.shape[3]}))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    for name, macs in count_macs(model, INPUT_SHAPES["cifar10"]).items():
        layer = model.get_submodule(name)
        per_pixel = layer.in_features * layer.out_features if name not in sizes else (
            layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups * layer.out_channels
        )  # fmt: skip
        assert macs == per_pixel * sizes.get(name, 1), name


def test_conversion_turns_multiplications_into_shifts():
    before = layer_costs(build_model("cifar10", "resnet20"), (3, 32, 32))
    model, _ = convert_to_shift(build_model("cifar10", "resnet20"), 1000, "Q", weight_bits=4)
    after = layer_costs(model, (3, 32, 32))
    assert before.keys() == after.keys()
    for name, cost in after.items():
        assert cost["multiplications"] == 0 and cost["shifts"] == cost["sign flips"] == before[name]["multiplications"]
        assert cost["additions"] == before[name]["additions"]
    assert after["conv1"]["bits"] == 4 * 16 * 27
    assert after["linear"]["bits"] == 4 * 640 + 32 * 10
    # conv1: 16 x 32 x 32 sums of 27 products without bias; linear: 10 sums of 64 products and a bias
    assert before["conv1"]["additions"] == 16 * 32 * 32 * 26
    assert before["linear"]["additions"] == 640
