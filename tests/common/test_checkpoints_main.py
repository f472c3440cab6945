"""`python -m common.checkpoints FILE`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoints.__main__ import main
from tests.common.test_checkpoints_foreign import old_network
from tests.common.test_checkpoints_writers import legacy_bytes, pack_zip, torch_bytes

ROOT = Path(__file__).resolve().parents[2]


def shown(tmp_path, capsys, content, *flags):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    status = main([str(path), *flags])
    return status, *capsys.readouterr()


def test_it_lists_shapes_classes_and_values(tmp_path, capsys):
    shared = [1]
    tree = {
        "state": {"conv.weight": torch.zeros(4, 3), "steps": torch.tensor(7)},
        "epoch": 3,
        "text": "a\nb\x1b[2J",
        "pair": (shared, shared),
        "empty": {},
    }
    status, out, err = shown(tmp_path, capsys, torch_bytes(tree))
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "(whole file)  dict of 5",
        "state  dict of 2",
        "state.conv.weight  float32 (4, 3)",
        "state.steps  int64 () = 7",
        "epoch  3",
        r"text  'a\nb\x1b[2J'",
        "pair  tuple of 2",
        "pair.0  list of 1",
        "pair.0.0  1",
        "pair.1  the same object as pair.0",
        "empty  dict of 0",
    ]


def test_it_shows_modules_without_importing_them(tmp_path, capsys):
    content = legacy_bytes(old_network()[0], era="0.2")
    status, out, err = shown(tmp_path, capsys, content)
    assert (status, out) == (1, "") and err.count("\n") == 1 and "names models.resnet.ResNet" in err
    status, out, _ = shown(tmp_path, capsys, content, "--allow", "models.")
    lines = out.splitlines()
    assert status == 0 and "net  object of models.resnet.ResNet" in lines
    assert "net._modules.layer1._modules.conv1._parameters.weight  float32 (4, 3, 1, 1)" in lines
    assert not any("hooks" in line for line in lines)


def test_bad_files_and_flags(tmp_path, capsys):
    hostile = pack_zip({"data.pkl": b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR."})
    status, out, err = shown(tmp_path, capsys, hostile)
    assert (status, out) == (1, "") and err.count("\n") == 1 and "refused: it names os.system" in err
    assert main([str(tmp_path / "absent")]) == 1
    assert "absent: damaged or not a checkpoint: it cannot be read (No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "file.pt"), "--allow", "everything"])
    assert stop.value.code == 2 and "'everything' is neither" in capsys.readouterr().err


def test_as_a_command_and_into_a_closed_pipe(tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(torch_bytes({str(i): i for i in range(20_000)}))
    command = f'"{sys.executable}" -m common.checkpoints "{path}" | head -n 2; exit ${{PIPESTATUS[0]}}'
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "(whole file)  dict of 20000\n0  0\n", "")
