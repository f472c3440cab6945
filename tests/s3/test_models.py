"""Networks, counts and schedules: the specification's tables, names of torchvision, limits of the sizes."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from s3 import count
from s3.discrete import plain_state_dict
from s3.network import Config, infer_config
from s3.observe import WeightWatch
from s3.resnet import CIFAR_DEPTHS, IMAGENET_DEPTHS, architectures, build_resnet, cifar_resnet, imagenet_resnet
from s3.s3conv2dshift import latent_layers
from s3.schedule import cosine_rate, step_rate

with open(Path(__file__).with_name("counts.csv"), newline="") as file:
    TABLE = list(csv.DictReader(file))


def meta(dataset, depth, classes=10, method="s3", bits=3):
    make = imagenet_resnet if dataset == "imagenet" else cifar_resnet
    with torch.device("meta"):
        return make(depth, classes, method, bits)


@pytest.mark.parametrize("row", TABLE, ids=[row["arch"] for row in TABLE])
def test_counts_of_the_table(row):
    family, depth = ("cifar10", row["arch"][6:]) if row["arch"].startswith("cifar") else ("imagenet", row["arch"][6:])
    model = meta(family, int(depth), 1000 if family == "imagenet" else 10)
    found = count.describe_counts(model, (3, 224, 224) if family == "imagenet" else (3, 32, 32))
    names = {"latent": "params_latent", "effective": "params_effective", "quantised": "params_quantised",
             "layers": "quantised_layers", "macs": "macs", "shift_macs": "macs_quantised", "bits": "size_bits",
             "float_bits": "size_bits_fp32"}  # fmt: skip
    assert {key: found[name] for key, name in names.items()} == {key: int(row[key]) for key in names}
    assert len(model.state_dict()) == int(row["entries"]) and len(list(model.parameters())) == int(row["tensors"])


def test_the_table_has_every_network():
    assert len(TABLE) == len(IMAGENET_DEPTHS) + len(CIFAR_DEPTHS) - 1  # 14 and 18 are one


def test_cifar_100_has_5850_parameters_more():
    ten, hundred = (count.describe_counts(meta("cifar10", 20, n), (3, 32, 32)) for n in (10, 100))
    assert hundred["params_latent"] - ten["params_latent"] == 5850
    assert (hundred["macs"] - ten["macs"], hundred["size_bits"] - ten["size_bits"]) == (5760, 187_200)


def test_count_prints_the_readme_lines(capsys, tmp_path):
    assert count.main(["--arch", "resnet18", "--csv", str(tmp_path / "layers.csv"), "--layers"]) == 0
    text = capsys.readouterr().out
    for number in ("45,162,024", "11,689,512", "11,157,504", "1,814,073,344", "1,695,547,392", "50,803,968"):
        assert number in text
    with open(tmp_path / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21 and sum(int(row["MACs"]) for row in rows) == 1_814_073_344


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_plain_networks_have_torchvisions_names_and_shapes(depth):
    import torchvision

    with torch.device("meta"):
        theirs = torchvision.models.get_model(f"resnet{depth}").state_dict()
    plain = plain_state_dict(meta("imagenet", depth, 1000), prefix="")
    assert [(name, tensor.shape) for name, tensor in plain.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.parametrize("dataset", ["imagenet", "cifar10"])
@pytest.mark.parametrize(("method", "bits"), [("s3", 2), ("s3", 3), ("s3", 4), ("denseshift", 3), ("float", 3)])
def test_a_network_is_recognised_by_its_tensors(dataset, method, bits):
    for depth in IMAGENET_DEPTHS if dataset == "imagenet" else (8, 20, 110):
        state = meta(dataset, depth, 7, method, bits).state_dict()
        assert infer_config(state) == Config(dataset, f"resnet{depth}", 7, method, bits)
    assert infer_config({"features.0.weight": torch.zeros(1)}) is None


def test_downsampling_is_where_shapes_change():
    with_shortcut = [name for name in latent_layers(meta("imagenet", 50)) if "downsample" in name]
    assert with_shortcut == [f"layer{stage}.0.downsample.0" for stage in (1, 2, 3, 4)]
    assert len([name for name in latent_layers(meta("cifar10", 20)) if "downsample" in name]) == 2
    for bottleneck in (meta("imagenet", 50).layer2[0],):
        assert [bottleneck.conv1.stride, bottleneck.conv2.stride] == [(1, 1), (2, 2)]


@pytest.mark.parametrize(("depth", "blocks"), [(2, 1), (7, 1), (8, 1), (14, 2), (18, 2), (110, 18)])
def test_blocks_of_cifar_networks(depth, blocks):
    assert len(cifar_resnet(depth, method="float").layer3) == blocks


@pytest.mark.parametrize(("make", "text"), [
    (lambda: imagenet_resnet(20), "depth must be one of 18, 34, 50, 101, 152, not 20"),
    (lambda: cifar_resnet(1), "depth must be at least 2"),
    (lambda: cifar_resnet(8, method="shift"), "method must be one of s3, denseshift, float"),
    (lambda: cifar_resnet(8, bits=8), "2, 3 or 4 bits"),
    (lambda: build_resnet("cifar10", "resnet19", 10), "no resnet19 for cifar10; choose from resnet8"),
    (lambda: build_resnet("cifar10", "resnet8", 10, start="low"), "start must be one of default, dense"),
])  # fmt: skip
def test_mistakes(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("dataset", "sizes", "too_large"), [("imagenet", (64, 193, 416), 417), ("cifar", (16, 60), 61)]
)
def test_image_sizes(dataset, sizes, too_large):
    model = meta("imagenet" if dataset == "imagenet" else "cifar10", 18, method="float").eval()
    for size in sizes:
        assert model(torch.empty(1, 3, size, size, device="meta")).shape == (1, 10)
    with pytest.raises(ValueError, match="the images are too large"):
        model(torch.empty(1, 3, too_large, too_large, device="meta"))


def test_above_224_pixels_only_the_upper_left_of_the_last_map_counts():
    """As in the original, whose pool is not adaptive."""
    torch.manual_seed(0)
    model, seen = imagenet_resnet(18, 3, "float").eval(), []
    model.layer4.register_forward_hook(lambda layer, x, y: seen.append(y))
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 256, 256))
        assert seen[0].shape[2:] == (8, 8)
        torch.testing.assert_close(logits, model.fc(seen[0][:, :, :7, :7].mean((2, 3))))


def test_architecture_names():
    assert architectures("imagenet") == ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    assert architectures("mnist") == architectures("cifar100") and "resnet20" in architectures("cifar10")


def test_schedules():
    assert cosine_rate(0.1, 0, 10, "fixed") == 0.1 and cosine_rate(0.1, 9, 10, "fixed") > 0
    assert cosine_rate(0.1, 9, 10) == 0
    assert [round(step_rate(0.1, epoch), 9) for epoch in (0, 29, 30, 60, 89)] == [0.1, 0.1, 0.01, 0.001, 0.001]


@pytest.mark.parametrize("method", ["s3", "float"])
def test_changes_of_weights_are_counted(method):
    torch.manual_seed(0)
    model = build_resnet("cifar10", "resnet8", 10, method)
    watch = WeightWatch(model)
    before = watch.look()
    assert watch.compare(before)["sign_changes"] == 0
    with torch.no_grad():
        model.layer3[0].conv2.weight.neg_()  # 36,864 of 76,288 signs
        nn.init.ones_(model.conv1.weight)  # not a convolution that S3 replaces
    found = watch.compare(before)
    assert found["sign_changes"] == pytest.approx(36_864 / 76_288)
    if method == "s3":
        zeros = sum(int((layer.discrete_weight() == 0).sum()) for layer in latent_layers(model).values())
        assert found["zeros"] == zeros / 76_288 and 0.4 < found["zeros"] < 0.6
        assert 0.4 < found["weight_changes"] / found["sign_changes"] < 0.6, "zeros do not change with their sign"
    else:
        assert set(found) == {"sign_changes"}
