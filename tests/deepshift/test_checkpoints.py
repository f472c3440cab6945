"""Files of any origin load without being executed; packed files are small and exact; bad ones are named."""

import collections
import io
import os
import pickle

import pytest
import torch

from common.checkpoints import CheckpointError, save_checkpoint
from deepshift import cifar10, mnist
from deepshift.checkpoints import read_weights
from deepshift.convert import convert_to_shift, pack_layers, round_shift_weights, shift_layers
from deepshift.network import build_network
from deepshift.packed import packed_payload
from deepshift.runs import RunError
from deepshift.zoo import build_model
from tests.common import test_checkpoints_writers as writers
from tests.golden.fill import fill_state_dict, golden_input


def quiet(*text):
    pass


def network(script, *flags):
    args = script.parse_args([*flags, "-e"])
    return build_network(args, "mnist" if script is mnist else "cifar10", quiet)


def filled(dataset="cifar10", arch="lenet", kind=None, bits=5):
    model = build_model(dataset, arch)
    model.load_state_dict(fill_state_dict(model.state_dict()))
    if kind:
        convert_to_shift(model, 1000, kind, convert_weights=True, weight_bits=bits)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(golden_input((2, 3, 32, 32)))


def as_original(module, name):
    """The module as an object that pickles under another class path."""
    inner = collections.OrderedDict((key, as_original(child, f"{type(child).__module__}.{type(child).__name__}"))
                                    for key, child in module._modules.items())  # fmt: skip
    return writers.fake_object(name, _parameters=collections.OrderedDict(module._parameters),
                               _buffers=collections.OrderedDict(module._buffers), _modules=inner,
                               training=False)  # fmt: skip


def test_pickled_network_of_the_original(tmp_path):
    """A whole module, in DataParallel, as PyTorch 1.1 wrote it; its architecture follows from its tensors."""
    model = filled("cifar10", "lenet")
    parallel = writers.fake_object(
        "torch.nn.parallel.data_parallel.DataParallel",
        _parameters=collections.OrderedDict(),
        _buffers=collections.OrderedDict(),
        _modules=collections.OrderedDict(module=as_original(model, "models.lenet.LeNet")),
    )
    for content in (parallel, {"model": parallel}):
        path = tmp_path / "model.pth"
        path.write_bytes(writers.legacy_bytes(content, era="0.4", python2=False))
        found = network(cifar10, f"--model={path}", "--arch=resnet20")
        assert found.config["arch"] == "lenet"
        assert torch.equal(logits(found.model), logits(model))
    with pytest.raises(RunError, match="Unable to load model from .*it is no network of this script"):
        network(mnist, f"--model={path}")


def test_old_checkpoint_with_prefixes_and_a_pickled_scheduler(tmp_path):
    model = filled("cifar10", "lenet", "PS")
    scheduler = writers.fake_object("torch.optim.lr_scheduler.MultiStepLR", milestones=[80, 120], last_epoch=3)
    for prefix in ("module.", "features.module."):
        state = {name.replace("", prefix, 1) if prefix == "module." else name.replace("conv1", "module.conv1"): value
                 for name, value in model.state_dict().items()}  # fmt: skip
        path = tmp_path / "checkpoint.pth.tar"
        content = {"epoch": 4, "arch": "lenet", "state_dict": state, "best_acc1": torch.tensor(61.5),
                   "lr_scheduler": scheduler}  # fmt: skip
        path.write_bytes(writers.legacy_bytes(content, era="0.4", python2=False))
        found = network(cifar10, "--arch=lenet", "--shift-type=PS", f"--weights={path}")
        assert torch.equal(logits(found.model), logits(model))


def test_resume_from_a_checkpoint_of_the_original(tmp_path, capsys):
    """Epoch, best accuracy and optimizer are taken over; what it lacks starts anew."""
    flags = ["--arch=lenet", "--embedded-data", "--train-size=32", "--device=cpu", "--shift-type=Q", "--seed=3",
             f"--output-dir={tmp_path}"]  # fmt: skip
    cifar10.main([*flags, "--epochs=1"])
    directory = tmp_path / "cifar10" / "lenet" / "shift_q_all_wb_5"
    content = torch.load(directory / "checkpoint.pth.tar", weights_only=True)
    state = {f"module.{name}": value for name, value in content["state_dict"].items()}
    torch.save({"epoch": 1, "arch": "lenet", "state_dict": state, "best_acc1": 99.0, "lr_scheduler": None,
                "optimizer": content["optimizer"]}, tmp_path / "old.pth.tar")  # fmt: skip
    cifar10.main([*flags, "--epochs=2", f"--resume={tmp_path / 'old.pth.tar'}"])
    text = capsys.readouterr().out
    assert "(epoch 1)" in text and "best 99.000% at epoch None" in text


