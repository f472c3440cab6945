"""Changes of one line that some test must notice:  python tests/mutants.py

Each row of tests/mutants/*.csv is a mistake somebody could make: in `file`, `old` becomes `new`, and `tests` (arguments
of pytest) must fail. One after the other is applied to a copy of the work tree; those that no test noticed, the
survivors, are listed last, and the exit status is 1 if there is one. A row whose old text is not there exactly once is
an error, and so are tests that fail without any change. Not part of the tests: it takes minutes.

    python tests/mutants.py --list             # the table, a mutant a line
    python tests/mutants.py --only 12          # one of them; also 3-7 and shiftresnet
"""

import argparse
import csv
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "tests" / "mutants"
COLUMNS = ["file", "old", "new", "tests"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
SECONDS = 300  # of one mutant: a change may also make a loop endless, which a test notices by not ending


class Mutant(NamedTuple):
    """number: from 1, over all tables in the order of their names. table: its name."""

    number: int
    table: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self):
        return f"{self.number:3} {self.file}: {self.old.strip()}  ->  {self.new.strip()}   [{shlex.join(self.tests)}]"


class TableError(Exception):
    """A table that cannot be used, in one line."""


def read_tables(folder: Path = TABLES) -> list[Mutant]:
    """All mutants. Raises TableError for a table of other columns, or a row that is incomplete or changes nothing."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                raise TableError(f"{path.name}: the columns must be {', '.join(COLUMNS)}, not {reader.fieldnames}")
            for row in reader:
                if None in row or not all(row[name] for name in ("file", "old", "tests")) or row["old"] == row["new"]:
                    line = f"{path.name}, line {reader.line_num}"
                    raise TableError(f"{line}: file, old, another new, and tests are needed")
                words = tuple(shlex.split(row["tests"]))
                found.append(Mutant(len(found) + 1, path.stem, row["file"], row["old"], row["new"] or "", words))
    if not found:
        raise TableError(f"no mutants in {folder}")
    return found


def check(mutants: Iterable[Mutant], root: Path = ROOT) -> None:
    """Raises TableError for every mutant, all in one message, whose old text is not in its file exactly once."""
    wrong = []
    for mutant in mutants:
        path = root / mutant.file
        count = path.read_text(encoding="utf-8").count(mutant.old) if path.is_file() else 0
        if count != 1:
            wrong.append(f"{mutant.table} {mutant.number}: {mutant.old!r} is {count} times in {mutant.file}, not once")
    if wrong:
        raise TableError("\n".join(wrong))


def chosen(mutants: list[Mutant], words: list[str]) -> list[Mutant]:
    """Those that --only names: numbers, ranges of numbers, tables. Raises TableError for a word that names none."""
    picked = set()
    for word in words:
        low, dash, high = word.partition("-")
        if low.isdecimal() and (high.isdecimal() or not dash):
            span = range(int(low), int(high or low) + 1)
            names = {mutant.number for mutant in mutants if mutant.number in span}
        else:
            names = {mutant.number for mutant in mutants if mutant.table == word}
        if not names:
            raise TableError(f"--only {word}: there is no such mutant; --list shows them")
        picked |= names
    return [mutant for mutant in mutants if mutant.number in picked or not words]


def copy_tree(target: Path) -> None:
    """What git knows and what it would add, so that a work tree can be tried before it is committed."""
    words = ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(words, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: Iterable[str]) -> int | None:
    """pytest's exit status in a tree, None if it did not end in time."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "SHARED_DIR": str(shared_dir())}
    words = [*PYTEST, *tests]
    process = subprocess.Popen(words, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                               start_new_session=True)  # fmt: skip
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return None


def shared_dir() -> Path:
    """The copy of the tree is not beside the real data sets, if there are some."""
    return Path(os.environ.get("SHARED_DIR", ROOT.parent / "shared"))


def try_mutant(tree: Path, mutant: Mutant) -> str:
    """noticed, SURVIVED, or what is wrong with its tests."""
    path = tree / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        status = run_tests(tree, mutant.tests)
    finally:
        path.write_text(before, encoding="utf-8")
    if status in (1, 2, None):  # failed; did not even import; did not end
        return "noticed"
    return "SURVIVED" if status == 0 else f"NO TEST RAN (pytest's exit status {status})"


def try_all(mutants: list[Mutant]) -> list[str]:
    """Lines about the mutants that were not noticed."""
    bad = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        fine = {tests: run_tests(tree, tests) for tests in dict.fromkeys(mutant.tests for mutant in mutants)}
        for mutant in mutants:
            start = time.monotonic()
            status = fine[mutant.tests]
            outcome = try_mutant(tree, mutant) if status == 0 else f"ITS TESTS FAIL UNCHANGED (exit status {status})"
            print(f"{outcome:9} {time.monotonic() - start:5.1f} s {mutant}", flush=True)
            if outcome != "noticed":
                bad.append(f"{outcome} {mutant}")
    return bad


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the table and end")
    parser.add_argument("--only", nargs="+", default=[], metavar="N", help="numbers, ranges such as 3-7, or tables")
    args = parser.parse_args(argv)
    try:
        mutants = chosen(read_tables(), args.only)
        check(mutants)
    except TableError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(map(str, mutants)))
        return 0
    bad = try_all(mutants)
    print(f"\n{len(mutants) - len(bad)} of {len(mutants)} noticed" + "".join(f"\n{line}" for line in bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
