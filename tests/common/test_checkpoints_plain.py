"""The restricted reader of our own checkpoints: exactly what was saved, and of everything else nothing."""

import ast
import collections
import struct
from pathlib import Path

import pytest
import torch

from common.checkpoints import CheckpointError, load_checkpoint, save_checkpoint, unpickler
from common.checkpoints.plain import DTYPES, MAX_KEY
from tests.common import test_checkpoints_hostile as hostile
from tests.common.test_checkpoints_writers import assert_same_bits, pack_zip, sample_tensors, torch_bytes

ROOT = Path(__file__).resolve().parents[2]
NOT_SAVED = [f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)]  # torch.save does not know them


def saved_and_loaded(tmp_path, payload):
    save_checkpoint(tmp_path / "run.pt", payload)
    return load_checkpoint(tmp_path / "run.pt")


def assert_as_torch_reads(tmp_path, payload):
    """Equal to what torch.load makes of the same file, in all that a tensor has."""
    ours = saved_and_loaded(tmp_path, payload)
    theirs = torch.load(tmp_path / "run.pt", weights_only=True)
    assert_same_bits(ours, theirs)
    pairs = [(ours, theirs)]
    while pairs:
        one, other = pairs.pop()
        if isinstance(one, torch.Tensor):
            assert (one.stride(), one.storage_offset()) == (other.stride(), other.storage_offset())
            assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
            assert (one.requires_grad, one.is_leaf, one._is_view()) == (other.requires_grad, other.is_leaf, False)
        elif isinstance(one, dict):
            assert getattr(one, "__dict__", None) == getattr(other, "__dict__", None)
            pairs += zip(one.values(), other.values(), strict=True)
        elif isinstance(one, (list, tuple)):
            pairs += zip(one, other, strict=True)


@pytest.mark.filterwarnings("ignore::UserWarning")  # complex32 is experimental
@pytest.mark.parametrize("name", sorted(set(DTYPES) - set(NOT_SAVED)))
def test_every_type_of_tensor(tmp_path, name):
    raw = torch.arange(32, dtype=torch.uint8)
    raw = raw % 2 if name == "torch.bool" else raw
    tensor = raw.view(DTYPES[name])
    if name.startswith("torch.q"):  # quantized numbers mean nothing without their scale
        with pytest.raises(CheckpointError, match="layout of its own"):
            save_checkpoint(tmp_path / "run.pt", tensor)
        return
    loaded = saved_and_loaded(tmp_path, {"whole": tensor, "rest": tensor[1:], "none": tensor[:0]})
    theirs = torch.load(tmp_path / "run.pt", weights_only=True)
    for key in loaded:
        ours, other = loaded[key], theirs[key]
        assert (ours.dtype, ours.shape, ours.storage_offset()) == (DTYPES[name], other.shape, other.storage_offset())
        assert bytes(ours.untyped_storage()) == bytes(other.untyped_storage())
    assert loaded["rest"].untyped_storage().data_ptr() == loaded["whole"].untyped_storage().data_ptr()


def test_memory_formats_flags_and_sharing(tmp_path):
    images = torch.randn(2, 3, 4, 5)
    shared = torch.nn.Parameter(torch.randn(3, 4))
    tree = {
        **sample_tensors(),
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "three dimensions": torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
        "expanded": torch.randn(3, 1).expand(3, 1000),
        "empty": torch.empty(0, 3),
        "permuted": images.permute(3, 0, 2, 1),
        "parameter": shared,
        "row": shared.detach()[1],
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "learned": torch.ones(2, requires_grad=True),
    }
    assert_as_torch_reads(tmp_path, tree)
    loaded = load_checkpoint(tmp_path / "run.pt")
    loaded["parameter"].data.zero_()
    assert not loaded["row"].any(), "tensors that shared memory share it again"


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RAdam", "RMSprop", "Adagrad"])
def test_states_of_optimizers(tmp_path, optimizer):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    network.to(memory_format=torch.channels_last)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    used = getattr(torch.optim, optimizer)(network.parameters(), lr=0.1, **more)
    network(torch.ones(2, 3, 5, 5)).square().sum().backward()
    used.step()
    state = {"model": network.state_dict(), "optimizer": used.state_dict(), "seed": torch.get_rng_state()}
    assert_as_torch_reads(tmp_path, state)
    assert load_checkpoint(tmp_path / "run.pt")["model"]._metadata == state["model"]._metadata


