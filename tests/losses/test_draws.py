import itertools

import pytest
import torch

from losses.draws import Rows, rand, randn_like, rows_of_global_batch, stratified


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
    for one, many in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(many))


def test_stratified_draws_fill_every_cell():
    u = stratified(50, torch.device("cpu"))
    assert torch.equal((u * 50).long(), torch.arange(50))
