"""Every golden case of shared filter bases: outputs recorded from the original code ($GOLDEN_DIR/shared_bases.json)."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch

from shared_bases.count import count_macs, count_parameters, count_ptflops
from shared_bases.models import Config, build_model
from shared_bases.regulariser import similarity_terms
from tests.golden.fill import fill_state_dict, golden_input

GOLDEN = json.loads((Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent)) / "shared_bases.json").read_text())
RELATIVE_TOLERANCE = 1e-4  # of the largest logit; float32 against float64 differs by at most 6e-6 on these cases
# The training function that the original calls for each kind of similarity term.
TRAIN_FUNCTIONS = {
    "single": ("train_basis", "train_basis_single"),
    "double": ("train_basis_double", "train_basis_sharedonly"),
    "separate": ("train_basis_double_separate",),
    "single_with_unique": ("train_basis_single",),
    "double_with_unique": ("train_basis_double",),
}
FIELDS = {
    "case", "dataset", "arch", "kwargs", "input_shape", "params", "flops", "ptflops", "macs", "flops_input", "n_keys",
    "keys_crc32", "keys", "logits", "float32_vs_float64_max_rel", "shared_value_taken_from", "regulariser",
}  # fmt: skip


def test_every_section_is_checked():
    assert set(GOLDEN) == {"paper", "note", "cases"}
    for case in GOLDEN["cases"]:
        assert set(case) <= FIELDS, case["case"]


@pytest.mark.parametrize("case", [pytest.param(case, id=case["case"]) for case in GOLDEN["cases"]])
def test_model(case):
    config = Config(case["dataset"], case["arch"], **case["kwargs"])
    with torch.device("meta"):  # the weights come from the filler: no need to initialise any
        model = build_model(config).eval()
    check_names(case, model)
    check_counts(case, model)
    if case["logits"] is None:  # they overflow
        return
    model.to_empty(device="cpu").load_state_dict(fill_state_dict(model.state_dict()))
    state = model.state_dict()
    for name, source in case.get("shared_value_taken_from", {}).items():
        assert torch.equal(state[name], fill_state_dict({source: state[source]})[source])
    with torch.no_grad():
        logits = model(golden_input(case["input_shape"])).double()
    expected = torch.tensor(case["logits"], dtype=torch.float64)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < RELATIVE_TOLERANCE * expected.abs().max()
    check_regulariser(case, model, config.entry.similarity)


def check_names(case, model):
    shapes = [[name, list(value.shape)] for name, value in model.state_dict().items()]
    assert len(shapes) == case["n_keys"]
    assert zlib.crc32("\n".join(f"{name} {shape}" for name, shape in shapes).encode()) == case["keys_crc32"]
    if "keys" in case:
        assert shapes == case["keys"]


def check_counts(case, model):
    size = case["flops_input"][-1]
    assert case["flops_input"] == [1, 3, size, size]
    assert count_parameters(model) == case["params"]
    assert count_macs(model, size) == case["macs"]
    assert count_ptflops(model, size) == case["ptflops"]
    assert case["flops"] == 2 * case["ptflops"]


def check_regulariser(case, model, kind):
    expected = case.get("regulariser")
    if expected is None:
        assert kind is None
        return
    assert expected["train_function"] in TRAIN_FUNCTIONS[kind]
    terms = [term.item() for term in similarity_terms(model, kind)]
    assert terms == pytest.approx(expected["terms"], rel=1e-5)
    assert expected["lambdaR"] * sum(terms) == pytest.approx(expected["penalty"], rel=1e-5)
