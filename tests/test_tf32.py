"""TF32 is off where a result is measured, and in all of DeepShift; training of the others keeps PyTorch's default."""

from importlib import import_module

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from common.kernels import without_tf32
from tests.test_compile import TRAIN

SMALL = ["--embedded-data", "--train-size=16", "--epochs=1", "--device=cpu", "--seed=7"]


def settings():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture
def seen():
    """(is in training, TF32 in convolutions, in products) of every convolution and linear layer that ran on a batch."""
    found = set()

    def look(module, inputs):
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and len(inputs[0]) > 1:  # counting takes one image
            found.add((module.training, *settings()))

    handle = register_module_forward_pre_hook(look)
    yield found
    handle.remove()


@pytest.mark.parametrize("paper", TRAIN)
def test_training_and_its_tests(paper, seen, monkeypatch, tmp_path):
    script, place, flags = TRAIN[paper]
    inputs = import_module(f"{paper}.{place}")
    whole = inputs.load_digits_set
    monkeypatch.setattr(inputs, "load_digits_set", lambda split, **more: whole(split, **more).subset(16))
    before = settings()
    assert before == (True, False), "PyTorch's default"
    assert not import_module(f"{paper}.{script}").main([*flags, *SMALL, f"--output-dir={tmp_path}"])
    assert seen == {(True, paper != "deepshift", False), (False, False, False)}
    assert settings() == before


@pytest.mark.parametrize("start", [True, False])
def test_the_setting_before_comes_back(start):
    torch.backends.cudnn.allow_tf32 = start
    try:
        with pytest.raises(ZeroDivisionError), without_tf32():
            assert settings() == (False, False)
            assert torch.backends.cudnn.conv.fp32_precision != "tf32", "as the newer names of the setting say"
            with without_tf32():
                pass
            assert settings() == (False, False)
            raise ZeroDivisionError
        assert settings() == (start, False)
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == start
    finally:
        torch.backends.cudnn.allow_tf32 = True


@pytest.mark.gpu
def test_a_convolution_is_float32_within_it():
    """2**-12 is lost beside 1 in TF32, whose fraction has 10 bits."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    images = torch.full((8, 32, 16, 16), 1 + 2.0**-12, device="cuda")
    weight = torch.full((32, 32, 3, 3), 1.0, device="cuda")
    with without_tf32():
        found = torch.conv2d(images, weight)
    assert torch.equal(found, torch.full_like(found, 288 * (1 + 2.0**-12)))
