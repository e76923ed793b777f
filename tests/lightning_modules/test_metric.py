"""The sums behind val/bpd and test/bpd."""

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
