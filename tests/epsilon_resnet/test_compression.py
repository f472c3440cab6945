"""Compression: what is pruned and what never, files, verification, evaluation, fine-tuning, mistakes."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from common.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from epsilon_resnet import (
    cifarCompressedResnet,
    cifarEpsilonResnet,
    compressModel,
    count,
    engine,
    inputs,
    logfile,
    pruning,
    svhnCompressedResnet,
)
from epsilon_resnet.checkpoints import Network, read_network
from epsilon_resnet.models import Config, build_model
from epsilon_resnet.runs import RunError, model_files

FLAGS = ["-n", "2", "-e", "8", "-o", "t", "--cifar10", "--embedded-data", "--train-size=48", "--batch_size=16",
         "--device=cpu", "--seed=7", "--epochs=2"]  # fmt: skip
DATA = ["--embedded-data", "--device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs whose block res1.1 and res2.0 are made what a long run leaves: closed and decayed."""
    folder = tmp_path_factory.mktemp("trained")
    assert engine.run_script(cifarEpsilonResnet.main, [*FLAGS, f"--output-dir={folder}"]) == 0
    folder = folder / "train_log.t"
    state = load_checkpoint(folder / "model-6.pth")
    for name in ("res1.1", "res2.0"):
        state["model"][f"{name}.conv2.weight"] *= 1e-4
        state["ema"][f"{name}/is_discarded"] = 1.0
    state["epsilon"] = 0.5  # below every live response
    for name in ("res1.0", "res2.1", "res3.0", "res3.1"):
        state["ema"][f"{name}/is_discarded"] = 0.3
    model = Network(state["model"], Config("cifar", 2), 0.5, {}).build()
    test = inputs.load_digits_set("test", channels=3, size=32)
    batches = inputs.test_batches(test, state["pixel_mean"], device="cpu")
    state["val_error"] = engine.evaluate(model, batches, shown=False)["errors"]
    save_checkpoint(folder / "model-6.pth", state)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "train_log.t"))


def compress(folder, *flags):
    return engine.run_script(compressModel.main, ["--dir", str(folder), "--step=6", *DATA, *flags])


@pytest.mark.parametrize("criterion", ("ema", "weights", "gate"))
def test_compression_prunes_the_identities_and_keeps_the_accuracy(folder, capsys, criterion):
    assert compress(folder, f"--criterion={criterion}", "--verify") == 0
    output = capsys.readouterr().out
    for line in ("#block in group1: 1", "#block in group2: 1", "#block in group3: 2",
                 "The first block is discarded: {1: 0, 2: 1, 3: 0}", "verified on 355 images: max |logit difference| 0",
                 "parameters: 172506 -> ", "discarded blocks: 33.33%", "inference time (128 images): "):  # fmt: skip
        assert line in output, line
    assert f"The model is compressed and saved at {folder}/compressed_model_6.pth" in output
    lines = (folder / "compressed_model_6.cfg").read_text().splitlines()
    assert lines[:7] == ["N: 2", f"model: {folder}/compressed_model_6.pth", "step: 6",
                         "discarded_block: ['res1.1', 'res2.0']", "is_cifar_model: True",
                         "discard_first_block: [0, 1, 0]", "structure: [1, 1, 2]"]  # fmt: skip
    error = load_checkpoint(folder / "model-6.pth")["val_error"]
    assert lines[7:] == [f"val_error: {error}"]
    content = torch.load(folder / "compressed_model_6.pth", weights_only=True)
    assert not any(name.startswith("side_output") for name in content["model"])
    assert cifarCompressedResnet.main(["--gpu=0", f"--cfg={folder}/compressed_model_6.cfg", *DATA]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Error: {error[0]!r}", "to the last digit"


def test_a_live_block_is_never_pruned_by_weights_or_gates(folder):
    state = load_checkpoint(folder / "model-6.pth")
    for name in Config("cifar", 2).block_names:
        state["ema"][f"{name}/is_discarded"] = 0.0
    network = Network(state["model"], Config("cifar", 2), 0.5, state)
    averages = {name: 0.0 for name in network.config.block_names}
    assert pruning.by_weights(network.build(), averages) == [], "open in training: live, however small"
    averages |= {"res1.1": 1.0, "res2.0": 1.0}
    assert pruning.by_weights(network.build(), averages) == ["res1.1", "res2.0"]
    assert pruning.by_average(averages | {"res3.1": 0.99999}, network.config) == ["res1.1", "res2.0"]


def test_verification_refuses_a_block_that_lets_images_pass(folder, capsys):
    state = load_checkpoint(folder / "model-6.pth")
    state["ema"]["res3.1/is_discarded"] = 1.0  # closed in training, open on the test images
    save_checkpoint(folder / "model-6.pth", state)
    assert compress(folder, "--verify") == 1
    streams = capsys.readouterr()
    assert "res3.1: max|F|/epsilon " in streams.out
    assert streams.err.startswith("error: res3.1 would be pruned but passed images on; use --criterion")
    assert not (folder / "compressed_model_6.cfg").exists(), "nothing is written"


def test_verification_names_a_kept_block_that_is_closed(folder, capsys):
    state = load_checkpoint(folder / "model-6.pth")
    state["ema"]["res1.1/is_discarded"] = 0.9
    state["model"]["res1.1.conv2.weight"] *= 1e4
    state["model"]["res1.1.conv2.weight"] *= 1e-2
    state["epsilon"] = 1.0
    save_checkpoint(folder / "model-6.pth", state)
    assert compress(folder, "--verify") == 1
    assert "res1.1 is closed but was kept: see --criterion gate" in capsys.readouterr().err


def test_verification_names_a_gate_that_is_closed_on_some_batches():
    closed = {"res1.0": 0, "res1.1": 3, "res2.0": 2}
    assert compressModel.blame(closed, ["res1.1"], 3) == (
        "; gates between open and closed: res2.0 (2 of 3 batches); train on until they settle"
    )
    assert compressModel.blame(closed, ["res1.1", "res2.0"], 3) == ""


def test_states_come_from_the_log_if_the_checkpoint_has_none(folder, capsys):
    state = load_checkpoint(folder / "model-6.pth")
    del state["ema"]
    save_checkpoint(folder / "model-6.pth", state)
    text, replaced = re.subn(r"(res1\.1/is_discarded): \S+", r"\1: 1", (folder / "log.log").read_text())
    assert replaced == 2, "of steps 3 and 6"
    (folder / "log.log").write_text(text)
    discarded, val_error, matched = logfile.discarded_in_log(logfile.messages(text), 6)
    assert "res1.1" in discarded and len(val_error) == 1
    assert len(matched) == 7 and matched[-1].startswith("val_error: "), "six blocks and the error"
    assert compress(folder) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in matched] == matched
    assert pruning.read_cfg(folder / "compressed_model_6.cfg")["discarded_block"] == discarded


