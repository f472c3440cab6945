"""The benchmark of the fused shift on small batches, and in which order the timer calls what it compares."""

import argparse

import pytest

from benchmarks import bench_shift_conv1x1, timing


def test_runs(capsys, monkeypatch):
    monkeypatch.setattr(timing, "COPY_ELEMENTS", 2**16)
    monkeypatch.setattr(bench_shift_conv1x1, "NETWORKS", (20,))
    options = "--repeats 2 --warmup 1 --max-seconds 1 --no-rotate --no-csv --batch 2 --expansions 1"
    bench_shift_conv1x1.main(options.split())
    output = capsys.readouterr().out
    for line in (
        "64 -> 64, stride 2, 16x16, batch 2 shift_conv1x1 / 1x1 alone",
        "64 -> 64, stride 2, 16x16, batch 2 shift_conv1x1 in shift2d's order / 1x1 alone",
        "slowest of the layers, expansion 1: shift_conv1x1 / 1x1 alone",
        "all layers of ShiftResNet20, expansion 1: shift_conv1x1 / 1x1 alone",
        "ShiftResNet20, expansion 3, batch 2 unfused, NCHW / shift_conv1x1",
    ):
        assert f"{line}: time ratio" in output


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_shift_conv1x1, "shift_conv1x1", lambda x, weight, bias, stride, **_: x.new_zeros(1))
    with pytest.raises(AssertionError, match="wrong by"):
        bench_shift_conv1x1.main("--repeats 1 --warmup 1 --no-csv --no-rotate --batch 1 --expansions 1".split())


def test_rounds_of_the_timer():
    """Each candidate once a round, in changing order, the same in each process; each call with a number of its own."""
    args = argparse.Namespace(repeats=20, warmup=1, max_seconds=60)
    calls, again = (list(timing._schedule(dict.fromkeys("abc", id), args, lambda: 0)) for _ in range(2))
    numbers, names, _ = zip(*calls, strict=True)
    rounds = ["".join(names[i : i + 3]) for i in range(0, 60, 3)]
    assert numbers == tuple(range(60)) and all(sorted(some) == list("abc") for some in rounds)
    assert len(set(rounds)) == 6 and again == calls
