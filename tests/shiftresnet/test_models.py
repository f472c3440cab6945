"""Counts, options and blocks of the ShiftResNet networks."""

import csv
import functools
import re
from pathlib import Path

import pytest
import torch

from common.kernels import shift_conv1x1
from shiftresnet import engine, modules
from shiftresnet.count import count_flops, count_parameters, layer_macs, main
from shiftresnet.models import ARCHITECTURES, REDUCTION_MODES, Config, build_model
from tests.golden.fill import fill_state_dict

README = Path(modules.__file__).with_name("README.md")
COUNTS = Path(__file__).parents[1] / "golden" / "shiftresnet_counts.csv"
ROWS = list(csv.DictReader(COUNTS.open(newline="")))


def config_of(row, num_classes=10):
    return Config(row["arch"], float(row["expansion"]), float(row["reduction"]), row["reduction_mode"], num_classes)


def test_rows_cover_every_architecture():
    assert len(ROWS) == 64 and {row["arch"] for row in ROWS} == set(ARCHITECTURES)


@functools.cache
def counted(config):
    """Parameters, and FLOPs under each rule."""
    with torch.device("meta"):
        model = build_model(config)
    macs = layer_macs(model)
    return count_parameters(model), *(count_flops(model, rule, macs=macs) for rule in ("final", "readme"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['arch']}-{row['expansion']}-{row['reduction']}")
def test_counts_of_every_published_row(row):
    columns = ("params", "flops_final", "flops_readme")
    config = config_of(row)
    ours, base = counted(config), counted(Config(f"resnet{config.depth}"))
    for column, new, original in zip(columns, ours, base, strict=True):
        assert new == int(row["params_10" if column == "params" else column])
        assert f"{original / new:.2f}" == row[f"{column}_reduction"]
    with torch.device("meta"):
        assert count_parameters(build_model(config_of(row, 100))) == int(row["params_100"])


def test_count_prints_the_examples_of_the_original_readme(capsys):
    main(["--arch=shiftresnet20", "--expansion=3", "--flops-rule", "readme"])
    assert capsys.readouterr().out == (
        "Parameters: (new) 95642 (original) 272474 (reduction) 2.85\n"
        "FLOPs: (new) 16581248 (original) 40960640 (reduction) 2.47\n"
    )
    main(["--arch=resnet20", "--reduction=2.8", "--reduction-mode=block"])
    assert capsys.readouterr().out == (
        "==> resnet20 with reduction 2.80\n"
        "Parameters: (new) 96206 (original) 272474 (reduction) 2.83\n"
        "FLOPs: (new) 15377024 (original) 42140288 (reduction) 2.74\n"
    )


REDUCTIONS = {
    "depthwise": {20: (1.12, 0.38, 0.19, 0.125), 56: (1.12, 0.37, 0.19, 0.124), 110: (1.1, 0.37, 0.19, 0.123)},
    "shuffle": {20: (0.38, 0.13, 0.065, 0.04), 56: (0.38, 0.128, 0.065, 0.04), 110: (0.37, 0.125, 0.065, 0.04)},
}
REDUCTIONS["mobile"] = REDUCTIONS["depthwise"]
HISTORICAL_PARAMETERS = {
    "depthwise": {
        20: (31983, 91204, 180622, 274298),
        56: (98265, 291531, 566518, 868333),
        110: (201564, 588828, 1145362, 1769766),
    },
    "mobile": {
        20: (35151, 94372, 183790, 277466),
        56: (108825, 302091, 577078, 878893),
        110: (223212, 610476, 1167010, 1791414),
    },
    "shuffle": {
        20: (35366, 94834, 185714, 299338),
        56: (101726, 291554, 569090, 922282),
        110: (204474, 599514, 1144154, 1856698),
    },
}


@pytest.mark.parametrize("mode", HISTORICAL_PARAMETERS)
@pytest.mark.parametrize("depth", (20, 56, 110))
def test_historical_blocks_have_their_recorded_parameters(mode, depth):
    with torch.device("meta"):
        counts = [
            count_parameters(build_model(Config(f"resnet{depth}", reduction=reduction, reduction_mode=mode)))
            for reduction in REDUCTIONS[mode][depth]
        ]
    assert tuple(counts) == HISTORICAL_PARAMETERS[mode][depth]


@pytest.mark.parametrize("mode", HISTORICAL_PARAMETERS)
def test_historical_networks_train(mode):
    torch.manual_seed(0)
    model = build_model(Config("resnet20", reduction=2, reduction_mode=mode))
    logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    logits.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "conv" in name)


def test_count_prints_what_the_readme_says_of_every_mode(capsys):
    table = re.findall(r"^  \| `(\w+)` \| (\d+) \| (\d+) \|$", README.read_text(), re.MULTILINE)
    assert {mode for mode, _, _ in table} == set(REDUCTION_MODES)
    for mode, parameters, flops in table:
        main(["--arch=resnet20", "--reduction=2", f"--reduction-mode={mode}"])
        output = capsys.readouterr().out
        assert f"Parameters: (new) {parameters} " in output and f"FLOPs: (new) {flops} " in output