def test_numbers_and_containers(tmp_path):
    tree = collections.OrderedDict(a=[1, -1, 255, 2**31, -(2**63), 2**1998, 1e-320, float("inf"), True, None, "\ud800"])
    tree.note = {"deep": [[[()]]]}
    tree[MAX_KEY - 1] = {1.5: "x", None: "y", False: "z", "": (1, 2, 3, 4)}
    assert_as_torch_reads(tmp_path, tree)


def test_long_lists_of_numbers_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickler, "MAX_READS", 100)  # the limit for files of others
    assert saved_and_loaded(tmp_path, {"order": list(range(1000))})["order"] == list(range(1000))


def test_what_could_not_be_read_is_not_saved(tmp_path):
    hidden = collections.OrderedDict()
    hidden.items = None
    complex_numbers = torch.ones(2, dtype=torch.complex64)
    for value in ({MAX_KEY: 1}, hidden, complex_numbers.conj(), complex_numbers.conj().imag):
        with pytest.raises(CheckpointError, match="not saved"):
            save_checkpoint(tmp_path / "run.pt", value)
    assert not (tmp_path / "run.pt").exists()


def refuse(tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    line = str(error.value)
    assert line.startswith(f"{path}: not loaded: ") and "\n" not in line
    return line


@pytest.mark.parametrize("attack", hostile.LIVE)
def test_no_command_runs(tmp_path, attack):
    sentinel = tmp_path / "executed"
    refuse(tmp_path, hostile.zip_with(hostile.LIVE[attack](f"touch {sentinel}")))
    assert not sentinel.exists()


@pytest.mark.parametrize("attack", hostile.CONFUSED)
def test_no_confused_type_passes(tmp_path, attack):
    refuse(tmp_path, hostile.zip_with(hostile.CONFUSED[attack][0]))


@pytest.mark.parametrize("view", hostile.VIEWS)
def test_tensors_stay_inside_their_storage(tmp_path, view):
    options, _ = hostile.VIEWS[view]
    data = struct.pack("<4f", *range(4))
    content = pack_zip({"data.pkl": hostile.whole(hostile.rebuilt(**options)), "data/0": data})
    if view in ("expanded", "wrong number of arguments"):  # a view takes no memory, and these arguments may be left out
        (tmp_path / "run.pt").write_bytes(content)
        assert load_checkpoint(tmp_path / "run.pt").untyped_storage().nbytes() == 16
    else:
        refuse(tmp_path, content)


def test_booleans_are_0_or_1(tmp_path):
    program = hostile.whole(hostile.rebuilt(kind="torch BoolStorage"))
    assert "booleans" in refuse(tmp_path, pack_zip({"data.pkl": program, "data/0": b"\0\1\2\1"}))


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        b"bytes",
        torch.float32,
        torch.Size([1]),
        torch.device("cpu"),
        collections.Counter("a"),
        torch.nn.ReLU(),
        torch.ones(2).to_sparse(),
        {b"key": 1},
        torch.ones(2, dtype=torch.complex64).conj(),
    ],
    ids=str,
)
def test_what_others_save_is_refused(tmp_path, value):
    refuse(tmp_path, torch_bytes({"value": value}))


def test_a_value_that_contains_itself_is_refused(tmp_path):
    loop = []
    loop.append(loop)
    assert "contains itself" in refuse(tmp_path, torch_bytes(loop))


def called_names(path):
    """Dotted names of everything that a file calls or passes on, such as torch.load."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_other_reader_is_used():
    """torch.load and its kind run or build what a file says; nothing here calls them."""
    forbidden = {"torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load_state_dict_from_url",
                 "pickle.load", "pickle.loads", "torch.package.PackageImporter"}  # fmt: skip
    folders = ("common", "shiftresnet", "deepshift", "s3", "shared_bases", "epsilon_resnet", "examples", "benchmarks",
               "reporting")  # fmt: skip
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).glob("**/*.py"))]
    assert len(files) > 100
    for path in files:
        assert not forbidden & set(called_names(path)), path
