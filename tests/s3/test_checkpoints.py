"""Files of any origin load without being executed; converted ones are exact and small; bad input is named."""

import io
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from torch import nn

from common.checkpoints import CheckpointError, save_checkpoint
from s3 import convert, engine, main, main_eval
from s3.checkpoints import load_into, load_network, read_weights
from s3.discrete import plain_state_dict, power_of_two_bits, restore_latents
from s3.network import Config
from s3.packed import pack_layers, put_back, use_kernels
from s3.resnet import build_resnet, cifar_resnet, imagenet_resnet
from s3.runs import RunError, read_metrics
from s3.s3conv2dshift import S3Conv2d, latent_layers
from tests.common import test_checkpoints_writers as writers
from tests.golden.fill import golden_input

NETWORK = ["--dataset=digits", "--arch=resnet8", "--device=cpu"]
METHODS = [("s3", 2), ("s3", 3), ("s3", 4), ("denseshift", 2), ("denseshift", 3), ("denseshift", 4)]


def small(method="s3", bits=3, classes=10):
    """A network whose batch norms keep its activations small."""
    torch.manual_seed(0)
    model = build_resnet("digits", "resnet8", classes, method, bits)
    for block in model.modules():
        if isinstance(block, nn.BatchNorm2d):
            block.running_var.fill_(500.0)
            block.running_mean.normal_()
    return model.eval()


def payload(model, **others):
    """What the original saves."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return {"epoch": 1, "arch": "resnet18", "state_dict": model.state_dict(), "best_acc1": torch.tensor(61.5),
            "optimizer": optimizer.state_dict(), **others}  # fmt: skip


def logits(model, size=32):
    with torch.no_grad():
        return model.eval()(golden_input((2, 3, size, size)))


def on_cuda(path, is_zip):
    """The same file as a GPU would have written it: storages at cuda:0."""
    at_cpu, at_cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    if not is_zip:
        assert at_cpu in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(at_cpu, at_cuda))
        return
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    assert at_cpu in members[name]
    members[name] = members[name].replace(at_cpu, at_cuda)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("era", ["legacy", "zip"])
def test_old_checkpoints_of_a_gpu_load_on_the_cpu(tmp_path, era, capsys):
    """DataParallel's prefix, CUDA tensors; the file is evaluated, converted, and training goes on from it."""
    model, path = small(), tmp_path / "checkpoint.pth.tar"
    content = payload(model)
    content["state_dict"] = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(content, path, _use_new_zipfile_serialization=era == "zip")  # PyTorch before 1.6 had the other format
    on_cuda(path, era == "zip")
    found, config = load_network(str(path))
    assert config == Config("cifar10", "resnet8", 10, "s3", 3)
    assert torch.equal(logits(found), logits(model))
    flags = [*NETWORK, "--train-size=32", "--epochs=2", f"--resume={path}", f"--output-dir={tmp_path / 'out'}"]
    assert main.main(flags) == 0
    text = capsys.readouterr().out
    assert f"=> loaded checkpoint '{path}' (epoch 1)" in text and "Epoch: [1]" in text and "Epoch: [0]" not in text
    assert "best 61.500% at epoch None" in text, "the accuracy of the file is the one to beat"


def test_a_whole_pickled_network_is_read_without_its_classes(tmp_path):
    model, path = small("float"), tmp_path / "model.pth"
    tables = {"_parameters": dict(model.fc._parameters), "_buffers": {}, "_modules": {}}
    fc = writers.fake_object("torch.nn.modules.linear.Linear", training=False, **tables)
    record = writers.fake_object("resnet.ResNet", _parameters={}, _buffers={}, _modules={"fc": fc}, training=False)
    path.write_bytes(writers.legacy_bytes(record, era="0.4", python2=False))
    assert set(read_weights(str(path)).state) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(("method", "bits"), METHODS)