@pytest.mark.parametrize("kind", ["PS", "Q"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_packed_weights_are_exact(tmp_path, kind, bits):
    model = filled("cifar10", "lenet", kind, bits)
    if kind == "PS":
        model.conv1.sign.data[0] = 0.1  # zeros
    rounded = round_shift_weights(model)
    flags = ["--arch=lenet", f"--shift-type={kind}", f"--weight-bits={bits}"]
    config = network(cifar10, *flags).config
    save_checkpoint(tmp_path / "weights.packed", packed_payload(rounded, config))
    assert torch.load(tmp_path / "weights.packed", weights_only=True)["layers"]["conv1"]["bits"] == bits
    found = network(cifar10, *flags, f"--weights={tmp_path / 'weights.packed'}").model
    for name, layer in shift_layers(rounded).items():
        other = found.get_submodule(name)
        assert torch.equal(layer.rounded_weight(), other.rounded_weight())
        assert torch.equal(layer.bias, other.bias)
    assert torch.equal(logits(found), logits(rounded))


def test_packed_resnet18_is_a_sixth_of_the_float_file(tmp_path):
    model = filled("cifar10", "resnet18")
    torch.save(model.state_dict(), tmp_path / "float.pth")
    convert_to_shift(model, 1000, "PS", convert_weights=True, weight_bits=4)
    flags = ["--arch=resnet18", "--shift-type=PS", "-wb", "4"]
    config = network(cifar10, *flags).config
    save_checkpoint(tmp_path / "weights.packed", packed_payload(round_shift_weights(model), config))
    sizes = [os.path.getsize(tmp_path / name) for name in ("float.pth", "weights.packed")]
    assert sizes[0] / sizes[1] > 5.9


def test_damaged_and_hostile_files_are_refused(tmp_path):
    model = round_shift_weights(filled("cifar10", "lenet", "Q"))
    config = network(cifar10, "--arch=lenet", "--shift-type=Q").config
    path = tmp_path / "weights.packed"
    save_checkpoint(path, packed_payload(model, config))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    (tmp_path / "short").write_bytes(data[: len(data) // 3])
    (tmp_path / "text").write_text("no checkpoint")
    save_checkpoint(tmp_path / "newer", {**packed_payload(model, config), "version": 2})
    save_checkpoint(tmp_path / "codes", {**packed_payload(model, config), "layers": {"conv1": {"bits": 5}}})
    torch.save({"accuracy": 3}, tmp_path / "other")
    torch.save({"conv1.weight": torch.tensor([float("nan")])}, tmp_path / "nan")

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    hostile = io.BytesIO()
    pickle.dump(Command(), hostile, protocol=2)
    (tmp_path / "hostile").write_bytes(hostile.getvalue())
    messages = {"flipped": "damaged", "short": "damaged", "text": "damaged", "newer": "version 2", "other": "not a",
                "codes": "packed weights cannot be read", "nan": "conv1.weight contains NaN", "absent": "not exist",
                "hostile": "damaged|refused"}  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message) as error:
            read_weights(str(tmp_path / name))
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_files_of_other_networks_are_refused_with_the_flags_they_need(tmp_path):
    flags = ["--arch=lenet", "--embedded-data", "--train-size=32", "--epochs=1", "--device=cpu", "--shift-type=PS",
             f"--output-dir={tmp_path}"]  # fmt: skip
    cifar10.main(flags)
    path = tmp_path / "cifar10" / "lenet" / "shift_ps_all_wb_5" / "checkpoint.pth.tar"
    wanted = "written with --arch lenet --shift-type PS --weight-bits 5"
    for others in (["--arch=lenet", "--shift-type=Q"], ["--arch=lenet"], ["--arch=lenet", "-st", "PS", "-s", "1"],
                   ["--arch=resnet20", "-st", "PS"]):  # fmt: skip
        with pytest.raises(RunError, match=wanted):
            cifar10.main([*others, "--embedded-data", "-e", f"--resume={path}", f"--output-dir={tmp_path}"])
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "plain.pth")
    for others, message in (
        (["--arch=lenet"], "it is DeepShift-PS in 5 more layers; add --shift-type PS"),
        (["--arch=lenet", "--shift-type=Q"], "it is DeepShift-PS in 5 more layers; add --shift-type PS"),
        (["--arch=resnet20", "-st", "PS"], "it lacks bn1.weight and"),
        (["--arch=vgg11"], "it lacks feature.0.weight"),
    ):
        with pytest.raises(RunError, match=message):
            network(cifar10, *others, f"--weights={tmp_path / 'plain.pth'}")


def test_images_are_normalized_as_asked_and_files_remember_it(tmp_path, capsys):
    def run(*flags):
        common = ["--arch=lenet", "--embedded-data", "--train-size=64", "--epochs=1", "--device=cpu", "--seed=1",
                  "--optimizer=adam", "--lr=0.01", "--print-weights=False", f"--output-dir={tmp_path}"]  # fmt: skip
        cifar10.main([*common, *flags])
        return capsys.readouterr().out

    run("--desc=imagenet", "--normalize=imagenet")
    run("--desc=own")
    folder = tmp_path / "cifar10" / "lenet"
    states = [torch.load(folder / f"shift_0_{name}" / "checkpoint.pth.tar", weights_only=True)["state_dict"]
              for name in ("imagenet", "own")]  # fmt: skip
    assert not torch.equal(states[0]["conv1.weight"], states[1]["conv1.weight"])
    note = "was written with normalize imagenet, not cifar10"
    for way in ("--weights", "--model", "--resume"):
        flags = "-e", way, str(folder / "shift_0_imagenet" / "weights.pth")
        assert note in run(*flags)
        assert note not in run(*flags, "--normalize=imagenet")


def test_mistakes_at_run_time_are_one_line(tmp_path, capsys):
    from deepshift import engine

    state = build_model("mnist", "simple_conv").state_dict()
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, tmp_path / "zeros.pth")
    shared = ["--type=conv", "--embedded-data", "--device=cpu", f"--output-dir={tmp_path}"]
    for flags, status, message in (
        (["--weights=absent.pth"], 1, "error: absent.pth does not exist"),
        (["-e", "--resume=absent.pth"], 1, "error: no checkpoint found at 'absent.pth'"),
        (["--pretrained=True"], 1, "does not exist; train the float network first"),
        (["--device=cuda:99"], 1, "cuda:99: this machine has"),
        (
            ["--train-size=32", "--epochs=1", "--lr=1e30"],
            1,
            "error: the test loss is NaN after epoch 0",
        ),
        (["-e", f"--weights={tmp_path / 'zeros.pth'}", "-st", "Q"], 0, "warning: all weights of conv1 are zero"),
        (["-e", "-st", "Q"], 0, "warning: an untrained network is evaluated"),
    ):
        assert engine.run_script(mnist.main, [*shared, *flags]) == status, flags
        text = capsys.readouterr()
        assert message in (text.err if status else text.out), flags
        assert len(text.err.splitlines()) == status


def test_real_resnet20_loads_converts_and_classifies(shared_dir, real_data_dir, tmp_path):
    """The public weights (8.27% error with ImageNet's normalization) on the first 400 test images; see the README."""
    from common.data import TensorLoader, load_dataset

    path = shared_dir / "data" / "checkpoints" / "deepshift" / "resnet20-12fca82f.th"
    images = load_dataset("cifar10", real_data_dir, split="test", download=False).subset(400)
    mean, std = cifar10.MOMENTS["imagenet"]
    loader = TensorLoader(images, 100, train=False, mean=mean, std=std)
    from deepshift import engine

    found = {}
    for kind in (None, "Q", "PS"):
        flags = ["--arch=resnet20", f"--weights={path}", *(["--shift-type", kind] if kind else [])]
        found[kind] = engine.evaluate(network(cifar10, *flags).model, loader).top1
    assert found[None] > 89 and found["Q"] > 80 and found["PS"] == found["Q"]


def test_nan_in_a_layer_cannot_be_packed():
    model = filled("cifar10", "lenet", "Q")
    model.fc2.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer fc2: .*NaN"):
        pack_layers(model)
