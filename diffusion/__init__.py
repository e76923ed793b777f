"""Floor 1: betas -> q, p and the KL of every step; what the network predicts; which steps are drawn and walked."""

from diffusion.parameterizations import X0, Epsilon, Lattice, Parameterization
from diffusion.process import GaussianDiffusion
from diffusion.samplers import ancestral, ddim
from diffusion.schedules import constant, cosine, jsd, linear, log_snr_linear, scaled_linear, sigmoid
from diffusion.timesteps import low_discrepancy, uniform
from diffusion.variances import large, small
from diffusion.weightings import elbo, simple

__all__ = [
    "X0",
    "Epsilon",
    "GaussianDiffusion",
    "Lattice",
    "Parameterization",
    "ancestral",
    "constant",
    "cosine",
    "ddim",
    "elbo",
    "jsd",
    "large",
    "linear",
    "log_snr_linear",
    "low_discrepancy",
    "scaled_linear",
    "sigmoid",
    "simple",
    "small",
    "uniform",
]
