"""What the tests of several papers' loops share: SGD written out, images whose crop can be read off, batch norms."""

import contextlib
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from common.data import ImageSet, TensorLoader


@contextlib.contextmanager
def in_double(training: type, method: str, *loaders):
    """Within it networks and images are float64, so that two ways of one computation agree to many digits.

    In float32 a batch norm over few images turns the rounding of one step into the fifth digit of the next.
    training, method: the class whose `net` becomes float64 when the method begins. loaders: modules that make a
    TensorLoader.
    """
    original = getattr(training, method)

    def doubled(self, *arguments):
        self.net.double()
        return original(self, *arguments)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(training, method, doubled))
        for module in loaders:
            stack.enter_context(mock.patch.object(module, "TensorLoader", partial(TensorLoader, dtype=torch.float64)))
        yield


def sgd_step(parameters, velocities, loss, *, rate, momentum, decay, nesterov=False):
    """One step of SGD as textbooks have it: g = dL/dp + decay * p, v = momentum * v + g, p = p - rate * v.

    velocities: one per parameter, None before the first step. decay: a number, or one for each parameter. Returns the
    new velocities.
    """
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    decays = [decay] * len(parameters) if isinstance(decay, float) else decay
    changed = []
    with torch.no_grad():
        for p, gradient, v, weight in zip(parameters, gradients, velocities, decays, strict=True):
            g = weight * p if gradient is None else gradient + weight * p
            v = g.clone() if v is None else momentum * v + g
            p -= rate * (g + momentum * v if nesterov else v)
            changed.append(v)
    return changed


def norm_each_image(net: nn.Module):
    """Put a norm over each image for every batch norm, so that an image's gradient knows nothing of its batch."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))


def check_batch_norms(net: nn.Module, images):
    """One batch in training mode: each batch norm has momentum 0.1, eps 1e-5, scales 1 and shifts 0 at the start."""
    seen = []

    def look(norm, inputs, output):
        x = inputs[0].transpose(0, 1).flatten(1).double()
        mean, variance = x.mean(1), x.var(1)
        biased = (variance * (x.shape[1] - 1) / x.shape[1])[:, None]
        expected = (x - mean[:, None]) / (biased + 1e-5).sqrt()
        torch.testing.assert_close(output.transpose(0, 1).flatten(1).double(), expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * variance, atol=1e-5, rtol=1e-4)
        assert (norm.momentum, norm.eps) == (0.1, 1e-5)
        seen.append(norm)

    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(look) for norm in norms]
    with torch.no_grad():
        net.train()(images)
    for hook in hooks:
        hook.remove()
    assert norms and len(seen) == len(norms) == len(set(seen))


def check_uniform(weight, bound):
    """Whether values may be drawn from uniform(-bound, bound): PyTorch's initial weights, bound 1/sqrt(fan_in)."""
    values = weight.detach().flatten()
    assert values.abs().max() <= bound * (1 + 1e-6)
    slack = 4 / len(values) ** 0.5
    assert abs(values.std().item() * 3**0.5 / bound - 1) < slack and abs(values.mean().item()) < slack * bound


def coded_set(count: int) -> ImageSet:
    """Images that say where each pixel comes from: red is the row + 1, green the column + 1, blue 200.

    Targets are the images' numbers.
    """
    rows, columns = torch.meshgrid(torch.arange(1, 33), torch.arange(1, 33), indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 200)]).to(torch.uint8)
    return ImageSet(image.repeat(count, 1, 1, 1), torch.arange(count), ["0"], "coded")


def pixels_of(images, scale, shift):
    """The bytes that were normalised to images = (byte - shift) / scale, which must come out whole."""
    values = images.double() * scale + shift
    assert (values - values.round()).abs().max() < 0.01, "not these constants"
    return values.round()


def by_channel(mean, std):
    """scale and shift of `pixels_of` for torchvision's ToTensor and Normalize(mean, std)."""
    return [255 * torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (std, mean)]


def crops_of(pixels, pad: int):
    """(top, left, flipped) of the crops of coded images that were padded with black; checks every pixel."""
    found, source = [], F.pad(coded_set(1).images[0].double(), (pad,) * 4)
    for image in pixels:
        flipped = bool(image[1, 16, 12] > image[1, 16, 20])
        image = image.flip(2) if flipped else image
        top, left = (int(image[axis, 16, 16]) - 17 + pad for axis in (0, 1))
        assert torch.equal(image, source[:, top : top + 32, left : left + 32])
        found.append((top, left, flipped))
    return found


def check_crops(pixels, pad: int, offsets: int):
    """Every offset 0 .. offsets - 1 is drawn on both axes, about half of the images are flipped."""
    crops = crops_of(pixels, pad)
    assert len(crops) >= 200
    for axis in (0, 1):
        assert {crop[axis] for crop in crops} == set(range(offsets))
    assert 0.35 < sum(flipped for *_, flipped in crops) / len(crops) < 0.65


def differences(first, second, ignored=(), where="state") -> list[str]:
    """Where two nested states differ in a bit, in words; keys in `ignored` are left out."""
    if isinstance(first, dict):
        if not isinstance(second, dict) or list(first) != list(second):
            return [f"{where}: other keys"]
        parts = [(first[key], second[key], key) for key in first if key not in ignored]
    elif isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{where}: other lengths"]
        parts = [(a, b, index) for index, (a, b) in enumerate(zip(first, second, strict=True))]
    elif isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [where]
    else:
        return [] if first == second else [f"{where}: {first!r}, {second!r}"]
    return [text for a, b, key in parts for text in differences(a, b, ignored, f"{where}[{key!r}]")]
