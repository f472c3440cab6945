"""What benchmarks on a GPU leave when cut off or when one fails, tried on the CPU; and other libraries missing."""

import csv

import pytest

from benchmarks import bench_deepshift_training, bench_peers, timing


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "COPY_ELEMENTS", 2**10)
    monkeypatch.setitem(timing.MATMUL_SIDE, "cpu", 8)
    words = f"--repeats=1 --warmup=1 --results={tmp_path}/new".split()
    return timing.parse(timing.parser(""), words)


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_written_before_the_next_comparison_is_measured(args):
    seen = []

    def measure():
        for title in ("first", "second", "third"):
            comparison = timing.Comparison(args, title, {"a": lambda run: None, "b": lambda run: None}, 1)
            comparison.ratio("a / b: time ratio", "a", "b")
            yield comparison
            seen.append([row["comparison"] for row in read(args.results / "bench.csv")])

    timing.write_csv(args, "bench", measure())
    assert seen == [["first"] * 3, ["first"] * 3 + ["second"] * 3, ["first"] * 3 + ["second"] * 3 + ["third"] * 3]


def test_a_part_that_fails_does_not_stop_the_next(args, capsys):
    def part(title, is_bad=False):
        yield timing.Comparison(args, title, {"a": lambda run: None}, 1)
        assert not is_bad, f"{title} is wrong"
        yield timing.Comparison(args, f"rest of {title}", {"a": lambda run: None}, 1)

    with pytest.raises(AssertionError, match="one is wrong"):
        timing.write_csv(args, "bench", timing.of_each_part([part("one", True), part("two", True), part("three")]))
    titles = [row["comparison"] for row in read(args.results / "bench.csv")]
    assert titles == ["one", "two", "three", "rest of three"]
    errors = capsys.readouterr().err
    assert "AssertionError: one is wrong" in errors and "AssertionError: two is wrong" in errors


def test_rounds_of_training_are_written_at_once(tmp_path, monkeypatch):
    table, lengths, timed = tmp_path / "rounds.csv", [], bench_deepshift_training.timed

    def timed_and_read(*arguments):
        lengths.append(len(read(table)))
        return timed(*arguments)

    monkeypatch.setattr(bench_deepshift_training, "timed", timed_and_read)
    words = "--arch=lenet --batch-size=2 --repeats=2 --device=cpu".split()
    rounds = bench_deepshift_training.main([*words, f"--csv={table}"])
    assert lengths == [0, 0, 0, 0, 0, 0, 1, 1, 1]  # three to warm up, then three kinds in each round
    assert [float(row["PS"]) for row in read(table)] == [row["PS"] for row in rounds]


def test_peers_that_are_installed(capsys, monkeypatch):
    """Compared with torch's own 4-bit layer at least; of one that is missing a line says so."""

    def missing(inputs, outputs):
        raise ImportError("no package of that name")

    monkeypatch.setattr(timing, "COPY_ELEMENTS", 2**16)
    monkeypatch.setitem(bench_peers.LINEAR, "square", (256, 128))
    monkeypatch.setattr(bench_peers, "PEERS", {"torch int4": bench_peers.torch_int4, "another": missing})
    options = "--layers square --batches 1 3 --repeats 2 --warmup 1 --max-seconds 1 --no-rotate --no-csv"
    bench_peers.main(options.split())
    output = capsys.readouterr().out
    assert "without another: ImportError: no package of that name" in output
    for batch in (1, 3):
        assert f"256 -> 128, 4 bits, batch {batch} torch int4 / bitshift_linear bf16: time ratio" in output
