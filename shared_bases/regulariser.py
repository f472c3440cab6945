"""How far basis filters are from orthonormal: the term that training adds to the loss  (arXiv 2006.05066, Sec. 3.2).

With the filters of a group as rows of B, E = (B B^T - I) squared element by element, diagonal included:

    loss = cross_entropy + lambdaR * R,    R = (sum over groups of E's sum) / (sum over groups of E's size)

One division after both sums, so that wide groups weigh more. Everything is computed from Gram matrices.
"""

import torch
from torch import Tensor, nn


def rows(*weights: Tensor) -> Tensor:
    """Convolution weights (n_i, C, kH, kW) as one matrix (sum n_i, C * kH * kW), a filter per row."""
    return torch.cat([weight.flatten(1) for weight in weights])


def gram_error(matrix: Tensor) -> Tensor:
    """Sum of (B B^T - I)^2 for B (n, d). With more rows than columns the smaller Gram matrix gives the same:

    |B B^T - I_n|^2 = |B^T B - I_d|^2 + n - d.
    """
    count, length = matrix.shape
    if count > length:
        return gram_error(matrix.T) + (count - length)
    gram = matrix @ matrix.T
    return (gram - torch.eye(count, dtype=gram.dtype, device=gram.device)).square().sum()


def groups_of_bases(model: nn.Module) -> list[list[nn.Conv2d]]:
    """The shared convolutions of a network by group: [[basis], …], or [[first, second], …]; [] if it has none."""
    groups = {}
    for name, module in model.named_children():
        if name.startswith("shared_basis_"):
            groups.setdefault(name.split("_")[2], []).append(module)
    return list(groups.values())


def own_bases(model: nn.Module) -> list[list[nn.Conv2d]]:
    """The own basis convolutions of a CIFAR-10 or ResNet34 network by group, in the order of the layers."""
    groups = [module for name, module in model.named_children() if name.startswith("layer")]
    return [[m for name, m in group.named_modules() if "basis_conv" in name] for group in groups]


def _mean(parts: list[tuple[Tensor, int]]) -> Tensor:
    return sum(error for error, _ in parts) / sum(count for _, count in parts)


def _shared_only(model: nn.Module) -> list[Tensor]:
    parts = []
    for bases in groups_of_bases(model):
        matrix = rows(*(basis.weight for basis in bases))
        parts.append((gram_error(matrix), len(matrix) ** 2))
    return [_mean(parts)]


def _separate(model: nn.Module) -> list[Tensor]:
    return [
        _mean([(gram_error(rows(basis.weight)), basis.out_channels**2) for basis in bases])
        for bases in zip(*groups_of_bases(model), strict=True)
    ]


def _with_unique(model: nn.Module) -> list[Tensor]:
    """Shared rows against all rows of the group, and each own basis against itself."""
    parts = []
    for bases, own in zip(groups_of_bases(model), own_bases(model), strict=True):
        shared = rows(*(basis.weight for basis in bases))
        unique = torch.stack([basis.weight.flatten(1) for basis in own])  # (convolutions, u, d)
        cross = shared @ unique.flatten(0, 1).T
        gram = unique @ unique.transpose(1, 2)
        within = gram - torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        error = gram_error(shared) + cross.square().sum() + within.square().sum()
        parts.append((error, len(shared) * (len(shared) + cross.shape[1]) + within.numel()))
    return [_mean(parts)]


# What each of the original's training functions adds. "single" and "double" differ in the model only: all shared rows
# of a group form one matrix, whether they are one basis or two.
TERMS = {
    "single": _shared_only,
    "double": _shared_only,
    "separate": _separate,
    "single_with_unique": _with_unique,
    "double_with_unique": _with_unique,
}


def similarity_terms(model: nn.Module, kind: str | None) -> list[Tensor]:
    """The terms R of a network, each a scalar with gradient: two for "separate", none for kind None, else one.

    kind: Entry.similarity of the model. The loss adds lambdaR times their sum.
    """
    return [] if kind is None else TERMS[kind](model)


@torch.no_grad()
def mean_abs_cosine(matrix: Tensor) -> float:
    """Mean absolute cosine between different rows of (n, d), 0 for orthogonal rows; 0.0 for fewer than two rows."""
    count = len(matrix)
    if count < 2:
        return 0.0
    unit = nn.functional.normalize(matrix.double(), dim=1)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0)
    return float(cosines.sum() / (count * (count - 1)))


@torch.no_grad()
def mean_similarity(model: nn.Module) -> float | None:
    """Mean over groups of the mean absolute cosine between the group's shared filters; None without shared filters.

    Bases whose filters have different lengths (ResNet50_Shared, MobileNetV2_SharedDouble) count as groups of their own.
    """
    values = [mean_abs_cosine(matrix) for matrix in basis_matrices(model)]
    return sum(values) / len(values) if values else None


def basis_matrices(model: nn.Module) -> list[Tensor]:
    """The shared filters of each group as rows; bases of other filter lengths as matrices of their own."""
    matrices = []
    for bases in groups_of_bases(model):
        by_length = {}
        for basis in bases:
            by_length.setdefault(basis.weight[0].numel(), []).append(basis.weight.detach())
        matrices += [rows(*weights) for weights in by_length.values()]
    return matrices
