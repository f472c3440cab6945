"""What the tests of resuming share: killed and stopped runs end with every value that an uninterrupted one has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from common.checkpoints import load_checkpoint
from tests.kills import EPOCHS, NAME, PLAN, RESUMED_AT, few_digits

ROOT = Path(__file__).resolve().parents[1]
TIMES = {"seconds", "images_per_second", "train_time", "test_time"}
NAMES = NAME, "checkpoint.pth.previous.tar"


def differences(one, other, place=""):
    """Places where two payloads differ, but for times and for the path of the best network."""
    if isinstance(one, dict):
        names = [*dict.fromkeys([*one, *other])]
        missing = [f"{place}/{name}" for name in names if (name in one) != (name in other)]
        both = [name for name in names if name in one and name in other and name not in TIMES | {"path"}]
        return missing + [found for name in both for found in differences(one[name], other[name], f"{place}/{name}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [place]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, pair in pairs for found in differences(*pair, f"{place}/{index}")]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [place]
    return [] if type(one) is type(other) and one == other else [place]


def lines_of(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["type"] == kind]


def check_same_runs(one, other, *names, but=()):
    """Folders of runs: the checkpoints called so, and what metrics.jsonl says of the epochs and of the result."""
    for name in names:
        found = differences(load_checkpoint(one / name), load_checkpoint(other / name))
        assert found == list(but), f"{name} differs: {found}"
    assert differences(lines_of(one, "epoch"), lines_of(other, "epoch")) == []
    results = [{**lines_of(folder, "result")[0], "checkpoint": None} for folder in (one, other)]
    assert differences(*results) == []


def check_killed_run(script, flags, tmp_path, folder, monkeypatch, names=NAMES):
    """Run it once, and killed in between; folder: of the run, below --output-dir. names: of the states it leaves."""
    flags = [*flags, f"--epochs={EPOCHS}"]
    monkeypatch.setattr("common.data.digits._read_digits", few_digits)
    script.main([*flags, f"--output-dir={tmp_path / 'once'}"])
    command = [sys.executable, "-m", "tests.kills", script.__name__, *flags, f"--output-dir={tmp_path / 'killed'}",
               "--auto-resume"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"kills": len(PLAN)}
    killed = tmp_path / "killed" / folder
    resumed = [line["epoch"] for line in lines_of(killed, "resumed")]
    assert sorted(set(resumed)) == RESUMED_AT and resumed == sorted(resumed)
    assert [line["epoch"] for line in lines_of(killed, "epoch")] == list(range(EPOCHS))
    check_same_runs(tmp_path / "once" / folder, killed, *names)
    assert not list(killed.rglob("*.tmp")), "what the killed ones left is removed"


class Stopped(Exception):
    """The user has gone."""


def check_stopped_run(
    script, engine, flags, tmp_path, folder, monkeypatch, *, later_flags=None, names=NAMES, first=0, kept="optimizer"
):
    """Four epochs at once, and two, then two more by --auto-resume: all states are equal after epochs 3 and 4.

    later_flags: of the second part, if they are others. names: of the states after epochs 4 and 3. first: how the loop
    counts the first epoch. kept: where a state has the optimizer's; None: every epoch starts without momentum.
    """
    flags, train = [*flags, "--epochs=4"], engine.train_one_epoch
    monkeypatch.setattr("common.data.digits._read_digits", few_digits)
    script.main([*flags, f"--output-dir={tmp_path / 'once'}"])

    def stopping(*args, epoch, **options):
        if epoch == first + 2:
            raise Stopped
        return train(*args, epoch=epoch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_one_epoch", stopping)
        try:
            script.main([*flags, f"--output-dir={tmp_path / 'twice'}"])
        except Stopped:
            pass
    torch.manual_seed(99)  # whatever else the second process would have drawn
    later = flags if later_flags is None else [*later_flags, "--epochs=4"]
    script.main([*later, f"--output-dir={tmp_path / 'twice'}", "--auto-resume"])
    one, other = (tmp_path / name / folder for name in ("once", "twice"))
    assert [line["epoch"] for line in lines_of(other, "resumed")] == [2]
    rates = [line["lr"] for line in lines_of(one, "epoch")]
    assert rates[2] > 0 and len(rates) == 4
    given = () if later_flags is None else ("/args/seed",)  # what the command line said; /seed itself is equal
    check_same_runs(one, other, *names, but=given)
    if kept is not None:
        momentum = load_checkpoint(one / names[-1])[kept]["state"]
        assert momentum and all(any(v.any() for v in state.values() if v is not None) for state in momentum.values())
