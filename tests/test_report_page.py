"""The page about runs: what it says of whole, partial and missing results; its costs; its markup."""

import csv
import html.parser
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import report
from reporting import build, compare, costs, published, records, sections
from reporting.plots import PALETTE

ROOT = Path(__file__).resolve().parents[1]
SHIFTRESNET20 = {"arch": "shiftresnet20", "expansion": 3.0, "reduction": 1.0, "reduction_mode": "net",
                 "num_classes": 10, "project_on_mid": False, "first_stride": 1}  # fmt: skip
SIMPLE_CONV_PS = {"dataset": "mnist", "arch": "simple_conv", "shift_type": "PS", "shift_depth": "all", "count": 2,
                  "convert_all_linear": True, "weight_bits": 5, "activation_bits": [16, 16],
                  "layers": ["conv1", "conv2", "fc1", "fc2"]}  # fmt: skip
PUBLISHED = """paper,table,dataset,model,method,setting,metric,value,command
shiftresnet,README CIFAR-10,cifar10,ResNet20,ShiftResNet,e=3c,top1_acc_percent,89.56,python main.py --arch=shiftresnet20 --expansion=3 --dataset=cifar10
shiftresnet,README CIFAR-10,cifar10,ResNet20,ShiftResNet,e=3c,params_millions,0.10,python count.py --arch=shiftresnet20 --expansion=3
shiftresnet,README CIFAR-10,cifar10,ResNet20,ShiftResNet,e=1c,top1_acc_percent,85.78,python main.py --arch=shiftresnet20 --expansion=1 --dataset=cifar10
"""  # noqa: E501


def write_run(folder, paper="shiftresnet", data="digits (embedded)", config=SHIFTRESNET20, finished=True, **header):
    """A run of two epochs with 41% in the end."""
    header = {"type": "run", "paper": paper, "reproduces": None, "command": f"python {paper}/main.py", "data": data,
              "args": {"arch": config["arch"]}, "config": config, "seed": 1, "params": 95642, "macs": 17,
              "started": str(folder), "hardware": "CPU", **header}  # fmt: skip
    lines = [header, *({"type": "epoch", "epoch": n, "test_top1": 40.0 + n, "train_loss": 2.0 - n, "test_loss": 2.1 - n}
                       for n in (0, 1))]  # fmt: skip
    if finished:
        lines.append({"type": "result", "top1": 41.0, "best_top1": 41.5, "best_epoch": 1, "epochs": 2,
                      "epochs_in_paper": 160, "seconds": 61.0})  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_repository(folder):
    """A checkout with two papers: one with a small published.csv, one with nothing."""
    (folder / "shiftresnet").mkdir()
    (folder / "shiftresnet" / "published.csv").write_text(PUBLISHED)
    (folder / "shiftresnet" / "sweep_cifar10.sh").touch()
    (folder / "deepshift").mkdir()
    return folder


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", make_repository(tmp_path))
    return tmp_path


def write_page(repository, *flags, status=0):
    output = repository / "report"
    (repository / "runs").mkdir(exist_ok=True)
    assert report.main([str(repository / "runs"), f"--output-dir={output}", *flags]) == status
    return (output / "index.html").read_text(encoding="utf-8")


EVIL = '"><script>alert(1)</script>'


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(page, folder of the report, progress) of runs on CIFAR-10 and on digits, one with names that are markup."""
    folder = make_repository(tmp_path_factory.mktemp("whole"))
    command = "main.py --arch=shiftresnet20 --expansion=3 --dataset=cifar10"
    write_run(folder / "runs" / "shiftresnet" / "cifar", data="cifar10", reproduces=command)
    write_run(folder / "runs" / "shiftresnet" / "digits", hardware=EVIL, args={"arch": EVIL})
    write_run(folder / "runs" / "deepshift" / "ps", "deepshift", config=SIMPLE_CONV_PS)
    write_run(folder / "runs" / "shiftresnet" / "evil", data=EVIL, config={**SHIFTRESNET20, "arch": EVIL})
    progress = []
    path, damages = build.build(folder, [folder / "runs"], folder / "report", True, progress.append)
    assert damages == []
    return path.read_text(encoding="utf-8"), path.parent, progress


class Tags(html.parser.HTMLParser):
    """Checks that tags nest, and collects attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def rows_with(page, word):
    """Cells of the table rows in which a cell starts with the word."""
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]
    rows = [[re.sub(r"<[^>]*>", "", cell) for cell in row] for row in rows]
    return [row for row in rows if any(cell.startswith(word) for cell in row)]


