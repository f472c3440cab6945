"""Third-party checkpoints: every format and era reads to the same bits."""

import collections
import io
import struct
import sys

import numpy as np
import pytest
import torch

from common.checkpoints import CheckpointError, Record, RecordClass, load_checkpoint, read_foreign, record_state_dict
from tests.common.test_checkpoints_writers import (
    Backend,
    Variable,
    assert_same_bits,
    fake_object,
    legacy_bytes,
    sample_tensors,
    tar_bytes,
    torch_bytes,
)

CONV, NORM = "torch.nn.modules.conv.Conv2d", "torch.nn.modules.batchnorm.BatchNorm2d"
ERAS = {
    "python2-0.2": lambda tree: legacy_bytes(tree, era="0.2"),
    "python2-0.4": lambda tree: legacy_bytes(tree, era="0.4"),
    "python3-0.2": lambda tree: legacy_bytes(tree, era="0.2", python2=False),
    "python3-1.4": lambda tree: legacy_bytes(tree, era="0.4", python2=False),
    "tar-python2": tar_bytes,
    "tar-python3": lambda tree: tar_bytes(tree, python2=False),
}


def read(tmp_path, data, *extra):
    path = tmp_path / "file.t7"
    path.write_bytes(data)
    return read_foreign(path, extra)


def module(class_name, parameters=(), buffers=(), modules=(), **attributes):
    """An object with the tables of an nn.Module of PyTorch 0.2."""
    ordered = collections.OrderedDict
    return fake_object(
        class_name,
        _backend=Backend(),
        _parameters=ordered(parameters),
        _buffers=ordered(buffers),
        _modules=ordered(modules),
        _forward_hooks=ordered(),
        training=True,
        **attributes,
    )


def old_network(wrap=False):
    """(checkpoint tree as the original saved it, expected state dict)."""
    generator = torch.Generator().manual_seed(1)
    weight, scale = torch.randn(4, 3, 1, 1, generator=generator), torch.rand(4, generator=generator)
    mean, steps = torch.randn(4, generator=generator), torch.tensor([5])
    conv = module(CONV, [("weight", torch.nn.Parameter(weight)), ("bias", None)], kernel_size=(1, 1), out_channels=4)
    norm = module(
        NORM, [("weight", torch.nn.Parameter(scale))], [("running_mean", mean), ("steps", steps), ("no", None)]
    )
    block = module(
        "models.resnet.ShiftConv",
        modules=[("conv1", conv), ("bn1", norm), ("shift2", module("models.shiftnet_cuda_v2.nn.GenericShift_cuda"))],
        x=Variable(torch.randn(2, 3, generator=generator)),
        int_nchw=torch.Size([2, 4, 8, 8]),
        expansion=3.0,
        identifier=140093096808192,  # above 31 bits: a text integer in Python 2
    )
    tied = torch.nn.Parameter(torch.randn(10, 4, generator=generator))
    net = module(
        "models.resnet.ResNet",
        [("scale", torch.nn.Parameter(mean[1:3]))],
        modules=[
            ("layer1", block),
            ("linear", module("torch.nn.modules.linear.Linear", [("weight", tied)])),
            ("none", None),
        ],
        empty=torch.empty(0),
    )
    expected = {
        "scale": mean[1:3],
        "layer1.conv1.weight": weight,
        "layer1.bn1.weight": scale,
        "layer1.bn1.running_mean": mean,
        "layer1.bn1.steps": steps,
        "linear.weight": tied.data,
    }
    if wrap:
        net = module("torch.nn.parallel.data_parallel.DataParallel", modules=[("module", net)], device_ids=[0, 1])
    return {"net": net, "acc": torch.tensor(91), "epoch": 7, "names": {"a", "b"}}, expected


@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "DataParallel"])
@pytest.mark.parametrize("era", ERAS)
def test_whole_modules_of_every_era(tmp_path, era, wrap):
    tree, expected = old_network(wrap)
    before = set(sys.modules)
    result = read(tmp_path, ERAS[era](tree), "models.")
    assert set(sys.modules) == before  # no class was imported
    assert_same_bits(record_state_dict(result["net"]), expected)
    assert result["acc"].item() == 91 and result["epoch"] == 7 and result["names"] == {"a", "b"}
    net = result["net"].attributes["_modules"]["module"] if wrap else result["net"]
    block = net.attributes["_modules"]["layer1"]
    assert type(block) is Record and block.class_name == "models.resnet.ShiftConv"
    assert block.attributes["_backend"] is None and block.attributes["identifier"] == 140093096808192
    assert block.attributes["int_nchw"] == torch.Size([2, 4, 8, 8]) and block.attributes["expansion"] == 3.0
    assert_same_bits(block.attributes["x"], tree_of(tree, wrap)._modules["layer1"].x.tensor)


def tree_of(tree, wrap):
    return tree["net"]._modules["module"] if wrap else tree["net"]


