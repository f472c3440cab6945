"""The original's files of every year load into the right network, with the logits they had."""

import collections
import os

import pytest
import torch
from torch import nn

from common.checkpoints import CheckpointError
from shiftresnet import convert
from shiftresnet import eval as evaluation
from shiftresnet import modules as blocks
from shiftresnet.checkpoints import infer_config, read_network
from shiftresnet.models import ARCHITECTURES, REDUCTION_MODES, Config, build_model
from tests.common import test_checkpoints_writers as writers
from tests.golden.fill import fill_state_dict, golden_input

# Class path of each block in the original, before and after it was moved to a file of its own on 28 March 2018.
CLASS_PATHS = {
    blocks.BasicBlock: ("models.resnet.BasicBlock",) * 2,
    blocks.ShiftConv: ("models.resnet.ShiftConv", "models.shiftresnet.ShiftConv"),
    blocks.DepthWiseBlock: ("models.resnet.DepthWiseBlock",) * 2,
    blocks.DepthWiseWithSkipBlock: (
        "models.resnet.DepthWiseWithSkipBlock",
        "models.depthwiseresnet.DepthWiseWithSkipBlock",
    ),
    blocks.ShuffleBlock: ("models.resnet.ShuffleBlock",) * 2,
    blocks.ChannelShuffle: ("models.resnet.ShuffleLayer",) * 2,
    blocks.MobileNetLikeBlock: ("models.resnet.MobileNetLikeBlock",) * 2,
    blocks.Shift2d: ("models.shiftnet_cuda_v2.nn.GenericShift_cuda",) * 2,
}


def filled(config):
    model = build_model(config).eval()
    model.load_state_dict(fill_state_dict(model.state_dict()))
    return model


def as_original(module, late, counters):
    """The module as an object that pickles like the original's: its class path, its tables, nothing else."""
    kind = type(module)
    if kind in CLASS_PATHS:
        name = CLASS_PATHS[kind][late]
    else:
        name = "models.resnet.ResNet" if hasattr(module, "linear") else f"{kind.__module__}.{kind.__name__}"
    buffers = {k: v for k, v in module._buffers.items() if counters or k != "num_batches_tracked"}
    return writers.fake_object(
        name,
        _backend=writers.Backend(),
        _parameters=collections.OrderedDict(module._parameters),
        _buffers=collections.OrderedDict(buffers),
        _modules=collections.OrderedDict((k, as_original(m, late, counters)) for k, m in module._modules.items()),
        training=False,
    )


WRITERS = {
    "2017, PyTorch 0.2, Python 2": lambda tree: writers.legacy_bytes(tree, era="0.2"),
    "2018, PyTorch 0.4, Python 2": lambda tree: writers.legacy_bytes(tree, era="0.4"),
    "PyTorch 0.4, Python 3": lambda tree: writers.legacy_bytes(tree, era="0.4", python2=False),
    "PyTorch 0.1, tar": writers.tar_bytes,
}
NETWORKS = [
    Config("shiftresnet20", expansion=3, num_classes=100),
    Config("resnet20", reduction=2.8, reduction_mode="block"),
    Config("resnet20", reduction=2.9, reduction_mode="net"),
    Config("depthwiseresnet20", reduction=0.38),
    *(Config("resnet20", reduction=2.0, reduction_mode=mode) for mode in ("depthwise", "shuffle", "mobile")),
]


FILES = [
    *((NETWORKS[0], writer) for writer in WRITERS),  # the other networks: one format each, in turn
    *((config, list(WRITERS)[index % len(WRITERS)]) for index, config in enumerate(NETWORKS[1:])),
]


@pytest.mark.parametrize(("config", "writer"), FILES, ids=[f"{c.arch}{c.suffix()}, {w}" for c, w in FILES])
def test_whole_modules_of_every_era(tmp_path, config, writer):
    model = filled(config)
    late = "2018" in writer
    net = as_original(model, late, counters=late)
    if late:
        net = writers.fake_object(
            "torch.nn.parallel.data_parallel.DataParallel",
            _parameters=collections.OrderedDict(),
            _buffers=collections.OrderedDict(),
            _modules=collections.OrderedDict(module=net),
        )
    path = tmp_path / "old.t7"
    path.write_bytes(WRITERS[writer]({"net": net, "acc": torch.tensor(91), "epoch": 7}))
    found = read_network(path)
    assert (found["config"], found["acc"], found["epoch"]) == (config, 91.0, 7)
    loaded = build_model(found["config"]).eval()
    loaded.load_state_dict(found["net"])
    x = golden_input((2, 3, 32, 32))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_whole_modules_saved_again_by_a_new_torch(tmp_path):
    model = filled(Config("shiftresnet20", expansion=3))
    for name, options in {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}.items():
        path = tmp_path / f"{name}.t7"
        # plain containers instead of modules: what many people saved
        torch.save({"net": model.state_dict(), "acc": 89.56, "epoch": 3}, path, **options)
        assert read_network(path)["config"] == Config("shiftresnet20", expansion=3)
    prefixed = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": prefixed}, tmp_path / "parallel.t7")
    found = read_network(tmp_path / "parallel.t7")
    assert found["acc"] is None and found["net"].keys() == model.state_dict().keys()


