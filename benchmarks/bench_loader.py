"""How many training images per second reach the model: TensorLoader against DataLoader with torchvision's transforms.

    python benchmarks/bench_loader.py --data-dir ./data

Both crop (padding 4), flip and normalise CIFAR-10's 50,000 training images, or random ones of that shape where CIFAR-10
is absent. DataLoader gets PIL images from memory, so neither reads a file. Rounds alternate between the loaders, and
the median counts; compilation and the start of DataLoader's worker processes are not in it.
Expected: at least 100,000 images/s on 2 cores, and at least 10 times DataLoader with 2 workers.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import timing
from common.data import DataError, ImageSet, TensorLoader, load_dataset

BATCH_SIZE, PAD = 128, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
RESULTS = Path(__file__).resolve().parent / "results" / "bench_loader.csv"


class PilImages(Dataset):
    """The usual CIFAR-10 data set: a PIL image made from an array in memory, then torchvision's transforms."""

    def __init__(self, image_set: ImageSet):
        from torchvision import transforms

        self.images = image_set.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = image_set.targets.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(image_set.images.shape[-1], padding=PAD),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="./data", help="where CIFAR-10 may be; nothing is downloaded (./data)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each loader (5)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of DataLoader (2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file that is written (%(default)s)")
    return parser


def load_images(data_dir):
    """CIFAR-10's training set and a word for it, or random images of the same shape."""
    try:
        return load_dataset("cifar10", data_dir, split="train", download=False), "cifar10"
    except DataError as error:
        print(f"{error}\nrandom images instead", file=sys.stderr)
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(50_000) % 10, [str(label) for label in range(10)], "random"), "random"


def build_loaders(image_set, workers):
    """Loaders by name. DataLoader gets a fifth of the images: a round of it is long enough with those."""
    common = {"train": True, "mean": MEAN, "std": STD, "pad": PAD, "flip": True}
    loaders = {"TensorLoader, PyTorch only": TensorLoader(image_set, BATCH_SIZE, backend="torch", **common)}
    try:
        import numba  # noqa: F401

        loaders["TensorLoader"] = TensorLoader(image_set, BATCH_SIZE, backend="numba", **common)
    except ImportError:
        print("numba cannot be imported: its path is not measured", file=sys.stderr)
    if torch.cuda.is_available():
        loaders["TensorLoader, cuda"] = TensorLoader(image_set, BATCH_SIZE, device="cuda", **common)
    part = PilImages(image_set.subset(len(image_set) // 5))
    loaders[f"DataLoader({workers} workers)"] = DataLoader(
        part, BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return loaders


def images_per_second(loader):
    """One epoch, batches thrown away."""
    start, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def measure(loaders, rounds):
    """Images per second of each loader, by round; a first one, for compilation and start-up, is dropped."""
    speeds = {name: [] for name in loaders}
    for _ in range(rounds + 1):
        for name, loader in loaders.items():
            speeds[name].append(images_per_second(loader))
    return {name: values[1:] for name, values in speeds.items()}


def hardware():
    """The processor with its cores and threads, and the GPU if there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{timing.hardware(torch.device('cpu'))}, {os.cpu_count()} cores{gpu}"


def versions():
    import torchvision

    return f"{timing.versions()}, torchvision {torchvision.__version__}"


def write_csv(path, speeds, baseline, source):
    fixed = {"batch_size": BATCH_SIZE, "data": source, "hardware": hardware(), "versions": versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = None
        for name, values in speeds.items():
            median = statistics.median(values)
            row = {"loader": name, "images_per_second": round(median), "lowest": round(min(values))}
            row |= {"highest": round(max(values)), "rounds": len(values), "ratio": f"{median / baseline:.2f}", **fixed}
            if writer is None:
                writer = csv.DictWriter(file, row, lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)


def main(argv=None):
    args = build_parser().parse_args(argv)
    image_set, source = load_images(args.data_dir)
    speeds = measure(build_loaders(image_set, args.workers), args.rounds)
    reference = f"DataLoader({args.workers} workers)"
    baseline = statistics.median(speeds[reference])
    print(f"{source}, {len(image_set):,} images, batch {BATCH_SIZE}; {hardware()}; {versions()}")
    for name, values in speeds.items():
        print(f"{name:28}{statistics.median(values):12,.0f} images/s  ({min(values):,.0f} to {max(values):,.0f})")
    for name, values in speeds.items():
        if name != reference:
            print(f"{name} / {reference}: ratio {statistics.median(values) / baseline:.2f}x")
    write_csv(args.output, speeds, baseline, source)


if __name__ == "__main__":
    main()
