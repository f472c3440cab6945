"""What a script's loaders do to images, seen from outside: the constants stand in the tests of the papers.

Two dots on black, the left one brighter, tell of a training image where it was moved and whether it was mirrored.
"""

import torch

from common.data import ImageSet
from common.data.sharding import seeded_generator

LEFT, RIGHT, BRIGHT, DIM = 10, 17, 255, 128


def dotted_images(channels, size, count=400):
    """Image i has target i; its dots are in the middle row."""
    images = torch.zeros(count, channels, size, size, dtype=torch.uint8)
    images[:, :, size // 2, LEFT], images[:, :, size // 2, RIGHT] = BRIGHT, DIM
    return ImageSet(images, torch.arange(count), [str(i) for i in range(count)], "dots")


def random_set(channels, size, count=20):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count), [str(i) for i in range(count)], "random")


def normalised(images, mean, std):
    """uint8 images as ToTensor and Normalize make them, in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    return (images.double() / 255 - mean) / std


def check_test_loader(loader, images, batch_size, mean, std):
    """Every image once, in order, as it is."""
    assert loader.batch_sizes[0] == batch_size and sum(loader.batch_sizes) == len(images)
    found, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(targets, torch.arange(len(images)))
    assert (found - normalised(images, mean, std)).abs().max() < 1e-5


def check_training_loader(loader, batch_size, mean, std, *, pad, flip):
    """Dotted images shuffled, moved by up to `pad` in each direction, mirrored half of the time if at all."""
    assert loader.batch_sizes[0] == batch_size
    loader.set_epoch(0)
    found, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    count, channels, size, _ = found.shape
    assert not torch.equal(targets, torch.arange(count)) and torch.equal(targets.sort().values, torch.arange(count))
    std_, mean_ = (torch.tensor(values)[:, None, None] for values in (std, mean))
    levels = (found * std_ + mean_) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    levels = levels.round()
    assert set(levels.unique().tolist()) == {0.0, DIM, BRIGHT}, "the border is black too"
    assert (levels == levels[:, :1]).all()
    assert levels.sum((1, 2, 3)).tolist() == [channels * (DIM + BRIGHT)] * count
    bright, dim = ((levels[:, 0] == level).flatten(1).int().argmax(1) for level in (BRIGHT, DIM))
    mirrored = bright > dim
    columns = torch.where(mirrored, size - 1 - bright % size, bright % size)
    assert sorted(set((bright // size - size // 2).tolist())) == list(range(-pad, pad + 1))
    assert sorted(set((columns - LEFT).tolist())) == list(range(-pad, pad + 1))
    share = mirrored.float().mean().item()
    assert 0.4 < share < 0.6 if flip else share == 0


def write_folder(root):
    """train/ and val/ of two classes, two images of 300x260 pixels each."""
    from PIL import Image

    generator = torch.Generator().manual_seed(2)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                coarse = torch.randint(256, (26, 30, 3), dtype=torch.uint8, generator=generator)
                pixels = coarse.repeat_interleave(10, 0).repeat_interleave(10, 1)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{number}.png")
    return root


def images_of(root, split):
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in sorted((root / split).glob("*/*.png"))]


def check_folder_loaders(root, train, test, batch_size, mean, std, seed):
    """ImageNet's transforms, of torchvision, by the original's numbers."""
    from torchvision import transforms

    last = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    whole = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *last])
    part = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *last])
    found, targets = (torch.cat(parts) for parts in zip(*test, strict=True))
    assert targets.tolist() == [0, 0, 1, 1] and test.batch_sizes == train.batch_sizes == [batch_size, 4 - batch_size]
    expected = torch.stack([whole(image) for image in images_of(root, "val")])
    assert (found - expected).abs().max() < 1e-5
    train.set_epoch(3)
    found, targets = (torch.cat(parts) for parts in zip(*train, strict=True))
    order = torch.randperm(4, generator=seeded_generator(seed, 3)).tolist()
    assert targets.tolist() == [index // 2 for index in order]
    images, expected = images_of(root, "train"), []
    for index in order:
        torch.set_rng_state(seeded_generator(seed, 3, index).get_state())
        expected.append(part(images[index]))
    assert (found - torch.stack(expected)).abs().max() < 1e-5
