import math

import pytest
import torch
import torch.nn.functional as F

from losses.elementary import log1mexp, log_sigmoid

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@BOTH
def test_log_sigmoid_and_its_gradient(dtype):
    z = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, 1e-20, -1e-20, 1e-6, 3e4, -3e4])]).to(dtype)
    mine, theirs = z.clone().requires_grad_(), z.double().requires_grad_()
    ours, expected = log_sigmoid(mine), F.logsigmoid(theirs)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), expected, rtol=8 * eps, atol=torch.finfo(dtype).tiny ** 0.9)
    (gradient,) = torch.autograd.grad(ours.sum(), mine)
    (right,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(gradient.double(), right, rtol=8 * eps, atol=2 * eps)


def test_log_sigmoid_at_the_ends():
    ends = log_sigmoid(torch.tensor([math.inf, -math.inf, math.nan]))
    assert ends[0] == 0
    assert ends[1] == -math.inf
    assert ends[2].isnan()


def test_log_sigmoid_has_second_derivatives_and_maps_over_batches():
    z = torch.linspace(-8, 8, 17, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(log_sigmoid, z.clone().requires_grad_())
    each = torch.vmap(torch.func.grad(log_sigmoid))(z)
    torch.testing.assert_close(each, torch.sigmoid(-z))


@BOTH
def test_log1mexp_and_its_gradient(dtype):
    d = -torch.logspace(-8, 1.5, 2001, dtype=torch.float64).to(dtype)
    mine, theirs = d.clone().requires_grad_(), d.double().requires_grad_()
    ours = log1mexp(mine)
    expected = torch.where(d < -1, torch.log1p(-torch.exp(theirs)), torch.log(-torch.expm1(theirs)))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), expected, rtol=8 * eps, atol=2 * eps)
    (gradient,) = torch.autograd.grad(ours.sum(), mine)
    (right,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(gradient.double(), right, rtol=16 * eps, atol=2 * eps)


def test_bins_narrower_than_rounding_cost_much_but_not_infinitely():
    assert log1mexp(torch.tensor([-0.0, -1e-30])).isfinite().all()
