"""The table of layers that the scripts print and write to model_summary.txt."""

import copy

import torch
from torch import nn

from deepshift.convert import PS_LAYERS, Q_LAYERS

FLOAT_BITS = 32
CONTAINERS = (nn.Sequential, nn.ModuleList)


def layer_size(module: nn.Module) -> tuple[int, int, bool]:
    """(numbers, bits, trainable) of one layer's own weights, bias and running statistics.

    As in the original PS layers count `shift` and not `sign`; unlike it, the weights of PS and Q layers take the bits
    that they are trained for (there 5 and 32).
    """
    numbers, bits, trainable = 0, 0, False
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if name in ("sign", "num_batches_tracked"):
            continue
        is_weight = name in ("weight", "shift") and isinstance(module, (*PS_LAYERS, *Q_LAYERS))
        numbers += tensor.numel()
        bits += tensor.numel() * (module.weight_bits if is_weight else FLOAT_BITS)
        trainable |= name in ("weight", "shift") and tensor.requires_grad
    return numbers, bits, trainable


def summarise(model: nn.Module, input_shape: tuple[int, int, int]) -> str:
    """Layers with their output shapes and sizes, and totals in MB, for one image of input_shape (C, H, W)."""
    shadow, rows = copy.deepcopy(model).to("meta").eval(), []

    def hook(module, inputs, output):
        shape = list(output.shape) if isinstance(output, torch.Tensor) else []
        rows.append((type(module).__name__, [-1, *shape[1:]], *layer_size(module)))

    for module in shadow.modules():
        if not isinstance(module, CONTAINERS) and module is not shadow:
            module.register_forward_hook(hook)
    with torch.no_grad():
        shadow(torch.empty(1, *input_shape, device="meta"))
    rule, double = "-" * 64, "=" * 64
    lines = [rule, f"{'Layer (type)':>20}  {'Output Shape':>25} {'Param #':>15}", double]
    for number, (name, shape, numbers, _, _) in enumerate(rows, 1):
        lines.append(f"{name + '-' + str(number):>20}  {str(shape):>25} {numbers:>15,}")
    total, trainable = sum(row[2] for row in rows), sum(row[2] for row in rows if row[4])
    outputs = sum(torch.Size(row[1][1:]).numel() for row in rows)
    bits = [FLOAT_BITS * torch.Size(input_shape).numel(), 2 * FLOAT_BITS * outputs, sum(row[3] for row in rows)]
    sizes = [number / 8 / 2**20 for number in bits]
    lines += [double, f"Total params: {total:,}", f"Trainable params: {trainable:,}",
              f"Non-trainable params: {total - trainable:,}", rule]  # fmt: skip
    for title, size in zip(("Input", "Forward/backward pass", "Params", "Estimated Total"), [*sizes, sum(sizes)],
                           strict=True):  # fmt: skip
        lines.append(f"{title} {'Size' if title.startswith('Estimated') else 'size'} (MB): {size:.2f}")
    return "\n".join([*lines, rule])
