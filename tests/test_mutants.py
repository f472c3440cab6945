"""The table of mutants fits the code, and its runner tells the noticed from the survivors."""

import csv

import pytest

from tests import mutants

FILE = "common/__init__.py"


def write_table(folder, *rows, columns=mutants.COLUMNS):
    with open(folder / "some.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_every_old_text_is_in_its_file_once_and_there_are_enough():
    """So that a change of the code cannot quietly take a mutant out of the table."""
    table = mutants.read_tables()
    mutants.check(table)
    assert len(table) >= 80
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in table}) == len(table)
    for mutant in table:
        files = [word.split("::")[0] for word in mutant.tests if word.startswith("tests/")]
        assert files and all((mutants.ROOT / name).exists() for name in files), mutant
        assert not mutant.file.startswith("tests/"), mutant


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        ([], mutants.COLUMNS, "no mutants"),
        ([["a", "b", "c", "d"]], ["file", "old", "new", "test"], "the columns must be"),
        ([[FILE, "x", "x", "tests"]], mutants.COLUMNS, "line 2: file, old, another new"),
        ([[FILE, "x", "y", ""]], mutants.COLUMNS, "line 2: file, old, another new"),
    ],
)
def test_damaged_tables_are_one_line(rows, columns, message, tmp_path):
    write_table(tmp_path, *rows, columns=columns)
    with pytest.raises(mutants.TableError, match=message):
        mutants.read_tables(tmp_path)


def test_old_text_that_is_not_there_once_is_an_error(tmp_path):
    write_table(tmp_path, ["a.py", "x", "y", "tests"], ["b.py", "x", "y", "tests"], ["a.py", "z", "", "tests"])
    (tmp_path / "a.py").write_text("x = x\nz = 1\n")
    with pytest.raises(mutants.TableError) as error:
        mutants.check(mutants.read_tables(tmp_path), tmp_path)
    assert str(error.value).splitlines() == [
        "some 1: 'x' is 2 times in a.py, not once",
        "some 2: 'x' is 0 times in b.py, not once",
    ]


def test_which_are_chosen(tmp_path):
    write_table(tmp_path, *(["a.py", f"x{n}", "y", "tests"] for n in range(5)))
    table = mutants.read_tables(tmp_path)
    assert [mutant.number for mutant in mutants.chosen(table, ["2", "4-9"])] == [2, 4, 5]
    assert mutants.chosen(table, ["some"]) == mutants.chosen(table, []) == table
    for word in ("0", "other", "6-9", "x-3"):
        with pytest.raises(mutants.TableError, match=f"--only {word}"):
            mutants.chosen(table, [word])


def test_noticed_survivors_and_wrong_tests_are_told_apart(tmp_path, monkeypatch, capsys):
    (tmp_path / "code.py").write_text("value = 1\nunused = 2\n")
    (tmp_path / "test_code.py").write_text(
        "import importlib.util as u\n"
        "def test():\n"
        "    spec = u.spec_from_file_location('code_of_test', 'code.py')\n"
        "    module = u.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    assert module.value == 1\n"
    )
    (tmp_path / "test_wrong.py").write_text("def test(): assert False\n")
    table = [
        mutants.Mutant(1, "some", "code.py", "value = 1", "value = 3", ("test_code.py",)),
        mutants.Mutant(2, "some", "code.py", "unused = 2", "unused = 3", ("test_code.py",)),
        mutants.Mutant(3, "some", "code.py", "unused = 2", "unused = 3", ("test_wrong.py",)),
        mutants.Mutant(4, "some", "code.py", "value = 1", "value = 3", ("test_code.py", "-k", "nothing")),
    ]
    monkeypatch.setattr(mutants, "copy_tree", lambda target: [
        (target / path.name).write_text(path.read_text()) for path in tmp_path.glob("*.py")
    ])  # fmt: skip
    bad = mutants.try_all(table)
    assert [line.split(" [")[0].rsplit("  ", 2)[0].split()[0] for line in bad] == ["SURVIVED", "ITS", "ITS"]
    assert capsys.readouterr().out.startswith("noticed")