def test_no_runs_at_all_is_a_page_that_says_what_to_do(repository, capsys, monkeypatch):
    monkeypatch.chdir(repository)
    assert report.main([]) == 0  # a folder that was asked for must be there, the usual one need not
    text = Tags((repository / "report" / "index.html").read_text(encoding="utf-8")).text
    assert "runs does not exist: no runs there" in text
    assert "no finished run in the given folders: bash run_all.sh --only shiftresnet" in text
    assert "no recorded run: python report.py --record RUN_DIR" in text
    assert "bash run_all.sh --only shiftresnet --data-dir DIR --fullbash shiftresnet/sweep_cifar10.sh" in text
    assert "the directory s3/ is not in this checkout" in text
    assert "deepshift/published.csv is missing" in text
    assert "No run has finished yet" in text and "No run has an epoch yet" in text
    assert capsys.readouterr().err == ""


def test_runs_are_in_status_and_published_tables(whole):
    page, _, _ = whole
    assert "3 finished, 0 unfinished" in page and "0 of 2 commands run to the end, 1 short" in page
    (line,) = [row for row in rows_with(page, "e=3c") if row[0] == "ResNet20"]
    assert line[3:7] == ["89.56", "41.00 (short: 2 of 160 epochs)", "0.10", "0.096"]
    (other,) = rows_with(page, "e=1c")
    assert other[3:5] == ["85.78", "not run"]


def test_costs_and_latency_are_in_the_table(whole):
    page, _, progress = whole
    # conv 1x28x28 -> 20x24x24 -> pool -> 50x8x8 -> pool -> 800 -> 500 -> 10, by hand
    macs = 20 * 24 * 24 * 25 + 50 * 8 * 8 * 20 * 25 + 800 * 500 + 500 * 10
    params = 20 * 25 + 20 + 50 * 500 + 50 + 800 * 500 + 500 + 500 * 10 + 10
    bits = 5 * (20 * 25 + 50 * 20 * 25 + 800 * 500 + 500 * 10) + 32 * (20 + 50 + 500 + 10)
    (point,) = rows_with(page, "simple_conv, DeepShift-PS")
    expected = ["41.00", f"{params:,}", f"{macs:,}", "0", f"{macs:,}", f"{bits / 8e3:,.1f}", f"{macs * 0.23e-6:.1f}"]
    assert point[3:10] == expected and float(point[10]) > 0
    assert "Load while latency was measured" in page
    assert any(re.fullmatch(r"deepshift: simple_conv, DeepShift-PS, 5 bits: [\d.]+ ms", line) for line in progress)


def test_data_sets_never_share_a_figure(whole):
    page, folder, _ = whole
    labels = [value for _, name, value in Tags(page).attributes if name == "aria-label" and "accuracy over" in value]
    assert sorted(label.count("41.0%") for label in labels) == [1] * 6 + [2] * 6
    zero = next(label for label in labels if "multiplications" in label and label.count("41.0%") == 2)
    assert "at 0" in zero, "a network without multiplications is on the axis"
    figures = {path.name for path in (folder / "plots").iterdir()}
    stems = ("runs-cifar10-params", "runs-digits-embedded-joules", "curves-deepshift-digits-embedded-0-loss")
    assert figures >= {f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png")}


def test_what_comes_from_runs_is_escaped_and_nothing_is_loaded(whole):
    page, _, _ = whole
    tags = Tags(page)
    assert "<script" not in page and tags.text.count("<script>") >= 3
    for tag, name, value in tags.attributes:
        assert not name.startswith("on") and name != "src"
        if name.endswith("href"):
            assert value.startswith(("#", "plots/")), (tag, value)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page)
    assert "no costs of the network" in tags.text, "a network that does not exist is named"


