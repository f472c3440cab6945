"""Finds the commands of the READMEs, and says what each of them starts."""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "*/README.md", "common/*/README.md")
    for path in ROOT.glob(pattern)
    if not path.parts[-2].startswith(".")
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELLS = ("bash", "sh", "console")
RESULTS = re.compile(r"<!-- results -->.*?<!-- /results -->", re.DOTALL)  # commands that were run, with their logs
PROGRAMS = ("python", "python3", "torchrun", "bash")


class Command(NamedTuple):
    """One command as a README has it. script: relative to the root; launcher: what stands before it.

    is_block: from a block of shell commands, and so complete; within a line it may leave something out.
    """

    readme: Path
    line: int
    text: str
    is_block: bool
    environment: dict[str, str]
    launcher: tuple[str, ...]
    script: str
    arguments: tuple[str, ...]

    def __str__(self):
        return f"{self.readme}:{self.line}: {self.text}"


def blank(match) -> str:
    return "\n" * match[0].count("\n")


def texts_of(readme: Path) -> list[tuple[int, str, bool]]:
    """(line, text, is_block) of every command of a README: those of shell blocks, and code within lines."""
    content = RESULTS.sub(blank, (ROOT / readme).read_text())
    found = []
    for fence in FENCE.finditer(content):
        line = content[: fence.start()].count("\n") + 2
        for text in re.sub(r"\\\n", "\\\\\0", fence[2]).split("\n") if fence[1] in SHELLS else ():
            words = shlex.split(text.replace("\\\0", "").removeprefix("$ "), comments=True)
            if words:
                found.append((line, shlex.join(words), True))
            line += 1 + text.count("\0")
    plain = FENCE.sub(blank, content)
    for code in re.finditer(r"`([^`]+)`", plain):
        words = code[1].split()
        program = next((word for word in words if not re.match(r"[A-Z_]+=", word)), "")
        is_script = program.endswith((".py", ".sh")) and len(words) > 1  # without flags it is a name
        if is_script or (program.split("/")[-1] in PROGRAMS and len(words) > 1):
            found.append((plain[: code.start()].count("\n") + 1, " ".join(words), False))
    return sorted(found, key=lambda entry: entry[0])


def commands_of(readme: Path) -> list[Command]:
    return [parse(readme, *found) for found in texts_of(readme)]


def parse(readme: Path, line: int, text: str, is_block: bool) -> Command:
    """Raises ValueError for a command that is none of: a script of this repository, with or without a launcher."""
    words = shlex.split(text)
    environment = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    launcher = []
    program = words[0].split("/")[-1]
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
        launcher = ["torchrun", f"--nproc_per_node={options.nproc_per_node}"]
        words = [options.training_script, *options.training_script_args]
    elif program in PROGRAMS:
        launcher = [program]
        words = words[1:]
        if words[0] == "-m":
            words = [words[1].replace(".", "/") + "/__main__.py", *words[2:]]
    for folder in (readme.parent, Path()):
        if (ROOT / folder / words[0]).is_file():
            script = os.path.normpath(folder / words[0])
            return Command(readme, line, text, is_block, environment, tuple(launcher), script, tuple(words[1:]))
    raise ValueError(f"{readme}:{line}: there is no {words[0]}, which `{text}` would start")


def module_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def check_arguments(script: str, arguments) -> None:
    """Raises AssertionError with the parser's words if the script's own parser does not take the arguments."""
    module, said = module_of(script), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if hasattr(module, "build_parser"):
                module.build_parser().parse_args(list(arguments))
            else:  # benchmarks whose parser is within main
                assert not arguments, f"{script} has no build_parser to check {arguments} with"
    except SystemExit as error:
        assert error.code in (0, None), f"{script} {shlex.join(arguments)}: {said.getvalue()}"


def started_by(command: Command, arguments, environment: dict[str, str]) -> list[tuple[str, list[str]]]:
    """(script, arguments) of every Python script that a shell script starts, as its dry run prints them."""
    environment = {**os.environ, "PYTHON": sys.executable, **environment, "DRY_RUN": "1"}
    dry = ["--dry-run"] if command.script == "run_all.sh" else []
    words = ["bash", str(ROOT / command.script), *dry, *arguments]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    lines = [line.removeprefix("+ ") for line in done.stdout.splitlines()]
    started = [shlex.split(line)[1:] for line in lines if line.split(maxsplit=1)[0].split("/")[-1].startswith("python")]
    return [(os.path.relpath(ROOT / words[0], ROOT), words[1:]) for words in started]