def test_true_flops_count_every_layer_where_it_runs():
    macs = layer_macs(build_model(Config("depthwiseresnet20")))
    assert macs["conv1"] == 32 * 32 * 16 * 27
    assert macs["layer2.0.depth"] == 32 * 32 * 32 * 9  # stride 1: the block's input size
    assert macs["layer2.0.conv3"] == 16 * 16 * 32 * 32
    assert macs["linear"] == 640
    model = build_model(Config("shiftresnet20", expansion=3))
    assert count_flops(model, "final") - count_flops(model, "true") == 32 * 32 * 27 * (64 - 16)
    assert count_flops(model, "final") - count_flops(model, "readme") == 18432 * 64
    assert model.training, "counting leaves the model as it was"


def test_shift_block_has_its_relu_before_the_addition():
    torch.manual_seed(0)
    block = modules.ShiftConv(16, 16, expansion=1).eval()
    x = -torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        y = block(x)
        residual = y - x
    assert residual.min() >= -1e-6 and y.min() < 0
    assert modules.BasicBlock(16, 16).eval()(x).min() == 0


def test_channel_shuffle_interleaves_groups():
    x = torch.arange(8.0).view(1, 8, 1, 1)
    assert modules.ChannelShuffle(4)(x).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet21"}, "unknown architecture 'resnet21'; choose from resnet20"),
        ({"arch": "resnet20", "reduction_mode": "both"}, "unknown reduction mode"),
        ({"arch": "shiftresnet20", "reduction": 2}, "has no reduction"),
        ({"arch": "resnet20", "expansion": 3}, "has no expansion"),
        ({"arch": "shiftresnet20", "expansion": 0}, "expansion must be a positive number"),
        ({"arch": "shiftresnet20", "expansion": 0.01}, "expansion 0.01 leaves 0 of 16 channels"),
        ({"arch": "shiftresnet20", "expansion": float("nan")}, "expansion must be a positive number"),
        ({"arch": "resnet20", "reduction": -1}, "reduction must be a positive number"),
        ({"arch": "resnet20", "reduction": 17, "reduction_mode": "block"}, "reduction 17 leaves 0 of 16 channels"),
        ({"arch": "resnet20", "reduction": 300}, "reduction 300 leaves 0 of 16 channels"),
        ({"arch": "depthwiseresnet20", "reduction": 17}, "reduction 17 leaves 0 of 16 channels"),
        ({"arch": "resnet20", "reduction": 5, "reduction_mode": "shuffle"}, "reduction 5 leaves fewer than 4 of 16"),
    ],
)
def test_options_that_make_no_network_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(Config(**options))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"arch": "shiftresnet20", "expansion": 3, "num_classes": 100}, "shiftresnet20_3.0_cifar100"),
        ({"arch": "shiftresnet110"}, "shiftresnet110_1.0"),
        (
            {"arch": "resnet20", "reduction": 2.8, "reduction_mode": "block", "num_classes": 100},
            "resnet20_2.8_block_cifar100",
        ),
        ({"arch": "resnet56", "num_classes": 100}, "resnet56_cifar100"),
        ({"arch": "depthwiseresnet20", "reduction": 0.38}, "depthwiseresnet20_0.38_net"),
        ({"arch": "resnet20", "reduction_mode": "mobile"}, "resnet20_1.0_mobile"),
    ],
)
def test_checkpoint_names_are_the_originals(options, name):
    config = Config(**options)
    assert config.arch + config.suffix() == name


@pytest.mark.parametrize("by_tap", [True, False])
def test_fused_shifts_in_evaluation(monkeypatch, by_tap):
    """Every shift block runs fused inside, and as before outside; the logits differ in the last bits at most."""
    calls = []
    monkeypatch.setattr(modules, "gains_from_tap_order", lambda *_: by_tap)
    monkeypatch.setattr(modules, "shift_conv1x1", lambda *a: calls.append(a) or shift_conv1x1(*a))
    model = build_model(Config("shiftresnet20", expansion=2)).eval()
    model.load_state_dict(fill_state_dict(model.state_dict()))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(images)
        assert not calls
        with engine.fused_shifts(model) as memory_format:
            fused = model(images.to(memory_format=memory_format))
        assert [call[-1] for call in calls] == [by_tap] * 9 and memory_format is torch.channels_last
        assert torch.allclose(fused, plain, rtol=1e-5, atol=1e-6) and torch.equal(model(images), plain)
    with engine.fused_shifts(torch.nn.Identity()) as memory_format:
        assert memory_format is torch.preserve_format


def test_fused_shifts_are_for_inference():
    model = build_model(Config("shiftresnet20", expansion=2))
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"eval\(\) first"), engine.fused_shifts(model):
        pass
    with engine.fused_shifts(model.eval()):
        assert list(model.state_dict()) == names
