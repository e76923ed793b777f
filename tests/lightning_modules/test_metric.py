"""The sums behind val/bpd and test/bpd."""

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.metric import MOST_KEPT, ElboMetric, TrainingTerms
from losses import Elbo


class OnMps(torch.Tensor):
    """Says that it lies on an Apple GPU."""

    device = torch.device("mps")


def test_sums_go_to_a_device_without_float64():
    def move(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor.as_subclass(OnMps)

    metric, terms = ElboMetric(), [torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 2.0]), torch.zeros(2)]
    metric._apply(move)
    metric.update(Elbo(*terms))
    assert metric.total.dtype == torch.float32
    assert metric.total.tolist() == [-7, -4, 3, 0]
    assert {value.dtype for value in metric._defaults.values()} == {torch.float32}  # which the next validation begins from


def test_sums_are_in_float64_elsewhere_whatever_the_model_is_in():
    metric = ElboMetric()
    metric._apply(lambda tensor: tensor.to("cpu"))
    assert metric.total.dtype == torch.float64


def test_standard_errors_are_those_of_the_sample():
    metric, values = ElboMetric(), torch.randn(3, 7).double()
    for part in values.split((3, 4), 1):
        metric.update(Elbo(*part))
    found, value = metric.compute(), values[0] - values[1] - values[2]
    assert found["elbo_se"].item() == pytest.approx(value.std().item() / math.sqrt(7))
    assert found["prior_se"].item() == pytest.approx(values[1].std().item() / math.sqrt(7))


def batch(value, num=2):
    return torch.tensor(value), Elbo(*(torch.full((num,), value * factor, requires_grad=True) for factor in (1.0, 2.0, 3.0)))


def test_terms_of_training_are_means_over_batches_and_images_and_hold_no_graph():
    terms = TrainingTerms()
    for value in range(MOST_KEPT):  # these are added up by themselves
        terms.add(*batch(float(value)))
    terms.add(*batch(1000.0, 4))
    loss = (sum(range(MOST_KEPT)) + 1000) / (MOST_KEPT + 1)
    mean = (2 * sum(range(MOST_KEPT)) + 4000) / (2 * MOST_KEPT + 4)
    assert terms.means().tolist() == pytest.approx([loss, -4 * mean, mean, 2 * mean, 3 * mean])
    assert not terms.means().requires_grad


def test_a_checkpoint_has_the_terms_of_all_ranks_from_which_each_goes_on():
    ranks = [TrainingTerms(), TrainingTerms()]
    for rank, value in zip(ranks, (1.0, 5.0), strict=True):
        rank.add(*batch(value))
        rank._add_up()
    both = sum(rank.recorded(2)["sums"] for rank in ranks) / 2
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda sums, reduce_op: both)
    ranks[0].share(strategy)
    again = [TrainingTerms.restored(ranks[0].recorded(2), 2) for _ in ranks]
    for rank, value in zip(again, (2.0, 8.0), strict=True):
        rank.add(*batch(value))
    assert sum(rank.means()[0].item() for rank in again) / 2 == (1 + 5 + 2 + 8) / 4
    one = TrainingTerms.restored(ranks[0].recorded(2), 1)
    one.add(*batch(9.0, 4))  # the whole batch, of which each had half
    assert one.means().tolist() == [(3 + 9) / 2, *(factor * (1 + 5 + 9 + 9) / 4 for factor in (-4, 1, 2, 3))]
    assert TrainingTerms.restored(TrainingTerms.restored(None, 2).recorded(2), 1).recorded(1)["sums"] is None
