"""The original's files load, say what they hold, and evaluate; similarity.py and plot_tradeoff.py on files and runs."""

import json
import os

import pytest
import torch

from common.checkpoints import CheckpointError
from common.data import TensorLoader, load_dataset
from shared_bases import engine, eval_cifar10, plot_orthogonality, plot_tradeoff, similarity
from shared_bases.checkpoints import existing_path, infer_config, load_network, read_checkpoint
from shared_bases.models import Config, build_model
from shared_bases.regulariser import similarity_terms
from shared_bases.runs import RunError

# name of the file: network, ranks, accuracy, epoch, similarity term, momentum buffers (published or recorded with them)
AUTHORS = {
    "CIFAR10_ResNet32_S8U1": ("ResNet32_SingleShared", 8, 1, 91.920, 253, 4.97672e-05, 170),
    "CIFAR10_ResNet32_Double_S16U1": ("ResNet32_DoubleShared", 16, 1, 93.070, 253, 7.69989e-04, 173),
    "CIFAR10_ResNet56_S16U1": ("ResNet56_SingleShared", 16, 1, 92.540, 275, 2.95588e-04, 314),
}

CORRECT_OF_1000 = 929


@pytest.fixture(params=AUTHORS)
def authors_file(request, shared_dir):
    (path,) = (shared_dir / "data" / "checkpoints" / "shared_bases").glob(f"{request.param}*")
    return str(path), *AUTHORS[request.param]


def test_authors_files(authors_file):
    path, key, shared_rank, unique_rank, acc, epoch, term, buffers = authors_file
    config = Config("cifar10", key, shared_rank, unique_rank)
    model, found = load_network(path, config)
    assert (found["config"], found["epoch"]) == (config, epoch)
    assert found["acc"] == pytest.approx(acc, abs=1e-4)
    (measured,) = similarity_terms(model, config.entry.similarity)
    assert measured.item() == pytest.approx(term, rel=1e-4)
    for value in found["net"].values():
        assert torch.isfinite(value).all()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    optimizer.load_state_dict(found["optimizer"])
    assert len(optimizer.state) == buffers == len(list(model.parameters()))
    assert all(entry["momentum_buffer"].shape == parameter.shape for parameter, entry in optimizer.state.items())


def test_wrong_ranks_name_those_of_the_file(authors_file, capsys):
    path, key, shared_rank, unique_rank, *_ = authors_file
    flags = [f"--model={key}", f"--shared_rank={shared_rank + 8}", f"--unique_rank={unique_rank + 1}"]
    status = engine.run_script(eval_cifar10.main, [*flags, f"--pretrained={path}", "--embedded-data"])
    error = capsys.readouterr().err
    assert status == 1 and error.count("\n") == 1
    assert f"has {key}, shared_rank {shared_rank}, unique_rank {unique_rank}; the flags ask for" in error
    assert f"use --model={key} --shared_rank={shared_rank} --unique_rank={unique_rank}" in error


def evaluate_authors_file(authors_file, data_dir, device, capsys):
    path, key, shared_rank, unique_rank, acc, *_ = authors_file
    flags = [f"--model={key}", f"--shared_rank={shared_rank}", f"--unique_rank={unique_rank}", f"--device={device}"]
    eval_cifar10.main([*flags, f"--pretrained={path}", f"--dataset_path={data_dir}"])
    return acc, capsys.readouterr().out


@pytest.mark.gpu
def test_authors_files_evaluate_to_the_published_errors_on_a_gpu(authors_file, real_data_dir, capsys):
    acc, output = evaluate_authors_file(authors_file, real_data_dir, "cuda", capsys)
    assert f"Eval_Acc_top1 = {acc:.3f}\n" in output


@pytest.mark.full_evaluation
def test_authors_files_evaluate_to_the_published_errors(authors_file, real_data_dir, capsys):
    acc, output = evaluate_authors_file(authors_file, real_data_dir, "cpu", capsys)
    assert f"Eval_Acc_top1 = {acc:.3f}\n" in output


