"""The orthogonality term against a direct evaluation of its definition, entry by entry."""

import pytest
import torch

from shared_bases.models import Config, build_model
from shared_bases.regulariser import gram_error, mean_abs_cosine, mean_similarity, rows, similarity_terms


def entries(matrix):
    """Squared entries of B B^T - I, by loops over pairs of rows."""
    error = torch.empty(len(matrix), len(matrix), dtype=torch.float64)
    for i, first in enumerate(matrix.double()):
        for j, second in enumerate(matrix.double()):
            error[i, j] = (first @ second - float(i == j)) ** 2
    return error


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7), (1, 3)])
def test_gram_error_is_the_sum_over_pairs(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gram_error(matrix).item() == pytest.approx(entries(matrix.detach()).sum().item(), rel=1e-12)
    assert torch.autograd.gradcheck(gram_error, matrix)


def test_gram_error_vanishes_for_orthonormal_rows_only():
    basis = torch.nn.init.orthogonal_(torch.empty(8, 20))
    assert gram_error(basis).item() < 1e-11
    assert gram_error(2 * basis).item() == pytest.approx(8 * 9, rel=1e-5)


@pytest.mark.parametrize("key", ["ResNet32_SingleShared", "ResNet32_DoubleShared"])
def test_with_unique_filters(key):
    """Shared rows against all rows once, and each own basis against itself; not own bases against each other."""
    torch.manual_seed(1)
    config = Config("cifar10", key, 2, 2)
    model = build_model(config)
    error = size = 0
    for group, layer in enumerate((model.layer1, model.layer2, model.layer3), 1):
        names = [f"shared_basis_{group}"] if "Single" in key else [f"shared_basis_{group}_{i}" for i in (1, 2)]
        shared = rows(*(getattr(model, name).weight for name in names)).detach()
        own = [conv.weight.detach() for block in layer[1:] for conv in (block.basis_conv1, block.basis_conv2)]
        everything = entries(torch.cat([shared, rows(*own)]))
        count, rank = len(shared), len(own[0])
        error += everything[:count].sum()
        for index in range(len(own)):
            start = count + index * rank
            error += everything[start : start + rank, start : start + rank].sum()
        size += count * len(everything) + len(own) * rank**2
    (term,) = similarity_terms(model, config.entry.similarity)
    assert term.item() == pytest.approx((error / size).item(), rel=1e-5)


def test_one_average_over_all_groups_not_a_mean_of_means():
    torch.manual_seed(1)
    config = Config("cifar10", "ResNet32_SharedOnly", 2)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    groups = [
        entries(rows(*(getattr(model, f"shared_basis_{g}_{i}").weight.detach() for i in (1, 2)))) for g in (1, 2, 3)
    ]
    (term,) = similarity_terms(model, config.entry.similarity)
    expected = sum(group.sum() for group in groups) / sum(group.numel() for group in groups)
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)
    assert term.item() != pytest.approx(sum(group.mean() for group in groups).item() / 3, rel=1e-2)


def test_separate_terms_of_mobilenet_with_more_rows_than_columns():
    torch.manual_seed(2)
    config = Config("cifar100", "MobileNetV2_SharedDouble")
    terms = [term.item() for term in similarity_terms(build_model(config), config.entry.similarity)]
    assert terms == pytest.approx([0.0016, 0.0041], rel=0.1)


def test_mean_abs_cosine():
    assert mean_abs_cosine(torch.tensor([[1.0, 0.0], [0.0, 3.0]])) == 0
    assert mean_abs_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(1)
    assert mean_abs_cosine(torch.ones(1, 3)) == 0
    model = build_model(Config("cifar10", "ResNet32_DoubleShared", 4, 1))
    assert mean_similarity(model) < 1e-6
    assert mean_similarity(build_model(Config("cifar10", "ResNet20"))) is None
