"""Every network of the dictionaries: counts, initialisation, sharing, ranks that are refused."""

import itertools

import pytest
import torch

from shared_bases import count, modelsize
from shared_bases.models import MODELS, Config, build_model, model_key
from shared_bases.regulariser import basis_matrices, similarity_terms

# Parameters, multiply-adds and count of spec'd networks, recorded from the original code.
COUNTS = {
    ("cifar10", "ResNet32"): (464154, 68862592, 69472906),
    ("cifar10", "ResNet44"): (658586, 97174144, 98013834),
    ("cifar10", "ResNet32_SingleShared", 24, 1): (243850, 110543488, 111870602),
    ("cifar10", "ResNet32_SingleShared", 32, 1): (290442, 142000768, 143557258),
    ("cifar10", "ResNet32_SingleShared", 16, 2): (224250, 83018368, 84144778),
    ("cifar10", "ResNet32_DoubleShared", 16, 1): (245642, 79086208, 80183946),
    ("cifar10", "ResNet32_NonShared", None, 16): (508954, 75154048, 76223114),
    ("cifar10", "ResNet56_SingleShared", 8, 1): (201850, 83018368, 84603530),
    ("cifar10", "ResNet56_DoubleShared", 24, 1): (412410, 208847488, 211350154),
    ("cifar10", "ResNet56_SharedOnly", 8): (172058, 75154048, 76681866),
    ("cifar100", "ResNet34"): (21328292, 1159448576, 1161504868),
    ("cifar100", "ResNet34_SingleShared", 16, 4): (7338852, 568051712, 570517604),
    ("cifar100", "ResNet34_NonShared", None, 16): (9510052, 505137152, 507521124),
    ("cifar100", "DenseNet121_SingleShared", 64, 4): (5606708, 1368920064, 1380386916),
    ("cifar100", "ResNext50"): (23177124, 1344151552, 1355309156),
    ("cifar100", "ResNext50_SingleShared", 16, 4): (16601220, 1028005888, 1036746852),
    ("cifar100", "ResNext50_SingleShared", 128, 8): (23203940, 1392910336, 1402839140),
    ("cifar100", "MobileNetV2_SharedDouble"): (1899620, 67356736, 69324036),
    ("ilsvrc", "ResNet34"): (21797672, 3663761408, 3672066536),
    ("ilsvrc", "ResNet34_SingleShared", 48, 1): (9436888, 3249508352, 3260886760),
    ("ilsvrc", "ResNet101"): (44549160, 7801405440, 7834773480),
    ("ilsvrc", "ResNet101_Shared"): (22770728, 7801405440, 7834773480),
    ("ilsvrc", "ResNet101_SharedSingle"): (29471784, 7801405440, 7834773480),
    ("ilsvrc", "MobileNetV2_SharedDouble"): (2978905, 313621120, 328850536),
}


def on_meta(*spec):
    with torch.device("meta"):
        return build_model(Config(*spec))


@pytest.mark.parametrize("spec", COUNTS, ids=lambda spec: "-".join(map(str, spec)))
def test_counts(spec):
    model = on_meta(*spec)
    calls = count.layer_calls(model, 224 if spec[0] == "ilsvrc" else 32)
    counted = (count.count_parameters(model), sum(call.macs for call in calls), sum(call.count for call in calls))
    assert counted == COUNTS[spec]
    assert model.training, "counting leaves the model as it was"


def test_published_tables_and_their_misprints(capsys):
    count.main([])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "_" in line.split("G ")[0] and line.startswith(("ResN", "Dense", "Mobile"))]
    assert len(rows) == 24
    remarks = {" ".join(line.split()[:2]): line.split("  ")[-1] for line in rows if ":" in line}
    assert remarks == {
        "DenseNet121-S64U4 DenseNet121_SingleShared": "label: wrong, is S16U1",
        "ResNeXt50-S16U1 ResNext50_SingleShared": "label: wrong, is S64U4",
        "ResNet32-S16U1* ResNet32_DoubleShared": "params: cut off, rounds to 0.25",
        "ResNet56-S16U1 ResNet56_SingleShared": "params: wrong, is 0.27",
        "ResNet56-S16U1* ResNet56_DoubleShared": "params: cut off, rounds to 0.32",
    }


def test_comparing_a_count_with_a_printed_number():
    assert count.compare(0.3192, "0.32") == ""
    assert count.compare(0.3192, "0.31") == "cut off, rounds to 0.32"
    assert count.compare(0.3192, "0.30") == "wrong, is 0.32"


def test_count_of_one_network(capsys):
    count.main(["--model=ResNet32-SingleShared", "--shared_rank=8"])
    output = capsys.readouterr().out
    assert "Parameters: 150666\n" in output and "FLOPs: 96994580 " in output and "MACs: 47628928 " in output


def test_modelsize_prints_what_the_original_printed(capsys):
    modelsize.main(["--repeats=1", "--device=cpu"])
    output = capsys.readouterr().out
    assert "Computational complexity:       0.21 GMac" in output
    assert "Number of parameters:           412.41 k" in output
    assert "seconds per inference" in output


SMALL = {"shared_rank": 4, "unique_rank": 4}
NETWORKS = [(dataset, key) for dataset, models in MODELS.items() for key in models if key != "ResNet1202"]


