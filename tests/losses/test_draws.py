import itertools
import math

import pytest
import torch

from losses.draws import Own, Rows, dropout, own_generators, rand, randn_like, rows_of_global_batch, stratified


@pytest.mark.parametrize("bounds", [(0, 5, 10), (0, 3, 7, 10), (0, 10)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_together_draw_what_one_device_draws(bounds, repeats):
    def draw(batch):
        torch.manual_seed(1)
        device = torch.device("cpu")
        return randn_like(torch.zeros(batch * repeats, 2, 3)), rand((batch, 4), device), stratified(batch, device)

    whole = draw(10)
    parts = []
    for start, stop in itertools.pairwise(bounds):
        with rows_of_global_batch(Rows(start, stop, 10)):
            parts.append(draw(stop - start))
            kept = randn_like(torch.zeros(stop - start, 3))
            assert kept.untyped_storage().nbytes() == kept.nbytes  # nothing of the others' is held
    for one, many in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(many))


@pytest.mark.parametrize("num", [1, 3, 5, 7])
def test_ranks_that_draw_for_some_of_their_rows_draw_different_numbers(num):
    drawn = []
    for start, stop in ((0, 4), (4, 8)):
        torch.manual_seed(1)
        with rows_of_global_batch(Rows(start, stop, 8)):
            drawn.append(randn_like(torch.zeros(num, 5)))
            after = torch.rand(())
        assert drawn[-1].shape == (num, 5)
        drawn.append(after)
    first, after_first, second, after_second = drawn
    assert after_first == after_second  # their generators stay in step
    assert torch.cat([first, second]).unique().numel() == 2 * first.numel()


def test_stratified_draws_spread_evenly_and_each_row_sees_all_of_the_interval():
    draws = torch.stack([stratified(50, torch.device("cpu")) for _ in range(400)])
    spread = draws.sort(1).values
    torch.testing.assert_close(spread.diff(dim=1), torch.full((400, 49), 1 / 50, dtype=torch.float64), atol=1e-9, rtol=0)
    assert ((draws.mean(0) - 0.5).abs() < 4.5 / math.sqrt(12 * 400)).all()
    assert (draws.min(0).values < 0.05).all()
    assert (draws.max(0).values > 0.95).all()


def test_rows_with_generators_of_their_own_see_neither_their_neighbours_nor_the_batch():
    def own(rows):
        return Own([torch.Generator().manual_seed(row) for row in rows], lambda: torch.tensor(rows) / 10)

    def draw(rows, pieces):
        with own_generators(own(rows)):
            parts = [randn_like(torch.zeros(len(rows) * k, 3, 7)).unflatten(0, (len(rows), k)) for k in pieces]
            return torch.cat(parts, 1), stratified(len(rows), torch.device("cpu"))

    whole, cells = draw([4, 5, 6], [1, 5])
    for row, expected, cell in zip([4, 5, 6], whole, cells, strict=True):
        noise, alone = draw([row], [2, 2, 2])
        assert torch.equal(noise[0], expected)
        assert alone == cell
    assert whole.unique().numel() == whole.numel()
    with own_generators(own([1, 2])), pytest.raises(ValueError, match="3 rows"):
        randn_like(torch.zeros(3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.4])
def test_dropout_keeps_the_mean_in_every_precision(p, dtype):
    x = torch.linspace(1, 2, 2**12).to(dtype).repeat(2**6, 1)
    dropped = dropout(x, p)
    kept = dropped != 0
    scale = dropped[kept].double().sum() / x[kept].double().sum()
    assert (kept.double().mean() - (1 - p)).abs() < 4.5 * 0.5 / x.numel() ** 0.5
    assert scale.item() == pytest.approx(1 / (1 - p), rel=6e-4)  # a scale of 8 bits is off by up to 16e-4


def test_dropout_of_less_than_its_mask_can_tell_drops_nothing():
    x = torch.ones(1000, 1000)
    assert torch.equal(dropout(x, 1e-9), x)