def test_figures_take_the_pages_colours_and_have_ids_of_their_own(whole):
    page, _, _ = whole
    body = page[page.index("</style>") :]
    assert not re.search("|".join(PALETTE), body) and "var(--c0)" in body and "var(--ink)" in body
    ids = [value for _, name, value in Tags(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value.lstrip("#") for _, name, value in Tags(page).attributes if name == "xlink:href"}
    assert used and used <= set(ids)


def test_partial_and_damaged_runs_are_named(repository, capsys):
    cut = write_run(repository / "runs" / "shiftresnet" / "cut", finished=False) / "metrics.jsonl"
    cut.write_text(cut.read_text() + '{"type": "epo')
    bad = write_run(repository / "runs" / "shiftresnet" / "bad") / "metrics.jsonl"
    bad.write_text("garbage\n" + bad.read_text())
    (repository / "runs" / "shiftresnet" / "train-x.log").write_text("some output\nerror: no space <left>\n")
    text = Tags(write_page(repository)).text
    assert f"{cut}: its last line is cut short" in text
    assert f"{bad} is damaged or not of these papers: its first line describes no run; repeat the run" in text
    assert "0 finished, 1 unfinished" in text and "unfinished: shiftresnet20-cut (2 epochs)" in text
    assert "not succeeded yet: train-x; its log ends with “error: no space <left>”" in text
    assert capsys.readouterr().err == ""


DAMAGES = {
    "header": lambda text: text.replace("epochs", "x", 1),
    "row": lambda text: text + "a,b\n",
    "number": lambda text: text.replace("60.51", "6o.51"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_records_are_one_line(repository, capsys, damage):
    folder = repository / "shiftresnet"
    text = (ROOT / "shiftresnet" / "results.csv").read_text()
    (folder / "results.csv").write_text(damage(text))
    shutil.copytree(ROOT / "shiftresnet" / "logs", folder / "logs")
    (folder / "README.md").write_text(f"{report.START}\nold\n{report.END}\n")
    page = write_page(repository, status=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: shiftresnet/results.csv is damaged: ")
    assert line.endswith("restore it from the repository")
    assert line.removeprefix("error: ") in Tags(page).text
    assert report.main(["--readmes"]) == 1
    assert capsys.readouterr().err.splitlines() == [line]
    new = write_run(repository / "new", versions={}, commit="abc", args={"dataset": "cifar10"})
    assert report.main(["--record", str(new)]) == 1
    assert capsys.readouterr().err.splitlines() == [line]
    assert "old" in (folder / "README.md").read_text() and (folder / "results.csv").read_text() == damage(text)


def test_a_recorded_run_and_its_directory_are_one(repository):
    run = write_run(repository / "runs" / "shiftresnet20_3.0", data="cifar10", versions={"torch": "2"}, commit="abc",
                    args={"dataset": "cifar10"})  # fmt: skip
    report.record(run)
    papers, _, _ = build.read_papers(repository, [repository / "runs"])
    assert (len(papers[0].runs), len(papers[0].recorded), len(papers[0].all_runs)) == (1, 1, 1)
    write_run(repository / "runs" / "another", data="cifar10")
    papers, _, _ = build.read_papers(repository, [repository / "runs"])
    runs = papers[0].all_runs
    assert [(run.name, run.recorded) for run in runs] == [("shiftresnet20_3.0", True), ("shiftresnet20-another", False)]
    assert runs[0].source.is_dir(), "what lies beside a run is found also when it is recorded"


def test_several_seeds_are_told_apart_and_averaged():
    header = {"paper": "shiftresnet", "data": "cifar10", "args": {}, "config": {}, "reproduces": "main.py"}
    length = {"epochs": 2, "epochs_in_paper": 2}
    runs = [records.Run("x", {**header, "seed": seed}, [], {"top1": top1, **length}, Path("x"))
            for seed, top1 in ((1, 40.0), (2, 42.0))]  # fmt: skip
    paper = sections.Paper("shiftresnet", False, runs)
    paper.published = [{"table": "T", "dataset": "cifar10", "model": "m", "method": "", "setting": "", "value": "60",
                        "metric": "top1_error_percent", "command": "python main.py"}]  # fmt: skip
    assert [run.name for run in paper.all_runs] == ["x, seed 1", "x, seed 2"]
    page = sections.tables_of(paper, compare.Measured(print)).text
    (row,) = rows_with(page, "59.00")
    assert row[3:5] == ["60", "59.00 ± 1.41 (n = 2) (full length)"]


def test_mistakes_are_one_line(repository, capsys):
    (repository / "file").touch()
    assert report.main([str(repository), f"--output-dir={repository / 'file'}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("choose another --output-dir\n")
    with pytest.raises(SystemExit) as status:
        report.main(["runs", "--readmes"])
    assert status.value.code == 2


def test_importing_loads_nothing_heavy():
    modules = sorted(f"reporting.{path.stem}" for path in (ROOT / "reporting").glob("*.py"))
    code = (
        f"import importlib, sys\nfor name in {['report', *modules]!r}: importlib.import_module(name)\n"
        "assert not {'torch', 'matplotlib', 'torchvision', 'numba'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


COUNTS = [
    ("shiftresnet", SHIFTRESNET20, ["--arch=shiftresnet20", "--expansion=3", "--flops-rule=true"],
     r"Parameters: \(new\) (\d+).*FLOPs: \(new\) (\d+)"),
    ("shared_bases", {"dataset": "cifar10", "model": "ResNet32_SingleShared", "shared_rank": 8, "unique_rank": 1,
                      "attention": False}, ["--model=ResNet32_SingleShared", "--shared_rank=8"],
     r"Parameters: (\d+).*MACs: (\d+)"),
    ("epsilon_resnet", {"arch": "cifar", "size": 3, "num_classes": 10, "gated": True, "structure": None,
                        "discard_first_block": None}, ["-n", "3"], r"side branch: (\d+).*multiply-adds: (\d+)"),
    ("s3", {"dataset": "imagenet", "arch": "resnet18", "classes": 1000, "method": "s3", "bits": 3},
     ["--arch=resnet18"], r"effective parameters +([\d,]+).*MACs +([\d,]+)"),
]  # fmt: skip


@pytest.mark.parametrize("paper, config, flags, pattern", COUNTS, ids=[row[0] for row in COUNTS])
def test_costs_are_those_that_the_papers_count(paper, config, flags, pattern, capsys):
    module = importlib.import_module(f"{paper}.count")
    module.main(flags)
    printed = [int(text.replace(",", "")) for text in re.search(pattern, capsys.readouterr().out, re.S).groups()]
    counted = costs.count(costs.describe(paper, config))
    assert [counted.params, counted.macs] == printed and not costs.describe(paper, config).is_plain
    assert counted.multiplications + counted.shifts == counted.macs
    if paper == "s3":
        assert 0 < counted.multiplications < counted.shifts and counted.bits < 8 * counted.params


def test_deepshift_costs_are_those_of_its_csv(tmp_path):
    from deepshift import count

    table = tmp_path / "counts.csv"
    count.main(["cifar10", "--arch=resnet20", "--shift-type=Q", f"--csv={table}"])
    with table.open() as file:
        total = list(csv.DictReader(file))[-1]
    row = {"dataset": "CIFAR10", "command": "python cifar10.py --arch resnet20 --shift-depth 1000 --shift-type PS"}
    config = published.CONFIGS["deepshift"](row)
    counted = costs.count(costs.describe("deepshift", config))
    assert [counted.params, counted.macs, counted.shifts, counted.bits] == [
        int(total[name]) for name in ("parameters", "MACs", "shifts", "bits")
    ]


@pytest.mark.parametrize(
    "paper, words, is_plain",
    [("shiftresnet", "--arch=resnet20 ", True), ("deepshift", "mnist.py --type conv", True), ("deepshift", "Q", False),
     ("epsilon_resnet", "imagenetCompressedResnet.py --gpu 0,1,2,3 --data <D> -d 18", True),
     ("epsilon_resnet", "-e 2.0", False), ("shared_bases", "_SingleShared", False)],
)  # fmt: skip
def test_plain_networks_are_told_from_the_method(paper, words, is_plain):
    row = next(row for row in records.read_published(ROOT / paper) if words in row["command"])
    assert costs.describe(paper, published.config_of(paper, row)).is_plain == is_plain


def test_names_of_runs_are_not_formulas(repository):
    write_run(repository / "runs" / "a", args={"arch": "_$x^$"}, finished=False)
    assert "_$x^$-a" in Tags(write_page(repository)).text


def test_energy_is_the_sum_of_its_operations():
    cost = costs.Costs(params=0, macs=3_000_000, multiplications=1_000_000, shifts=2_000_000, bits=0)
    assert cost.microjoules == pytest.approx(1 * (3.7 + 0.9) + 2 * (0.13 + 0.1))


@pytest.mark.parametrize(
    "paper, model, command, top1",
    [
        ("epsilon_resnet", "ResNet-110 (n=18)", "cifarEpsilonResnet.py --gpu 1 -n 18", 94.76),
        ("shared_bases", "ResNet32-S8U1", "--model=ResNet32_SingleShared", 91.92),
        ("deepshift", "Simple Conv", "--shift-type Q", 98.81),
        ("s3", "resnet18", "python main.py /path", 69.83),
    ],
)
def test_published_rows_become_accuracies_of_networks(paper, model, command, top1):
    rows = [row for row in records.read_published(ROOT / paper) if row["model"] == model and command in row["command"]]
    assert rows, "the row is in published.csv"
    found = [round(right, 2) for _, _, right in published.networks(paper, rows)]
    assert top1 in found


@pytest.mark.parametrize(
    "metric, text",
    [("top1", "91.27"), ("top1_error_percent", "8.73"), ("val_error", "0.0873"), ("top5", "99.50"),
     ("top5_error_percent", "0.50"), ("top5_error", "0.0050"), ("hours", "")],
)  # fmt: skip
def test_our_numbers_are_in_the_metrics_own_convention(metric, text):
    run = records.Run("x", {}, [{"test_top5": 99.5}], {"top1": 91.27}, Path("x"))
    assert published.our_number(metric, run) == text
    if published.ACCURACIES.get(metric, [""])[0] == "top1":
        assert published.accuracy({"metric": metric, "value": text}) == pytest.approx(91.27)


def test_a_compressed_network_is_a_point_of_its_own(tmp_path):
    config = {"arch": "cifar", "size": 2, "num_classes": 10, "gated": True, "structure": None,
              "discard_first_block": None}  # fmt: skip
    folder = write_run(tmp_path / "train_log.x", "epsilon_resnet", data="cifar10", config=config)
    fields = {"N": 2, "model": "compressed_model_9.pth", "step": 9, "discarded_block": ["res1.1"],
              "is_cifar_model": True, "discard_first_block": [0, 0, 0], "structure": [1, 2, 2],
              "val_error": [0.25]}  # fmt: skip
    text = "".join(f"{name}: {value}\n" for name, value in fields.items())
    (folder / "compressed_model_9.cfg").write_text(text)
    runs = [records.read_run(folder / "metrics.jsonl")]
    points, problems = compare.points_of_runs(runs, compare.Measured(print), with_latency=False)
    assert problems == [] and [point.top1 for point in points] == [41.0, 75.0]
    saved = points[0].costs.macs - points[1].costs.macs
    assert saved == 2 * 16 * 16 * 9 * 32 * 32, "two 3x3 convolutions of 16 channels at 32x32"
    (folder / "compressed_model_9.cfg").write_text("N: 2\n")
    points, problems = compare.points_of_runs(runs, compare.Measured(print), with_latency=False)
    assert len(points) == 1 and "compressed_model_9.cfg has no model" in problems[0]


def test_records_of_every_paper_are_whole():
    papers, _, damages = build.read_papers(ROOT, [])
    assert damages == []
    assert [paper.name for paper in papers if paper.is_there and not paper.published] == []