def test_conversion_is_exact_in_both_forms_and_back(tmp_path, method, bits, capsys):
    model, source = small(method, bits), Config("digits", "resnet8", 10, method, bits)
    trained, plain, packed = (tmp_path / name for name in ("trained.tar", "plain.tar", "weights.packed"))
    torch.save(payload(model, config=source.as_dict()), trained)
    assert convert.main([str(trained), str(plain), "--packed", str(packed)]) == 0
    content = torch.load(plain, weights_only=True)
    assert list(content)[:5] == ["epoch", "arch", "state_dict", "best_acc1", "optimizer"]
    assert (content["epoch"], content["best_acc1"].item(), content["arch"]) == (1, 61.5, "resnet8")
    expected, top = plain_state_dict(model, ""), 2 ** (2 ** (bits - 1) - (2 if method == "s3" else 1))
    for path in (plain, packed):
        loaded = read_weights(str(path))
        assert (loaded.config, loaded.source) == (Config("digits", "resnet8", 10, "float", 3), source)
        assert set(loaded.state) == set(expected)
        assert all(torch.equal(loaded.state[name], expected[name]) for name in expected)
        net = cifar_resnet(8, method="float")
        load_into(net, loaded)
        torch.testing.assert_close(logits(net), logits(model), rtol=0, atol=1e-5)
        again, config = load_network(str(path))
        assert config == source and torch.equal(logits(again), logits(model))
    values = torch.cat([tensor.unique() for name, tensor in expected.items() if "conv" in name and "layer" in name])
    assert values.abs().max() == top and (0 in values) == (method == "s3")
    assert torch.load(packed, weights_only=True)["layers"]["layer1.0.conv1"]["bits"] == bits


