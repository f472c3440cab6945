"""Which images a process sees at each step, and the random numbers of an epoch: the same rules for every loader."""

import hashlib

import torch


def seeded_generator(*key: int) -> torch.Generator:
    """CPU generator that depends on the integers of `key` only, e.g. (seed, epoch).

    Hashed, because neighbouring keys must not meet: seed + epoch of one run is seed + epoch of another.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def global_batches(num_images: int, batch_size: int, world_size: int) -> list[tuple[int, int]]:
    """Bounds (start, stop) of every step's batch over all processes, in the epoch's order; no image is dropped.

    A last batch of fewer images than processes joins the one before: every process has the same number of steps.
    Raises ValueError if a batch, or the whole set, has fewer images than there are processes.
    """
    if batch_size < world_size:
        raise ValueError(f"batch size {batch_size} is smaller than the number of processes ({world_size})")
    if num_images < world_size:
        raise ValueError(f"{num_images} images cannot be shared by {world_size} processes")
    starts = list(range(0, num_images, batch_size))
    if num_images - starts[-1] < world_size:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_images], strict=True))


def shard(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part of a batch that belongs to `rank`; sizes differ by one image at most."""
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


class StagedDraws:
    """The random numbers of an epoch in tensors that stay where they are, and on the device the place reached in them.

    A CUDA graph reads the same addresses at every replay, so both must be fixed and the place must be counted by the
    device itself.
    """

    def __init__(self, device):
        self.device, self.draws = torch.device(device), []
        self.place = torch.zeros((), dtype=torch.int64, device=self.device)

    def fill(self, draws):
        """Tensors of one length, or None, which stay None; in the same shapes at each call. Begin at the first."""
        if [None if draw is None else draw.shape for draw in draws] != [
            None if draw is None else draw.shape for draw in self.draws
        ]:
            self.draws = [None if draw is None else draw.to(self.device, copy=True) for draw in draws]
        else:
            for mine, new in zip(self.draws, draws, strict=True):
                if mine is not None:
                    mine.copy_(new)
        self.place.zero_()

    def take(self, count: int) -> list[torch.Tensor | None]:
        """The next `count` of each."""
        places = torch.arange(count, device=self.device) + self.place
        taken = [None if draw is None else draw.index_select(0, places) for draw in self.draws]
        self.place += count
        return taken


class ShardedLoader:
    """The part of a loader that knows no images: steps, this process's share of each, and the epoch.

    num_images: per epoch, over all processes. batch_sizes: of each step, over all processes:
    the weight of a step in a mean over the epoch.
    """

    def __init__(self, num_images: int, batch_size: int, *, seed: int, rank: int, world_size: int):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes does not exist")
        batches = global_batches(num_images, batch_size, world_size)
        self.num_images, self.seed, self.epoch = num_images, seed, 0
        self.batch_sizes = [stop - start for start, stop in batches]
        self.shards = [shard(start, stop, rank, world_size) for start, stop in batches]

    def __len__(self) -> int:
        return len(self.shards)

    def set_epoch(self, epoch: int) -> None:
        """The epoch, from 0, that the next iteration gives."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """What, together with the constructor's arguments, determines every batch."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the seed and the epoch of another loader's state_dict()."""
        self.seed, self.epoch = state["seed"], state["epoch"]
