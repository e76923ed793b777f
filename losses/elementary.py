r"""Elementary functions that likelihoods spend their time in.

On a CPU torch takes some 10 ns for each number of log1p, expm1, softplus and logsigmoid, and 1 ns for exp, tanh and atanh. So

.. math:: \ln(1 + u) = 2\,\mathrm{artanh}\frac{u}{2 + u}, \qquad e^d - 1 = \frac{2 \tanh(d/2)}{1 - \tanh(d/2)}

are used there, which keep the digits that log1p and expm1 are for. Accelerators have fast kernels of their own. No
``torch.where``: with a mask that looks random it costs as much as what it would save.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _LogSigmoid(torch.autograd.Function):
    """min(z, 0) - ln(1 + e^-|z|), whose derivative is sigmoid(-z): autograd's own would stumble over |z| at 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        u = torch.exp(-z.abs())
        return z.clamp(max=0) - 2 * torch.atanh(u / (2 + u))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return gradient * torch.sigmoid(-z)


def log_sigmoid(z: Tensor) -> Tensor:
    """Returns ln(1/(1 + e^-z)), of the shape of z; once and twice differentiable."""
    return _LogSigmoid.apply(z) if z.device.type == "cpu" else F.logsigmoid(z)


def log1mexp(d: Tensor) -> Tensor:
    """Returns ln(1 - e^d) for d < 0, to the dtype's rounding of 1 where it is near 0, and relatively elsewhere."""
    d = d.clamp(max=-(torch.finfo(d.dtype).tiny ** 0.5))  # bins narrower than rounding: a large finite -ln, not infinity
    if d.device.type != "cpu":
        return torch.log(-torch.expm1(d))
    half = torch.tanh(0.5 * d)
    return torch.log(-2 * half / (1 - half))
