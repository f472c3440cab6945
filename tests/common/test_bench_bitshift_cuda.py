"""The GPU's benchmark of bitshift, as far as a CPU goes: its candidates, checks and targets on small layers."""

import pytest

from benchmarks import bench_bitshift_cuda, timing

SMALL = "--repeats 1 --warmup 1 --max-seconds 1 --no-rotate --sizes 40x33 --batches 1 3 --int8-batches 5 --bits 4"


def test_runs_on_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(timing, "write_csv", lambda *_: pytest.fail("results of a CPU must not be written"))
    monkeypatch.setattr(timing, "COPY_ELEMENTS", 2**16)
    bench_bitshift_cuda.main(f"{SMALL} --image-batches 1 --image 32".split())
    output = capsys.readouterr().out
    for line in (
        "40 -> 33, 4 bits, batch 3, bf16 F.linear bf16 / bitshift_linear, target 3.2x",
        "40 -> 33, 4 bits, batch 1, bf16 share of the bandwidth of copy_, target 0.80",
        "40 -> 33, S3 3 bits, batch 5, int8 F.linear bf16 / bitshift int8 to int32, target 1.5x",
        "ResNet18, 4 bits, batch 1 of 32x32, bf16 cuDNN bf16 channels-last / packed, target 1.0x",
        "ResNet18's 20 convolutions, 4 bits, batch 1 of 32x32 F.conv2d bf16 / bitshift_conv2d bf16",
    ):
        assert f"{line}: time ratio" in output


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_bitshift_cuda, "bitshift_linear", lambda x, packed: x.new_zeros(len(x), 33))
    with pytest.raises(AssertionError, match="wrong by"):
        bench_bitshift_cuda.main([*SMALL.split(), "--parts", "linear"])


def test_targets():
    """By code width and batch."""
    assert [bench_bitshift_cuda.target_of_linear(4, batch) for batch in (1, 8, 16, 32, 64)] == [
        3.2,
        3.2,
        2.5,
        2.5,
        0.97,
    ]
    assert [bench_bitshift_cuda.target_of_linear(5, batch) for batch in (8, 16, 4096)] == [2.5, 0.97, 0.97]


def test_refuses_a_device_that_is_not_there(capsys):
    for arguments, reason in ((["--device", "xpu:7"], "cannot be used"), (["--sizes", "4096"], "must be like")):
        with pytest.raises(SystemExit) as refusal:
            bench_bitshift_cuda.main(arguments)
        assert refusal.value.code == 2 and reason in capsys.readouterr().err