@pytest.mark.parametrize("era", ERAS)
def test_tensors_are_exact_and_own_their_storage(tmp_path, era):
    tensors = sample_tensors()
    result = read(tmp_path, ERAS[era](tensors))
    assert_same_bits(result, tensors)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in result.values()}
    assert len(pointers) == len(tensors)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.itemsize for t in result.values())
    assert result["transposed"].stride() == tensors["transposed"].stride()


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("visible", torch.ones(2))
        self.head = torch.nn.Linear(4, 2)
        self.tied = torch.nn.Linear(4, 2, bias=False)
        self.tied.weight = self.head.weight
        self.activation = torch.nn.ReLU  # a class as a value
        self.device = torch.device("cuda", 1)
        self.dtype = torch.bfloat16


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_whole_modules_of_todays_torch(tmp_path, zip_format, protocol):
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network.head(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    tree = {"model": torch.nn.DataParallel(network), "lr_scheduler": scheduler, "optimizer": optimizer.state_dict()}
    data = torch_bytes(tree, _use_new_zipfile_serialization=zip_format, pickle_protocol=protocol)
    result = read(tmp_path, data, f"{__name__}.Network")
    state = record_state_dict(result["model"])
    assert_same_bits(state, dict(network.state_dict()))
    assert state["tied.weight"] is state["head.weight"]  # tied in the file, tied here
    assert_same_bits(result["optimizer"], tree["optimizer"])
    record = result["lr_scheduler"]
    assert record.class_name == "torch.optim.lr_scheduler.MultiStepLR"
    assert record.attributes["milestones"] == {2: 1, 4: 1}
    inner = result["model"].attributes["module"] if "module" in result["model"].attributes else None
    inner = inner or result["model"].attributes["_modules"]["module"]
    assert isinstance(inner.attributes["activation"], RecordClass)
    assert (inner.attributes["device"], inner.attributes["dtype"]) == ("cuda:1", torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"refused: it names .*\.Network"):
        read(tmp_path, data)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_every_dtype(tmp_path, zip_format):
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()
    tree = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names}
    tree["empty"], tree["strange"] = torch.empty(0, 3), torch.empty(2, 0)
    if zip_format:
        tree["uint16"] = torch.arange(6).to(torch.uint16)
    assert_same_bits(read(tmp_path, torch_bytes(tree, _use_new_zipfile_serialization=zip_format)), tree)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_numpy_values_become_numbers_and_tensors(tmp_path, zip_format):
    tree = {
        "best_prec1": np.float64(91.78),
        "single": np.float32(1.25),
        "count": np.int64(-3),
        "flag": np.bool_(True),
        "rows": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "none": np.empty((0, 2), np.float32),
        "keys": np.arange(3, dtype=np.uint32),
        "bytes": b"\x00\xff",
    }
    result = read(tmp_path, torch_bytes(tree, _use_new_zipfile_serialization=zip_format))
    for name in ("best_prec1", "single", "count", "flag"):
        assert result[name] == tree[name].item() and type(result[name]) is type(tree[name].item())
    for name in ("rows", "columns", "none", "keys"):
        assert_same_bits(result[name], torch.from_numpy(tree[name].copy()))
    assert result["bytes"] == b"\x00\xff"


@pytest.mark.parametrize(
    "value",
    [np.array([object()]), np.array(["text"]), np.zeros(2, ">f4"), np.zeros(2, [("a", "f4")]), np.complex64(1)],
    ids=["object", "text", "big-endian", "fields", "complex"],
)
def test_other_numpy_values_are_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="refused"):
        read(tmp_path, torch_bytes({"value": value}))


def test_names_are_exact_or_prefixes(tmp_path):
    data = legacy_bytes({"a": module("models.resnet.ResNet"), "b": module("modelsx.Other")})
    with pytest.raises(CheckpointError, match=r"names modelsx\.Other"):
        read(tmp_path, data, "models.")
    with pytest.raises(CheckpointError, match=r"names models\.resnet\.ResNet"):
        read(tmp_path, data, "models.resnet.Res", "modelsx.Other", "resnet.ResNet")
    assert read(tmp_path, data, "models.resnet.ResNet", "modelsx.")["b"].class_name == "modelsx.Other"


@pytest.mark.parametrize("name", ["", ".", "os", "a..b", "models.*", 3])
def test_a_malformed_name_is_the_callers_error(tmp_path, name):
    with pytest.raises(ValueError, match="extra_records"):
        read_foreign(tmp_path / "absent", [name])


def test_real_files_equal_torch(shared_dir):
    files = sorted((shared_dir / "data" / "checkpoints").glob("*/*"))
    assert files, "no checkpoints in the folder of real data"
    for path in files:
        assert_same_bits(read_foreign(path), torch.load(path, map_location="cpu", weights_only=True))


