"""The two examples do what they print."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoints import load_checkpoint
from common.kernels import PackedShiftWeights
from examples import convert_and_pack, shift_instead_of_3x3

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--arch=squeezenet1_1", "--images=2", "--image-size=48"]


@pytest.fixture(scope="module")
def squeezenet():
    from torchvision.models import get_model

    torch.manual_seed(1)
    return get_model("squeezenet1_1").eval()


@pytest.mark.parametrize("method, bits", [("deepshift-ps", 5), ("s3", 3)])
def test_packed_file_holds_the_rounded_weights_and_the_kernels_agree(method, bits, squeezenet, tmp_path, capsys):
    torch.save(squeezenet.state_dict(), tmp_path / "float.pth")
    path = tmp_path / "packed.pth"
    convert_and_pack.main([*TINY, f"--method={method}", f"--weights={tmp_path}/float.pth", f"--output={path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"squeezenet1_1, {method}, {bits} bits: 26 layers packed"
    assert f"{path.stat().st_size:,} bytes" in lines[1]
    assert float(lines[1].split(" bytes, ")[1].split("x smaller")[0]) > 0.75 * 32 / bits
    assert float(lines[3].split("logits ")[1].split(",")[0]) < 1e-2, "fixed point keeps 16 bits after the point"
    assert float(lines[2].split("logits ")[1].split(",")[0]) > 1e-2, "rounding is no copy"
    content = load_checkpoint(path)
    for name, layer in squeezenet.named_modules():
        if isinstance(layer, nn.Conv2d):
            packed = PackedShiftWeights.from_state(content["layers"][name]).unpack()
            assert packed.shape == layer.weight.shape and packed.ne(0).any()
            assert (packed * layer.weight >= 0).all(), "signs are kept"
    assert not any(name.endswith(("weight", "shift", "sign")) for name in content["tensors"])


def test_s3_weights_are_the_nearest_of_the_code():
    weight = torch.tensor([[1.0, -0.9, 0.3, -0.2, 0.26, 0.05, 0.0, 0.7]])
    expected = torch.tensor([[1.0, -1.0, 0.25, -0.25, 0.25, 0.0, 0.0, 0.5]])
    assert torch.equal(convert_and_pack.nearest_s3_weight(weight, 3), expected)
    assert torch.equal(convert_and_pack.nearest_s3_weight(weight * 2**-5, 3), expected * 2**-5), "any scale"


@pytest.mark.parametrize("dilation, stride", [(1, 1), (1, 2), (2, 1)])
def test_shift_modules_keep_shapes(dilation, stride):
    conv = nn.Conv2d(8, 12, 3, stride, padding=dilation, dilation=dilation)
    model = nn.Sequential(conv, nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 4, 3))
    shifted, count = shift_instead_of_3x3.replace_3x3(model, expansion=2)
    assert count == 1 and type(model[0]) is nn.Conv2d, "grouped and unpadded ones stay; the network itself is kept"
    assert shifted[0][0].out_channels == 24 and shifted[0][3].dilation == dilation
    x = torch.randn(2, 8, 15, 15)
    assert shifted(x).shape == model(x).shape


def test_multiply_adds_are_those_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert shift_instead_of_3x3.count_multiply_adds(model) == 16 * 16 * 8 * 27 + 40
    assert not any(layer._forward_hooks for layer in model)


def test_networks_with_shifts_train(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(shift_instead_of_3x3, "train", lambda model, loader, steps: seen.append((model, steps)))
    shift_instead_of_3x3.main(["--arch=squeezenet1_1", "--steps=3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "squeezenet1_1: 8 of its convolutions replaced, expansion 1"
    parameters = [int(line.split()[2].replace(",", "")) for line in lines[2:]]
    assert parameters == [sum(p.numel() for p in model.parameters()) for model, _ in seen] and seen[0][1] == 3
    assert parameters[1] < parameters[0]


def test_training_lowers_the_loss():
    from common.data import TensorLoader, load_digits_set

    torch.manual_seed(0)
    loader = TensorLoader(load_digits_set("train", channels=3, size=32), 32, train=True)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 4, padding=1), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(1024, 10))
    shifted, _ = shift_instead_of_3x3.replace_3x3(model, expansion=2)
    before = shift_instead_of_3x3.accuracy(shifted, loader)
    shift_instead_of_3x3.train(shifted, loader, 60)  # more than an epoch
    assert before < 40 < 80 < shift_instead_of_3x3.accuracy(shifted, loader)


@pytest.mark.parametrize("script", ["convert_and_pack", "shift_instead_of_3x3"])
def test_mistakes_are_one_line(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--arch=nothing"])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")
    assert str(error.value.code) == "error: Unknown model nothing"
    monkeypatch.setattr(sys, "argv", [script, "--arch=squeezenet1_1", f"--weights={tmp_path}/none.pth"])
    with pytest.raises(SystemExit, match="none.pth does not exist"):
        runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")


def test_an_example_runs_from_anywhere(tmp_path):
    command = [sys.executable, ROOT / "examples" / "convert_and_pack.py", *TINY]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "packed.pth").exists()
