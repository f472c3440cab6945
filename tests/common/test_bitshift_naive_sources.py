"""bitshift_naive.cu without a GPU: run on the host under the sanitizers, bit-equal to independent results."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.kernels import bitshift_naive_cuda, launch, pack_shift_weights
from tests.common.bitshift_cases import fixed_conv2d, random_parts, random_weights
from tests.host.gxx import HostKernels


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return HostKernels("bitshift_naive", tmp_path_factory.mktemp("host"))


def test_naive(host, monkeypatch):
    """Both baselines on integers; shifts round down, and sums wrap at 32 bits."""
    monkeypatch.setattr(launch, "launch", host.launch)
    generator = random.Random(2)
    for seed, (scheme, bits) in enumerate([("PS", 4), ("Q", 4), ("PS", 5), ("PS", 6)]):
        stride, padding, kernel = generator.choice((1, 2)), generator.choice((0, 1)), (generator.choice((1, 3)), 3)
        shift, sign = random_parts((18, 5, *kernel), scheme, bits, seed)
        codes = bitshift_naive_cuda.shift_codes(pack_shift_weights((shift, sign), bits, scheme))
        x = torch.randint(-(2**31), 2**31, (2, 5, 5, 4), generator=torch.Generator().manual_seed(seed)).int()
        shifted = fixed_conv2d(x, shift, sign, (stride, stride), (padding, padding), (1, 1), 1).int()
        assert torch.equal(bitshift_naive_cuda.conv2d(x, codes, stride, padding), shifted)
        x = (x >> 24).float()
        multiplied = F.conv2d(x, sign.float(), None, stride, padding)
        assert torch.equal(bitshift_naive_cuda.conv2d(x, sign.float(), stride, padding), multiplied)


def test_any_grid(host):
    """As for images and outputs too many for a thread block per tile."""
    x, weight = (torch.randint(-9, 10, shape).float() for shape in ((2, 3, 7, 6), (40, 3, 3, 3)))
    shape, _, block, sizes = bitshift_naive_cuda.plan(x.shape, weight.shape, 1, 1)
    arguments = [weight.numpy(), x.numpy(), np.full(shape, 77, np.float32), *map(np.int32, sizes)]
    ((*_, y),) = host.run([("bitshift_naive_multiply", (2, 2, 1), block, arguments)])
    assert np.array_equal(y, F.conv2d(x, weight, None, 1, 1).numpy())


def test_naive_kernels_shift_to_the_right():
    with pytest.raises(ValueError, match="above 1"):
        bitshift_naive_cuda.shift_codes(pack_shift_weights(random_weights((4, 4, 3, 3), "S3", 4), 4, "S3"))