@pytest.mark.parametrize("content", [None, b"", b"hello, this is no checkpoint", b"PK\x03\x04", b"\x80\x02.", b"\x80"])
def test_what_is_no_checkpoint_gives_one_line(tmp_path, content):
    path = tmp_path / "some file"
    if content is not None:
        path.write_bytes(content)
    for reader in (read_foreign, load_checkpoint):
        with pytest.raises(CheckpointError, match="some file") as error:
            reader(path)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="not a file"):
        read_foreign(tmp_path)


@pytest.mark.parametrize("era", ["python2-0.2", "tar-python2", "zip"])
def test_truncated_files_are_named_damaged(tmp_path, era):
    tensors = sample_tensors()
    data = torch_bytes(tensors) if era == "zip" else ERAS[era](tensors)
    end = data.rstrip(b"\0") if era.startswith("tar") else data  # a tar may lack its final zeros
    for length in [1, 10, 20, *range(30, len(end) - 1, len(data) // 60), len(end) - 1]:
        with pytest.raises(CheckpointError, match="damaged or not"):
            read(tmp_path, data[:length])


def test_an_empty_tensor_of_before_0_4(tmp_path):
    """It had no dimensions and an empty storage; today that shape means one element."""
    empty = torch.empty(0, dtype=torch.float32)
    data = legacy_bytes({"buf": empty}, era="0.2")
    old = data.replace(b"K\x00\x85", b")", 1).replace(b"K\x01\x85", b")", 1)  # sizes (0,) and strides (1,) become ()
    assert len(old) == len(data) - 4
    assert_same_bits(read(tmp_path, old)["buf"], torch.empty(0))


def shared_module(depth):
    record = Record(CONV, {"_parameters": {"w": torch.ones(1)}, "_buffers": {}, "_modules": {}})
    for _ in range(depth):
        record = Record(CONV, {"_parameters": {}, "_buffers": {}, "_modules": {"a": record, "b": record}})
    return record


def looping_module():
    record = Record(CONV, {"_parameters": {}, "_buffers": {}, "_modules": {}})
    record.attributes["_modules"]["again"] = record
    return record


def deep_module(depth, name="a"):
    record = Record(CONV, {"_parameters": {}, "_buffers": {}, "_modules": {}})
    for _ in range(depth):
        record = Record(CONV, {"_parameters": {}, "_buffers": {}, "_modules": {name: record}})
    return record


def tables(**changes):
    return Record(CONV, {"_parameters": {}, "_buffers": {}, "_modules": {}} | changes)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (shared_module(60), "there twice"),
        (looping_module(), "there twice"),
        (deep_module(5000), "longer than"),
        (deep_module(5000, "ab" * 50), "longer than"),
        (Record("torch.nn.parallel.data_parallel.DataParallel", {"_modules": {"module": deep_module(9)}}), None),
        (Record("torch.nn.parallel.distributed.DistributedDataParallel", {"_modules": {"module": tables()}}), None),
        (deep_module(255), None),
        ({"_parameters": {}}, "is a dict"),
        (None, "NoneType"),
        (Record(CONV, {}), "has no _parameters"),
        (tables(_parameters=[1]), "has no _parameters"),
        (tables(_buffers=None), "has no _buffers"),
        (tables(_parameters={"w": 3}), "is a int"),
        (tables(_modules={"w": torch.ones(1)}), "not a module"),
        (tables(_parameters={"a.b": torch.ones(1)}), "called 'a.b'"),
        (tables(_parameters={1: torch.ones(1)}), "called '1'"),
        (tables(_parameters={"": torch.ones(1)}), "called ''"),
        (tables(_parameters={"n" * 600: torch.ones(1)}), "longer than"),
        (tables(_parameters={"w": torch.ones(1)}, _buffers={"w": torch.ones(1)}), "w is there twice"),
        (tables(_non_persistent_buffers_set=["w"], _buffers={"w": torch.ones(1)}), "are no set"),
        (Record("torch.nn.parallel.data_parallel.DataParallel", {"_modules": {}}), "NoneType"),
    ],
)
def test_modules_that_are_not_trees_are_refused(record, message):
    if message is None:
        assert record_state_dict(record) == {}
        return
    with pytest.raises(CheckpointError, match=f"^best.t7: .*{message}") as error:
        record_state_dict(record, "best.t7")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_state_dict_is_a_copy():
    weight = torch.ones(2)
    state = record_state_dict(tables(_parameters={"w": weight}))
    state["w"].zero_()
    assert weight.tolist() == [1, 1]


def test_old_pickles_use_the_opcodes_of_python_2():
    """The writers must keep making what they claim to: otherwise the tests above prove less than they say."""
    data = legacy_bytes(old_network()[0], era="0.2")
    assert b"U\x06module" in data and b"I140093096808192\n" in data and b"\xe9, not UTF-8" in data
    assert struct.pack("<4si", b"conv", 0)[:4] in data and b"X" + struct.pack("<I", 6) + b"module" not in data
    assert not io.BytesIO(data).read(4).startswith(b"PK")