OPTIONS = [
    *(Config(arch) for arch in ARCHITECTURES),
    *(Config("shiftresnet56", expansion=e, num_classes=100) for e in (1, 2.5, 9)),
    *(Config("resnet20", reduction=r, reduction_mode="block") for r in (0.98, 1.5, 2.9, 7.6)),
    *(Config("resnet20", reduction=r, reduction_mode="net") for r in (0.5, 1.5, 2.8, 7.8)),
    *(Config("depthwiseresnet20", reduction=r) for r in (0.124, 0.19, 1.12)),
    Config("resnet20", reduction=2, reduction_mode="block", project_on_mid=True),
    Config("shiftresnet20", expansion=3, first_stride=2),
    Config("resnet32"),
    Config("shiftresnet44", expansion=3),
]


@pytest.mark.parametrize("config", OPTIONS, ids=lambda config: config.arch + config.suffix())
def test_options_follow_from_shapes(config):
    with torch.device("meta"):
        state = build_model(config).state_dict()
        found = build_model(infer_config(state)).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in state.items()}
    inferred = infer_config(state)
    assert (inferred.arch, inferred.expansion, inferred.num_classes) == (
        config.arch,
        config.expansion,
        config.num_classes,
    )
    assert (inferred.project_on_mid, inferred.first_stride) == (config.project_on_mid, config.first_stride)
    if config.reduction != 1:
        assert inferred.reduction_mode == config.reduction_mode
        assert inferred.reduction == pytest.approx(config.reduction, rel=0.15)


def test_every_mode_is_inferred_and_distinct():
    for mode in REDUCTION_MODES:
        with torch.device("meta"):
            state = build_model(Config("resnet20", reduction=2, reduction_mode=mode)).state_dict()
        assert infer_config(state) == Config("resnet20", reduction=infer_config(state).reduction, reduction_mode=mode)


@pytest.mark.parametrize("state", [{}, {"conv1.weight": torch.ones(1)}, nn.Linear(2, 2).state_dict()])
def test_other_networks_are_refused(state, tmp_path):
    torch.save({"net": state}, tmp_path / "other.t7")
    with pytest.raises(CheckpointError, match="other.t7: not a checkpoint of a ShiftResNet network: its layers"):
        read_network(tmp_path / "other.t7")


def test_a_hostile_file_is_refused_by_name(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for name, options in {"zip.t7": {}, "legacy.t7": {"_use_new_zipfile_serialization": False}}.items():
        torch.save({"net": Evil(), "acc": 99.0, "epoch": 1}, tmp_path / name, **options)
        with pytest.raises(CheckpointError, match=rf"{name}: refused: it names posix.mkdir"):
            read_network(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_converted_file_loads_safely_and_evaluates_the_same(tmp_path, capsys):
    model = filled(Config("shiftresnet20", expansion=3))
    old, new = tmp_path / "old.t7", tmp_path / "new.t7"
    old.write_bytes(
        WRITERS["2017, PyTorch 0.2, Python 2"]({"net": as_original(model, False, False), "acc": 9.0, "epoch": 1})
    )
    convert.main([str(old), str(new)])
    assert "shiftresnet20_3.0, 10 classes, 9.00% at epoch 1" in capsys.readouterr().out
    assert torch.load(new, weights_only=True)["config"]["expansion"] == 3.0
    results = evaluation.main([f"--model={old}", f"--model={new}", "--embedded-data", "--device=cpu"])
    assert results[str(old)] == results[str(new)]
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(evaluation.engine.run_script(convert.main, [str(old), str(new)]))
    assert stop.value.code == 1 and "exists already" in capsys.readouterr().err