def test_a_log_without_states_and_missing_steps(folder, capsys):
    state = load_checkpoint(folder / "model-6.pth")
    del state["ema"]
    save_checkpoint(folder / "model-6.pth", state)
    (folder / "log.log").write_text(
        "Argv: cifarEpsilonResnet.py -n 2 --cifar10\nEpoch 1 (global_step 6) finished\nx: 1\n"
    )
    assert compress(folder) == 1
    assert "no is_discarded states at step 6" in capsys.readouterr().err
    assert engine.run_script(compressModel.main, ["--dir", str(folder), "--step=9"]) == 1
    assert "the model file does not exist: model-9.pth" in (error := capsys.readouterr().err)
    assert error.endswith("steps there: 3, 6\n")


def test_no_log_or_several(folder, capsys):
    (folder / "other").mkdir()
    (folder / "other" / "log.log").touch()
    for where in (folder, folder / "other" / "nothing"):
        assert engine.run_script(compressModel.main, ["--dir", str(where), "--step=6"]) == 1
        assert "No log.log or multiple log.log exists" in capsys.readouterr().err


def test_a_cfg_and_weights_that_do_not_belong_together(folder, capsys):
    assert compress(folder) == 0
    cfg = folder / "compressed_model_6.cfg"
    cfg.write_text(cfg.read_text().replace("structure: [1, 1, 2]", "structure: [2, 1, 2]"))
    with pytest.raises(RunError, match=r"do not belong together: the .cfg has N 2 and structure \(2, 1, 2\)"):
        pruning.read_compressed(cfg)
    cfg.write_text("N: 2\n")
    with pytest.raises(RunError, match="has no model, step"):
        pruning.read_compressed(cfg)
    with pytest.raises(RunError, match="cannot read .*nothing.cfg"):
        pruning.read_compressed(folder / "nothing.cfg")


def test_a_moved_folder_still_loads_and_the_data_set_follows_from_the_checkpoint(folder, tmp_path, capsys):
    assert compress(folder) == 0
    moved = folder.rename(tmp_path / "moved")
    cfg = moved / "compressed_model_6.cfg"
    assert pruning.read_compressed(cfg).path == moved / "compressed_model_6.pth"
    with pytest.raises(RunError, match="the network has 10 classes, cifar100 has 100"):
        cifarCompressedResnet.main(["--gpu=0", f"--cfg={cfg}", "--cifar100", *DATA])
    assert svhnCompressedResnet.main(["--gpu=0", f"--cfg={cfg}", *DATA]) == 0
    assert count.main(["--cfg", str(cfg)]) is None
    assert "layers: 14 -> 10" in capsys.readouterr().out


def test_a_compressed_network_is_trained_further(folder, tmp_path, capsys):
    assert compress(folder) == 0
    flags = [f"--cfg={folder}/compressed_model_6.cfg", "--gpu=0", *DATA, "-o", "fine", f"--output-dir={tmp_path}",
             "--epochs=1", "--train-size=48", "--batch_size=16", "--seed=1"]  # fmt: skip
    assert cifarCompressedResnet.main(flags) == 0
    tuned = tmp_path / "train_log.fine" / "compressed_model_3.cfg"
    found = pruning.read_compressed(tuned)
    before = pruning.read_compressed(folder / "compressed_model_6.cfg")
    assert found.config == before.config
    assert not torch.equal(found.network.state["conv0.weight"], before.network.state["conv0.weight"])
    capsys.readouterr()
    assert cifarCompressedResnet.main(["--gpu=0", f"--cfg={tuned}", *DATA]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Error: {found.fields['val_error'][0]!r}"


def test_compressing_a_compressed_network_or_a_file_of_another_kind(folder):
    assert compress(folder) == 0
    shutil.copy(folder / "compressed_model_6.pth", folder / "model-7.pth")
    with pytest.raises(CheckpointError, match="has no gates"):
        compressModel.main(["--dir", str(folder), "--step=7"])
    torch.save({"weight": torch.ones(2)}, folder / "model-8.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of an epsilon-ResNet network"):
        read_network(folder / "model-8.pth")
    assert list(model_files(folder)) == [3, 6, 7, 8]


def test_plain_state_dicts_are_recognised(tmp_path):
    for config in (Config("cifar", 3, 100), Config("imagenet", 18, 7), Config("imagenet", 50, 7, gated=False)):
        torch.save(build_model(config).state_dict(), tmp_path / "weights.pth")
        assert read_network(tmp_path / "weights.pth").config == config
