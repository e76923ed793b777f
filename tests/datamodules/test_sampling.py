"""The ranks' rows are the one-rank batches, cut."""

import pytest
import torch

from datamodules import DynamicBinarization, GlobalBatchSampler
from datamodules.base import ImageBatches
from losses.draws import Rows, seeded


def make(num=50, batch_size=12, train=True, rank=0, world_size=1, seed=0, epoch=0, mirror=False):
    sampler = GlobalBatchSampler(num, batch_size, train, train, seed, rank, world_size, mirror)
    sampler.set_epoch(epoch)
    return sampler


def order(sampler):
    return torch.cat([record.indices for record in sampler])


def test_each_epoch_is_another_permutation_and_repeats_by_seed():
    orders = [order(make(48, epoch=epoch)) for epoch in range(3)]
    for one in orders:
        assert one.sort().values.tolist() == list(range(48))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])
    assert torch.equal(order(make(48, epoch=1)), orders[1])
    assert not torch.equal(order(make(48, seed=1)), orders[0])


def test_evaluation_goes_through_in_order_whatever_the_epoch():
    assert order(make(train=False, epoch=3)).tolist() == list(range(50))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num", [48, 49, 50, 51, 55])
def test_uneven_evaluation_counts_every_image_once(num, world_size):
    samplers = [make(num, train=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = torch.cat([order(sampler) for sampler in samplers])
    assert seen.sort().values.tolist() == list(range(num))
    for sampler in samplers:
        records = list(sampler)
        assert len(records) == len(sampler)
        assert all(len(record.indices) > 0 for record in records)
        assert [record.rows for record in records] == [sampler.rows(i) for i in range(len(sampler))]
        assert all(record.rows.stop - record.rows.start == len(record.indices) for record in records)


def test_rows_known_answers():
    rows = [make(50, train=False, rank=rank, world_size=3).rows(batch) for batch in (0, 4) for rank in range(3)]
    assert rows == [Rows(0, 4, 12), Rows(4, 8, 12), Rows(8, 12, 12), Rows(0, 1, 2), Rows(1, 2, 2), Rows(2, 2, 2)]
    assert [len(make(50, train=False, rank=rank, world_size=3)) for rank in range(3)] == [5, 5, 4]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_reassemble_the_batches_of_one_rank(world_size, train):
    images = torch.randint(256, (50, 1, 4, 4), dtype=torch.uint8)
    both = torch.cat([images, images.flip(-1)])
    batches = ImageBatches(both, DynamicBinarization() if train else None)
    expected = [batches[record] for record in make(train=train, epoch=2, mirror=train)]
    ranks = [
        [batches[record] for record in make(train=train, epoch=2, rank=rank, world_size=world_size, mirror=train)]
        for rank in range(world_size)
    ]
    together = [torch.cat([rank[i] for rank in ranks if i < len(rank)]) for i in range(len(expected))]
    assert all(torch.equal(one, all_ranks) for one, all_ranks in zip(expected, together, strict=True))


def test_flip_mirrors_half_of_the_images_and_redraws_each_epoch():
    images = torch.arange(400, dtype=torch.uint8).view(100, 1, 1, 4)
    batches = ImageBatches(torch.cat([images, images.flip(-1)]))
    flips = []
    for epoch in range(2):
        (record,) = make(100, 100, epoch=epoch, mirror=True)
        batch, originals = batches[record], images[record.indices % 100]
        flipped = (batch == originals.flip(-1)).flatten(1).all(1)
        assert torch.equal(batch[~flipped], originals[~flipped])
        assert 30 < flipped.sum() < 70
        flips.append(flipped[(record.indices % 100).argsort()])
    assert not torch.equal(*flips)


def test_keys_give_independent_repeatable_generators():
    keys = [(0, 0, 1, "flip"), (0, 1, 0, "flip"), (1, 0, 0, "flip"), (0, 0, 1, "binarization"), (0, 0, 1, "flip")]
    first = [torch.randint(2**62, (), generator=seeded(*key)).item() for key in keys]
    assert first[0] == first[-1]
    assert len(set(first)) == 4


def test_refusals():
    with pytest.raises(ValueError, match=r"data.batch_size=0: give an integer of at least 1"):
        make(batch_size=0)
    with pytest.raises(ValueError, match=r"data.batch_size=51 is larger than the 50 training images"):
        make(batch_size=51)
    with pytest.raises(ValueError, match=r"data.batch_size=10 .* trainer.devices=4"):
        make(batch_size=10, world_size=4)
    assert len(make(batch_size=51, train=False)) == 1
