"""What a user's shell, notebook or matplotlib is set to does not stop the scripts."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import report

ROOT = Path(__file__).resolve().parents[1]
SHELL_SCRIPTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/*.sh")) + [Path("run_all.sh")]
NEED_BASH = [path for path in SHELL_SCRIPTS if "pipefail" in (ROOT / path).read_text()]
PLOTTING = ("s3", "shared_bases", "epsilon_resnet", "reporting")


def run(*words, cwd=ROOT, **environment):
    settings = {"PYTHON": sys.executable, "DRY_RUN": "1", **environment}
    return subprocess.run(words, cwd=cwd, env={**os.environ, **settings}, capture_output=True, text=True)


@pytest.mark.parametrize("script", ("run_all.sh", "shiftresnet/sweep_cifar10.sh", "shared_bases/sweep_cifar10.sh",
                                    "s3/sweep_cifar10.sh", "deepshift/sweep_cifar10.sh"))  # fmt: skip
def test_a_search_path_for_cd_does_not_lead_elsewhere(script):
    """With CDPATH cd prints where it went, and `$(cd … && pwd)` becomes two lines."""
    place = ROOT.name + "/" + script
    flags = ["--list"] if script == "run_all.sh" else []
    found = [run("bash", place, *flags, cwd=ROOT.parent, CDPATH=path) for path in ("", f".:{ROOT.parent}")]
    assert found[0].returncode == found[1].returncode == 0, found[1].stderr
    assert found[0].stdout == found[1].stdout and found[0].stdout.strip()


@pytest.mark.parametrize("script", NEED_BASH, ids=str)
def test_another_shell_is_told_to_take_bash(script):
    done = run("sh", "-c", f'[ -z "${{BASH_VERSION:-}}" ] || unset BASH_VERSION; . ./{script}')
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "start it with bash: bash " in done.stderr


def test_many_scripts_need_bash():
    assert len(NEED_BASH) > 10


@pytest.mark.parametrize("words", ("run_all.py --list", "report.py --help", "shiftresnet/count.py --help"))
def test_scripts_find_their_modules_themselves(words):
    done = run(sys.executable, *words.split(), PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr


def test_plots_are_drawn_whatever_matplotlib_is_set_to(tmp_path):
    """A notebook's backend, which makes the import fail, and a matplotlibrc that asks for LaTeX."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: tkagg\n")
    code = (
        "import sys; from {}.figures import pyplot; plt = pyplot(svg_hashsalt='x')\n"
        "plt.figure().text(0, 0, 'a_b'); plt.savefig(sys.argv[1])"
    )
    for package in PLOTTING:
        words = [sys.executable, "-c", code.format(package), str(tmp_path / f"{package}.png")]
        done = run(*words, MATPLOTLIBRC=str(tmp_path),
                   MPLBACKEND="module://matplotlib_inline.backend_inline", PYTHONPATH=str(ROOT))  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{package}.png").stat().st_size > 1000


def test_every_plot_is_drawn_through_the_same_few_lines():
    texts = {package: (ROOT / package / "figures.py").read_bytes() for package in PLOTTING}
    assert len(set(texts.values())) == 1, "copy the edited figures.py over the others"
    for path in ROOT.glob("*/*.py"):
        if path.name != "figures.py" and path.parent.name != "tests":
            text = path.read_text()
            assert "matplotlib.use" not in text and "import matplotlib.pyplot" not in text, path


@pytest.mark.parametrize("name, what", (("nothing", "does not exist"), ("file", "is a file")))
def test_a_report_of_no_folder_is_one_line(name, what, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert report.main([str(tmp_path / name), "--output-dir", str(tmp_path / "page")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / name} {what}; give a folder in which runs are\n"
    assert not (tmp_path / "page").exists()


def test_the_report_of_runs_elsewhere_is_with_them(tmp_path, monkeypatch):
    import run_all

    started = []

    def start(words, **_):
        started.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", start)
    assert run_all.write_report(Path("runs")) and run_all.write_report(tmp_path)
    assert [words[-1] for words in started] == ["report", str(tmp_path / "report")]


def test_lines_end_as_shells_want_it():
    assert "* text=auto eol=lf" in (ROOT / ".gitattributes").read_text()
    for path in SHELL_SCRIPTS:
        assert b"\r" not in (ROOT / path).read_bytes()


@pytest.mark.parametrize("script, flags", [
    ("shiftresnet.main", []), ("deepshift.mnist", []), ("s3.main", ["--embedded-data"]),
    ("shared_bases.train_cifar10", []), ("epsilon_resnet.cifarEpsilonResnet", ["--cifar10"]),
])  # fmt: skip
def test_a_home_folder_after_an_equals_sign_is_one(script, flags, monkeypatch):
    """The shell leaves the ~ of --output-dir=~/x as it is; a folder called ~ is not what was meant."""
    monkeypatch.setenv("HOME", "/home/somebody")
    module = importlib.import_module(script)
    if script.startswith("shared_bases"):
        training_script = importlib.import_module("shared_bases.training_script")
        args, _ = training_script.parse_args("cifar10", "", ["--output-dir=~/x"])
    else:
        parsed = module.parse_args([*flags, "--output-dir=~/x"])
        args = parsed[0] if isinstance(parsed, tuple) else parsed
    assert args.output_dir == "/home/somebody/x"


def test_a_checkpoint_is_that_file_even_if_its_name_is_a_pattern(tmp_path):
    from shiftresnet import eval as evaluation

    for name in ("d [1]", "d 1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.t7").touch()
    path = str(tmp_path / "d [1]" / "a.t7")
    assert evaluation.matching_files([path]) == [path]
    assert evaluation.matching_files([str(tmp_path / "d *" / "a.t7")]) == [path, str(tmp_path / "d 1" / "a.t7")]