@pytest.mark.parametrize(("dataset", "key"), NETWORKS, ids=lambda value: value)
def test_every_network_builds_and_shares_parameters(dataset, key):
    model = on_meta(dataset, key, *SMALL.values())
    names = [name for name, _ in model.named_parameters()]
    state = model.state_dict(keep_vars=True)
    assert len(set(map(id, state.values()))) == len(names) + len(list(model.buffers()))
    shared = {name: value for name, value in state.items() if name.startswith("shared_basis_")}
    assert bool(shared) == ("Shared" in key.replace("NonShared", ""))
    for name, value in shared.items():
        aliases = [other for other, same in state.items() if same is value and other != name]
        assert aliases or (key == "DenseNet121_SingleShared" and name == "shared_basis_4.weight")
    terms = similarity_terms(model, MODELS[dataset][key].similarity)
    assert bool(terms) == bool(shared)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}
    dropped = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropped == ([0.2] if dataset == "ilsvrc" and key.startswith("MobileNet") else [])


@pytest.mark.parametrize("key", ["ResNet34_SingleShared", "ResNet34_DoubleShared", "ResNet50_SharedSingle"])
def test_bases_start_orthonormal(key):
    torch.manual_seed(0)
    entry = MODELS["ilsvrc"][key]
    model = build_model(Config("ilsvrc", key, 16, 1))
    assert sum(similarity_terms(model, entry.similarity)).item() < 1e-12
    for matrix in basis_matrices(model):
        assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5)


@pytest.mark.parametrize(
    ("key", "expected"), [("ResNet32_SingleShared", 6.5), ("ResNet32_DoubleShared", 2.0), ("ResNet32_SharedOnly", 0.0)]
)
def test_first_similarity_of_cifar10(key, expected):
    torch.manual_seed(0)
    model = build_model(Config("cifar10", key, 16, 1))
    (term,) = similarity_terms(model, MODELS["cifar10"][key].similarity)
    assert term.item() == pytest.approx(expected, rel=0.1, abs=1e-12)


def test_one_step_trains_every_parameter_and_keeps_names_together():
    torch.manual_seed(0)
    config = Config("cifar10", "ResNet32_DoubleShared", 4, 1)
    model = build_model(config)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    loss = model(torch.randn(4, 3, 32, 32)).square().mean() + sum(similarity_terms(model, config.entry.similarity))
    loss.backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    state = model.state_dict()
    assert torch.equal(state["shared_basis_2_1.weight"], state["layer2.4.shared_basis_1.weight"])
    with_fc = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert with_fc == count.count_parameters(model)


def test_repaired_and_ported_networks_run():
    """The ones that the original could not build, and those without a recorded output, on small inputs."""
    torch.manual_seed(0)
    for spec, size in ((("cifar100", "ResNext50"), 32), (("cifar100", "MobileNetV2_SharedDouble"), 32),
                       (("ilsvrc", "MobileNetV2_SharedDouble"), 64)):  # fmt: skip
        model = build_model(Config(*spec)).eval()
        with torch.no_grad():
            assert torch.isfinite(model(torch.randn(2, 3, size, size))).all()
    names = list(model.state_dict())
    weights = [model.state_dict()[f"stage{stage}.1.chan_attention.conv.weight"] for stage in (3, 4, 5, 6)]
    assert [weight.shape[-1] for weight in weights] == [1, 1, 3, 3]
    last_of_block = [list(group)[-1] for _, group in itertools.groupby(names, lambda name: name.split(".")[:2])]
    assert "stage3.1.chan_attention.conv.weight" in last_of_block


@pytest.mark.parametrize(
    ("dataset", "name", "key"),
    [
        ("cifar10", "ResNet32-DoubleShared", "ResNet32_DoubleShared"),
        ("cifar10", "ResNet56_SharedOnly", "ResNet56_SharedOnly"),
        ("cifar100", "ResNeXt50", "ResNext50"),
        ("cifar100", "ResNeXt50-SingleShared", "ResNext50_SingleShared"),
        ("ilsvrc", "MobileNetV2-Shared", "MobileNetV2_Shared"),
        ("ilsvrc", "MobileNetV2-Shared++", "MobileNetV2_SharedDouble"),
        ("ilsvrc", "ResNet50-Shared", "ResNet50_SharedSingle"),
        ("ilsvrc", "ResNet50_Shared", "ResNet50_Shared"),
        ("ilsvrc", "ResNet50-Shared++", "ResNet50_Shared"),
    ],
)
def test_names_of_the_readme(dataset, name, key):
    assert model_key(dataset, name) == key


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("cifar10", "ResNet32_SingleShared", 0, 1), "shared_rank must be at least 1, not 0; use .*ResNet32_NonShared"),
        (
            ("cifar10", "ResNet32_SingleShared", 16, 0),
            "unique_rank must be at least 1, not 0; use .*ResNet32_SharedOnly",
        ),
        (("cifar10", "ResNet32_DoubleShared", -3, 1), "shared_rank must be at least 1, not -3"),
        (("cifar10", "ResNet32_SharedOnly", 145), "shared_rank 145 is larger than the channels allow"),
        (("cifar100", "ResNet34_SingleShared", 16, 1000), "unique_rank 1000 is larger than the channels allow"),
        (("cifar100", "ResNext50_SingleShared", 16, 1), "4 times a power of two, 4 to 512"),
        (("cifar100", "ResNext50_SingleShared", 64, 12), "cannot have unique_rank 12"),
        (("cifar10", "ResNet33"), "The model is currently not supported"),
    ],
)
def test_ranks_and_names_that_make_no_network_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build_model(Config(*spec))


def test_ranks_larger_than_the_channels_are_mentioned():
    assert "shared_rank 24 is larger than the 16 channels" in Config("cifar10", "ResNet32_SharedOnly", 24).warning()
    assert Config("cifar10", "ResNet32_SingleShared", 16, 1).warning() is None
