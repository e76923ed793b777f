"""Floor 0: Gaussians, KL divergences, pixel likelihoods and the ELBO record. Needs torch only."""

from losses.elbo import Elbo
from losses.gaussian import DiagGaussian, kl, log_ratio, sum_except_batch
from losses.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedGaussian,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Likelihood,
    from_unit,
    to_unit,
)

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiagGaussian",
    "DiscretizedGaussian",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Elbo",
    "Gaussian",
    "Likelihood",
    "from_unit",
    "kl",
    "log_ratio",
    "sum_except_batch",
    "to_unit",
]
