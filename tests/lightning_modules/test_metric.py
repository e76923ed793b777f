"""The sums behind val/bpd and test/bpd."""

import math

import pytest
import torch

from lightning_modules.metric import ElboMetric
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
