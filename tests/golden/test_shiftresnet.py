"""Every golden case of ShiftResNet: outputs recorded from the original code ($GOLDEN_DIR/shiftresnet.json)."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from common.kernels import shift2d
from shiftresnet.count import count_flops, count_parameters
from shiftresnet.engine import fused_shifts
from shiftresnet.models import Config, build_model
from tests.golden.fill import fill_state_dict, golden_input

GOLDEN = json.loads((Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent)) / "shiftresnet.json").read_text())
RELATIVE_TOLERANCE = 1e-4  # of a row's maximum; float32 against float64 differs by at most 4e-6 on these cases


def _by_name(cases):
    return {"argvalues": cases, "ids": [case["case"] for case in cases]}


def test_every_section_is_checked():
    assert set(GOLDEN) == {"paper", "note", "cases", "shift_op", "shift_op_crc"}
    for case in GOLDEN["cases"]:
        assert set(case) <= {
            "case",
            "arch",
            "kwargs",
            "input_shape",
            "params",
            "flops",
            "n_keys",
            "keys_crc32",
            "keys",
            "logits",
        }


@pytest.mark.parametrize("case", **_by_name(GOLDEN["cases"]))
def test_model(case):
    model = build_model(Config(case["arch"], **case["kwargs"])).eval()
    shapes = [[name, list(value.shape)] for name, value in model.state_dict().items()]
    assert len(shapes) == case["n_keys"]
    lines = "\n".join(f"{name} {json.dumps(shape)}" for name, shape in shapes)
    assert zlib.crc32(lines.encode()) == case["keys_crc32"]
    if "keys" in case:
        assert shapes == case["keys"]
    assert count_parameters(model) == case["params"]
    assert count_flops(model, "final") == case["flops"]
    model.load_state_dict(fill_state_dict(model.state_dict()))
    x, expected = golden_input(case["input_shape"]), torch.tensor(case["logits"], dtype=torch.float64)
    with torch.no_grad(), fused_shifts(model) as memory_format:
        fused = model(x.to(memory_format=memory_format))  # as eval.py runs it
    with torch.no_grad():
        plain = model(x)
    for logits in (plain, fused):
        assert logits.shape == expected.shape
        error = (logits.double() - expected).abs() / expected.abs().amax(1, keepdim=True)
        assert error.max() < RELATIVE_TOLERANCE


def _shift_and_gradient(x, grad_output, case):
    x = x.clone().requires_grad_()
    y = shift2d(x, case["kernel_size"], case["dilate_factor"])
    y.backward(grad_output)
    return y.detach(), x.grad


@pytest.mark.parametrize("case", **_by_name(GOLDEN["shift_op"]))
def test_shift(case):
    x, grad_output = (torch.tensor(case[name], dtype=torch.float32) for name in ("input", "grad_output"))
    assert list(x.shape) == case["shape"]
    y, grad_input = _shift_and_gradient(x, grad_output, case)
    assert y.tolist() == case["output"]
    assert grad_input.tolist() == case["grad_input"]


@pytest.mark.parametrize("case", **_by_name(GOLDEN["shift_op_crc"]))
def test_shift_across_tiles(case):
    rng = np.random.RandomState(case["seed"])
    x, grad_output = (torch.from_numpy(rng.randint(-9, 10, case["shape"])).float() for _ in range(2))
    for result, name in zip(_shift_and_gradient(x, grad_output, case), ("output", "grad_input"), strict=True):
        assert int(result.sum()) == case[f"{name}_sum"]
        assert zlib.crc32(result.numpy().astype(np.int8).tobytes()) == case[f"{name}_crc32"]
