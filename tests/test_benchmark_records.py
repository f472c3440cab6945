"""Tables of ratios in READMEs are those of the recorded measurements, both ways."""

import csv
import re

import pytest

from benchmarks.run import DETAILS, KERNELS, README, RESULTS, ratio_table

ROWS = re.compile(r"^\| (.+) \| (.+) \| ([\d.]+)x \| (\w+)\.py \|$", re.MULTILINE)


def table_of_readme(name):
    text = README.read_text(encoding="utf-8")
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)[1]


def recorded(suffix):
    """{(what, ratio of what, benchmark): value} of the results files, but for the details that are left to them."""
    found = {}
    for benchmark in KERNELS:
        path = RESULTS / f"{benchmark}{suffix}.csv"
        for row in csv.DictReader(path.open(newline="", encoding="utf-8")) if path.exists() else ():
            name = row["name"].removesuffix(": time ratio")
            if not row["ratio"] or DETAILS.search(f"{row['comparison']} {name}"):
                continue
            what, _, summed = name.rpartition(": ")
            key = what or row["comparison"], summed, benchmark
            assert key not in found, key
            found[key] = float(row["ratio"])
    return found


def test_the_table_of_kernels_is_what_was_measured():
    expected = recorded("")
    rows = ROWS.findall(table_of_readme("ratios"))
    assert len(rows) == len(expected) > 50 and {row[3] for row in rows} == set(KERNELS)
    for what, summed, value, benchmark in rows:
        assert f"{expected[what, summed, benchmark]:.2f}" == value, f"{what}, {summed}"


@pytest.mark.parametrize("suffix", ["", "_cuda"])
def test_tables_are_those_that_the_benchmarks_write(suffix):
    """With processor and versions; of a GPU none, until one has been measured."""
    paths = [RESULTS / f"{name}{suffix}.csv" for name in KERNELS]
    text = table_of_readme(f"ratios{suffix}").strip()
    assert text == (ratio_table(paths).strip() if any(path.exists() for path in paths) else "")


def test_recorded_ratios_are_those_of_the_recorded_times():
    """Of each comparison of two rows: the quotient of their medians, of which four decimals of a ms are stored."""
    checked = 0
    for benchmark in KERNELS:
        with (RESULTS / f"{benchmark}.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        times = {(row["comparison"], row["name"]): float(row["median_ms"]) for row in rows if row["median_ms"]}
        for row in rows:
            name, slash, other = row["name"].removesuffix(": time ratio").partition(" / ")
            pair = (row["comparison"], name), (row["comparison"], other)
            if slash and row["ratio"] and all(part in times for part in pair):
                checked += 1
                quotient = times[pair[0]] / times[pair[1]]
                assert float(row["ratio"]) == pytest.approx(quotient, rel=0.01), row
    assert checked > 30
