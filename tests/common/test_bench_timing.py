"""What benchmarks on a GPU leave when they are cut off or one of them fails, tried on the CPU."""

import csv

import pytest

from benchmarks import bench_deepshift_training, timing


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