@pytest.mark.parametrize("authors_file", ["CIFAR10_ResNet32_S8U1"], indirect=True)
def test_an_authors_file_on_a_thousand_images(authors_file, real_data_dir):
    """What eval_cifar10.py does, on the first 1,000 test images: CORRECT_OF_1000 is of the run that gave 91.920%."""
    path, key, shared_rank, unique_rank, *_ = authors_file
    network, _ = load_network(path, Config("cifar10", key, shared_rank, unique_rank))
    mean, std = engine.NORMALISATION["cifar10"]
    images = load_dataset("cifar10", str(real_data_dir), split="test").subset(1000)
    loader = TensorLoader(images, 250, train=False, mean=mean, std=std)
    _, top1, _ = engine.evaluate(network, loader)
    assert round(top1 * 10) == CORRECT_OF_1000


SMALL = Config("cifar10", "ResNet32_SingleShared", 2, 1)


@pytest.fixture
def saved(tmp_path):
    """A file as the original writes it, from several GPUs: names with module., accuracy as a tensor."""
    torch.manual_seed(0)
    model = build_model(SMALL)
    path = tmp_path / "ILSVRC-like.pth"
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"net_state_dict": state, "acc": torch.tensor(12.5), "epoch": 3}, path)
    return path, model


def test_names_with_module_and_accuracy_as_a_tensor(saved):
    path, model = saved
    found = read_checkpoint(str(path))
    assert (found["config"], found["acc"], found["epoch"], found["optimizer"]) == (SMALL, 12.5, 3, None)
    loaded = load_network(str(path), SMALL)[0].eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))
    assert loaded.layer1[1].shared_basis is loaded.shared_basis_1


@pytest.mark.parametrize(
    "config",
    [
        Config("cifar10", "ResNet110"),
        Config("cifar10", "ResNet56_SharedOnly", 8),
        Config("cifar10", "ResNet32_NonShared", None, 2),
        Config("cifar100", "DenseNet121_SingleShared", 32, 2),
        Config("cifar100", "ResNext50_SingleShared", 64, 4),
        Config("cifar100", "ResNext50"),
        Config("cifar100", "MobileNetV2_SharedDouble"),
        Config("ilsvrc", "ResNet34_DoubleShared", 48, 1),
        Config("ilsvrc", "ResNet101_SharedSingle"),
        Config("ilsvrc", "MobileNetV2_SharedDouble"),
        Config("ilsvrc", "MobileNetV2_SharedDouble", attention=False),
    ],
    ids=lambda config: f"{config.dataset}-{config.text()}-{config.attention}",
)
def test_the_network_follows_from_names_and_shapes(config):
    with torch.device("meta"):
        found = infer_config(build_model(config).state_dict())
    assert found == config


def test_both_spellings_of_the_default_weight_are_found(tmp_path):
    (tmp_path / "CIFAR10-ResNet20-S16-U1-L10-0.pth").touch()
    asked = str(tmp_path / "CIFAR10-ResNet20-S16-U1-L10.0-0.pth")
    assert existing_path(asked).endswith("-L10-0.pth")
    with pytest.raises(CheckpointError, match="nothing.pth does not exist"):
        existing_path(str(tmp_path / "nothing.pth"))


def test_other_files_are_refused_by_name(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    contents = {"other.pth": {"net_state_dict": {"weight": torch.ones(2)}}, "list.pth": [1], "evil.pth": Evil()}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(str(tmp_path / name))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="text.pth: damaged or not a checkpoint"):
        read_checkpoint(str(tmp_path / "text.pth"))
    assert not (tmp_path / "executed").exists()