def test_converted_resnet18_is_torchvisions_and_a_seventh_of_its_size(tmp_path):
    import torchvision

    torch.manual_seed(0)
    model = imagenet_resnet(18)
    trained, plain, packed = (tmp_path / name for name in ("trained.tar", "plain.tar", "weights.packed"))
    torch.save({"state_dict": model.state_dict()}, trained)
    assert convert.main([str(trained), str(plain), "--packed", str(packed)]) == 0
    theirs = torchvision.models.get_model("resnet18")
    torch.save(theirs.state_dict(), tmp_path / "float.pth")
    sizes = [os.path.getsize(tmp_path / name) for name in ("float.pth", "weights.packed")]
    assert sizes[0] / sizes[1] >= 7.3
    layers = torch.load(packed, weights_only=True)["layers"]
    assert 4 * 11_157_504 / sum(codes["codes"].numel() for codes in layers.values()) >= 10.6
    content = torch.load(plain, weights_only=True)
    theirs.load_state_dict({name.removeprefix("module."): value for name, value in content["state_dict"].items()})
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    optimizer.load_state_dict(content["optimizer"])
    torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.1).load_state_dict(content["scheduler"])
    expected = logits(model, 64)
    assert (logits(theirs, 64) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_packed_convolutions(mode):
    torch.manual_seed(0)
    model = nn.Sequential(S3Conv2d(4, 6, 3, 2, (1, 2), groups=2, padding_mode=mode), nn.Conv2d(6, 3, 1)).eval()
    x = torch.randn(2, 4, 9, 8)
    expected, packed = model(x).detach(), pack_layers(model)
    assert list(packed) == ["0"]
    replaced = use_kernels(model, packed)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    put_back(model, replaced)
    assert isinstance(model[0], S3Conv2d)


def test_codes_of_plain_weights():
    assert power_of_two_bits(torch.tensor([0.0, 1, -1])) == (2, "S3")
    assert power_of_two_bits(torch.tensor([0.0, -4, 1])) == (3, "S3")
    assert power_of_two_bits(torch.tensor([8.0, -1])) == (3, "Q")
    assert power_of_two_bits(torch.tensor([0.0, 8])) == (4, "S3")
    assert power_of_two_bits(torch.tensor([128.0, 0])) is None
    for other in (0.5, 3.0, float("inf"), float("nan"), 1e-45):
        assert power_of_two_bits(torch.tensor([1.0, other])) is None


def test_a_published_file_without_description_is_recognised(tmp_path):
    """The published checkpoints have names, values and nothing else; zeros keep no sign in a packed file."""
    model = small()
    torch.save({**payload(small("float")), "state_dict": plain_state_dict(model)}, tmp_path / "published.tar")
    found, config = load_network(str(tmp_path / "published.tar"))
    assert config == Config("cifar10", "resnet8", 10, "s3", 3)
    for name, layer in latent_layers(model).items():
        assert torch.equal(found.get_submodule(name).discrete_weight(), layer.discrete_weight())
    state = restore_latents(plain_state_dict(model, ""), config)
    assert set(state) == set(model.state_dict())


def test_damaged_and_hostile_files_are_refused(tmp_path):
    model = small()
    save_checkpoint(tmp_path / "good.tar", {"state_dict": model.state_dict()})
    assert convert.main([str(tmp_path / "good.tar"), "--packed", str(tmp_path / "good.packed")]) == 0
    data = bytearray((tmp_path / "good.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    (tmp_path / "short").write_bytes(data[: len(data) // 3])
    (tmp_path / "text").write_text("no checkpoint")
    packed = torch.load(tmp_path / "good.packed", weights_only=True)
    save_checkpoint(tmp_path / "newer", {**packed, "version": 2})
    save_checkpoint(tmp_path / "codes", {**packed, "layers": {"conv1": {"bits": 5}}})
    torch.save({"accuracy": 3}, tmp_path / "other")
    torch.save({"state_dict": {"fc.bias": torch.tensor([float("nan")])}}, tmp_path / "nan")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "no-resnet")

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    hostile = io.BytesIO()
    pickle.dump(Command(), hostile, protocol=2)
    (tmp_path / "hostile").write_bytes(hostile.getvalue())
    messages = {"flipped": "damaged", "short": "damaged", "text": "damaged", "newer": "version 2", "other": "not a",
                "codes": "packed weights cannot be read", "nan": "fc.bias contains NaN", "absent": "not exist",
                "hostile": "damaged|refused", "no-resnet": "holds no ResNet"}  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message) as error:
            load_network(str(tmp_path / name))
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(CheckpointError, match="not saved"):
        convert.convert(convert.build_parser().parse_args([str(tmp_path / "good.tar"), str(tmp_path / "no" / "x")]))


MISMATCHES = [
    (main, "s3", ["--method=denseshift"], "network of --dataset digits --arch resnet8 --method s3 --weight-bits 3"),
    (main, "s3", ["--weight-bits=4"], "the flags ask for --dataset digits --arch resnet8 --method s3 --weight-bits 4"),
    (main, "s3", ["--arch=resnet20"], "of another architecture, --dataset digits --arch resnet8"),
    (main, "float", [], "has no latent tensors .* evaluate it with main_eval.py --dataset digits --arch resnet8"),
    (main, "classes", [], "is for 7 classes, the data has 10; .* or --num-classes 7"),
    (main_eval, "s3", [], "has latent tensors; convert it with convert.py, or evaluate it with main.py -e --dataset"),
    (main_eval, "float", ["--arch=resnet20"], "of another architecture"),
    (main_eval, "classes-float", [], "is for 7 classes, the data has 10"),
    (main, "s3", ["--num-classes=4"], "--num-classes 4: the data has 10 classes"),
]


@pytest.mark.parametrize(("script", "kind", "flags", "message"), MISMATCHES,
                         ids=[f"{m[0].__name__} {m[1]} {' '.join(m[2])}" for m in MISMATCHES])  # fmt: skip
def test_files_of_other_networks_are_refused_with_what_to_do(script, kind, flags, message, tmp_path):
    method = "float" if "float" in kind else "s3"
    model = small(method, classes=7 if "classes" in kind else 10)
    config = Config("digits", "resnet8", 7 if "classes" in kind else 10, method, 3)
    torch.save(payload(model, config=config.as_dict()), tmp_path / "file.tar")
    with pytest.raises(RunError, match=message):
        script.main([*NETWORK, *flags, "-e", f"--resume={tmp_path / 'file.tar'}"])


def test_a_float_network_is_not_converted(tmp_path, capsys):
    torch.save(payload(small("float")), tmp_path / "float.tar")
    assert convert.main([str(tmp_path / "float.tar"), "--packed", str(tmp_path / "x")]) == 1
    assert "has float weights: there is nothing to convert" in capsys.readouterr().err
    flags = [*NETWORK, "-e", "--use-kernel", f"--resume={tmp_path / 'float.tar'}"]
    assert engine.run_script(main_eval.main, flags) == 1
    assert "--use-kernel: the network has no weights of 2 to 4 bits" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photographs(shared_dir, tmp_path_factory):
    """Six training and four test photographs of two classes."""
    root, source = tmp_path_factory.mktemp("photographs"), shared_dir / "data" / "imagenette-mini"
    for split, count in (("train", 3), ("val", 2)):
        for folder in sorted((source / split).iterdir())[:2]:
            (root / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                (root / split / folder.name / image.name).write_bytes(image.read_bytes())
    return root


FOLDER = [
    "--method=float",
    "--image-size=64",
    "--batch-size=3",
    "--workers=0",
    "--epochs=1",
    "--device=cpu",
    "--print-freq=100",
]


def test_unreadable_images_stop_or_are_left_out_named_and_counted(photographs, tmp_path, capsys):
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    damaged = [sorted((folder / split).glob("*/*"))[1] for split in ("train", "val")]
    damaged[0].write_bytes(damaged[0].read_bytes()[:200])
    damaged[1].write_text("no image")
    flags = [str(folder), *FOLDER, f"--output-dir={tmp_path / 'out'}"]
    assert engine.run_script(main.main, flags) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and str(damaged[0]) in error[0] and "leave them out with --skip-damaged" in error[0]
    assert engine.run_script(main.main, [*flags, "--skip-damaged"]) == 0
    text = capsys.readouterr()
    assert [str(path) in line for path, line in zip(damaged, text.err.splitlines(), strict=True)] == [True, True]
    assert "1 of 6 images of train/ are damaged and were left out" in text.out
    assert "1 of 4 images of val/ are damaged and were left out" in text.out
    epoch = read_metrics(tmp_path / "out" / "metrics.jsonl")[1]
    assert epoch["test_top1"] in [pytest.approx(100 * correct / 3) for correct in range(4)]
    for path in sorted((folder / "val").glob("*/*")):
        path.write_text("no image")
    assert engine.run_script(main.main, [*flags, "-e", "--skip-damaged"]) == 1
    assert "no image of the batch is left" in capsys.readouterr().err


def test_evaluation_does_not_need_train_and_wants_the_checkpoints_classes(photographs, tmp_path, capsys):
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    shutil.rmtree(folder / "train")
    for classes in (2, 9):
        model = imagenet_resnet(18, classes, "float")
        torch.save({"state_dict": model.state_dict()}, tmp_path / f"{classes}.tar")
    flags = [str(folder), *FOLDER, "-e", f"--output-dir={tmp_path}"]
    assert engine.run_script(main.main, [*flags, f"--resume={tmp_path / '2.tar'}"]) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    assert main_eval.main([*flags[:1], *FOLDER[1:], "-e", f"--resume={tmp_path / '2.tar'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first and first.startswith(" * Acc@1")
    assert engine.run_script(main.main, [*flags, f"--resume={tmp_path / '9.tar'}"]) == 1
    assert "is for 9 classes, the data has 2" in capsys.readouterr().err
    assert engine.run_script(main.main, [*flags, f"--resume={tmp_path / '9.tar'}", "--num-classes=9"]) == 0
    assert engine.run_script(main_eval.main, [str(folder), *FOLDER[1:], "-e", "--pretrained"]) == 1
    assert "--pretrained has 1000 classes, the data has 2" in capsys.readouterr().err
    assert engine.run_script(main.main, flags[:-2]) == 1, "training needs train/"
    assert "train: No such file or directory" in capsys.readouterr().err


def test_folders_that_are_none(tmp_path, capsys):
    (tmp_path / "val").mkdir()
    (tmp_path / "file").write_text("x")
    for folder, message in ((tmp_path / "absent", "must hold train/ and val/"), (tmp_path, "Couldn't find any class"),
                            (tmp_path / "file", "must hold train/ and val/")):  # fmt: skip
        assert engine.run_script(main.main, [str(folder), "-e", *FOLDER]) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and message in error[0]


def test_train_and_val_must_have_the_same_classes(photographs, tmp_path, capsys):
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    one = sorted((folder / "train").iterdir())[0]
    one.rename(one.with_name("zebra"))
    assert engine.run_script(main.main, [str(folder), *FOLDER, f"--output-dir={tmp_path}"]) == 1
    assert "train/ and val/ have different classes" in capsys.readouterr().err
