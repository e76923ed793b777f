"""The data pipeline: 50,000 images of 3x32x32, mirrored with probability 1/2, in batches of 128."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.paired import Row, in_turns
from benchmarks.small_unets import RandomPictures

NUM, BATCH = 50_000, 128
FEW = 4_000  # what the slow pipeline is timed on


class PictureByPicture(Dataset):
    """Images one by one through torchvision's transforms, as CIFAR-10 is usually read."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        steps = [transforms.ToPILImage(), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


def pipeline(rounds: int) -> list[Row]:
    """Against a plain loop of gathers with a flip on each batch, and against torchvision's per-image pipeline."""
    data = RandomPictures(NUM, BATCH)
    images = data.splits["train"][:NUM].contiguous()
    loader, epoch = data.train_dataloader(), 0

    def ours(batches: int) -> Callable[[], None]:
        def walk() -> None:
            nonlocal epoch
            loader.sampler.set_epoch(epoch)
            epoch += 1
            for _, _ in zip(range(batches), loader, strict=False):
                pass

        return walk

    def gathers() -> None:
        order = torch.randperm(NUM)
        for indices in order[: NUM - NUM % BATCH].split(BATCH):
            batch = images.index_select(0, indices)
            mirrored = (torch.rand(BATCH) < 0.5).nonzero().flatten()
            batch.index_copy_(0, mirrored, batch.index_select(0, mirrored).flip(-1))

    slow = DataLoader(PictureByPicture(images[:FEW]), BATCH, shuffle=True, drop_last=True)
    text = "{ours} and {theirs} µs an image"
    name = "data pipeline, 50,000 images of 3x32x32 with flips"
    rows = []
    for against, theirs, batches, target in (
        ("plain loop of gathers", gathers, NUM // BATCH, 0.9),
        ("torchvision, image by image", lambda: [None for _ in slow], FEW // BATCH, 15),
    ):
        pairs = in_turns(ours(batches), theirs, rounds)
        rows.append(pairs.row(name, against, target, False, text, work=1e3 / (batches * BATCH)))
    return rows