def test_similarity_table_and_picture(saved, tmp_path, capsys):
    path, model = saved
    with torch.no_grad():
        model.shared_basis_1.weight[1] = -2 * model.shared_basis_1.weight[0]  # the same direction
    torch.save({"net_state_dict": model.state_dict()}, path)
    groups = similarity.main([str(path), f"--output={tmp_path}/picture.png", f"--csv={tmp_path}/table.csv"])
    assert [(row.filters, row.weights, row.own_filters) for row in groups] == [(2, 144, 8), (4, 288, 16), (8, 576, 32)]
    assert groups[0].mean == pytest.approx(1) and groups[0].norm_mean == pytest.approx(1.5)
    assert groups[1].mean < 1e-6 and 0 < groups[1].own_mean < 0.2
    assert "| 1 | 2 | 144 | 1.0000 | 1.0000 | 1.5000 | 8 |" in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 4


def test_similarity_of_a_network_without_shared_filters(tmp_path):
    torch.save({"net_state_dict": build_model(Config("cifar10", "ResNet20")).state_dict()}, tmp_path / "base.pth")
    with pytest.raises(RunError, match="ResNet20, which has no shared filters"):
        similarity.main([str(tmp_path / "base.pth")])


def write_run(folder, data, weight, top1):
    folder.mkdir(parents=True)
    header = {"type": "run", "paper": "shared_bases", "data": data, "config": SMALL.as_dict(),
              "args": {"lambdaR": weight}}  # fmt: skip
    result = {"type": "result", "best_top1": top1, "epochs": 3, "epochs_in_paper": 300}
    (folder / "metrics.jsonl").write_text(json.dumps(header) + "\n" + json.dumps(result) + "\n")


def test_tradeoff_draws_recorded_runs_beside_published_points(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", "cifar10", 10.0, 60.0)
    write_run(tmp_path / "runs" / "b", "cifar10", 0.0, 55.0)
    write_run(tmp_path / "runs" / "digits", "digits (embedded)", 10.0, 99.0)
    output = tmp_path / "new" / "tradeoff.png"
    points = plot_tradeoff.main(["--runs", str(tmp_path / "runs"), f"--output={output}"])
    here = [point for point in points if point.source != "published"]
    assert sorted((point.error, point.weight) for point in here) == [(40.0, 10.0), (45.0, 0.0)]
    assert all((point.parameters, point.source) == (115722, "here, 3 of 300 epochs") for point in here)
    published = {(point.config.text(), point.error) for point in points if point.source == "published"}
    assert ("ResNet32_SingleShared --shared_rank=8 --unique_rank=1", 8.08) in published
    assert ("DenseNet121_SingleShared --shared_rank=16 --unique_rank=1", 22.15) in published
    assert ("ResNet34_DoubleShared --shared_rank=32 --unique_rank=1", 27.20) in published, "not the first README's"
    assert output.read_bytes().startswith(b"\x89PNG") and "2 of recorded runs" in capsys.readouterr().out
    with pytest.raises(RunError, match="nowhere does not exist"):
        plot_tradeoff.main(["--runs", str(tmp_path / "nowhere")])
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(RunError, match="bad.jsonl is not a log"):
        plot_tradeoff.main(["--runs", str(tmp_path / "bad.jsonl")])


def test_orthogonality_over_training_is_read_from_the_logs(tmp_path, capsys):
    folder = tmp_path / "runs"
    for weight, values in ((10.0, [0.1, 0.01]), (0.0, [3.0, 2.0])):
        write_run(folder / f"{weight}", "cifar10", weight, 60.0)
        log = folder / f"{weight}" / "metrics.jsonl"
        header, result = log.read_text().splitlines()
        epochs = [{"type": "epoch", "similarity": value, "mean_abs_cosine": value / 20} for value in values]
        log.write_text("\n".join([header, *map(json.dumps, epochs), result]))
    curves = plot_orthogonality.main(["--runs", str(folder), f"--output={tmp_path}/o.png"])
    found = {curve.weight: curve.values["similarity"] for curve in curves}
    assert found == {10.0: [0.1, 0.01], 0.0: [3.0, 2.0]}
    assert "lambdaR = 10 (cifar10): R 0.01, cosine 0.0005" in capsys.readouterr().out
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no run with shared filters is there"):
        plot_orthogonality.main(["--runs", str(tmp_path / "empty")])
