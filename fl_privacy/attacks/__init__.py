"""Reconstruction attacks: what can really be rebuilt from an update, to hold predictions against."""

from fl_privacy.attacks.analytic import LeakedExamples, LinearLayerLeak, leaked_examples
from fl_privacy.attacks.attack import ATTACKS, Attack, WithPrior, WithWhitePrior
from fl_privacy.attacks.denoising import InputDenoising
from fl_privacy.attacks.distances import cosine_distance, relative_squared_distance, total_variation
from fl_privacy.attacks.gauss_newton import GaussNewton
from fl_privacy.attacks.gradient_matching import GradientMatching, deep_leakage, inverting_gradients
from fl_privacy.attacks.image_prior import Denoiser, ImageDenoising, denoised
from fl_privacy.attacks.joint import JointInversion
from fl_privacy.attacks.labels import labelled, recover_label_counts, recover_labels
from fl_privacy.attacks.metrics import aligned, psnr, rmse, ssim
from fl_privacy.attacks.noise import IndependentNoise, IsotropicNoise, Noise
from fl_privacy.attacks.optimizers import LBFGS, Adam
from fl_privacy.attacks.posterior_linearization import PosteriorLinearization
from fl_privacy.attacks.problem import AttackProblem, KnownBatch
from fl_privacy.attacks.result import Reconstruction, StopReason, best_of
from fl_privacy.attacks.reweighting import LeastPowers
from fl_privacy.influence.prior import GaussianPrior

__all__ = [
    "ATTACKS",
    "LBFGS",
    "Adam",
    "Attack",
    "AttackProblem",
    "Denoiser",
    "GaussNewton",
    "GaussianPrior",
    "GradientMatching",
    "ImageDenoising",
    "IndependentNoise",
    "InputDenoising",
    "IsotropicNoise",
    "JointInversion",
    "KnownBatch",
    "LeakedExamples",
    "LeastPowers",
    "LinearLayerLeak",
    "Noise",
    "PosteriorLinearization",
    "Reconstruction",
    "StopReason",
    "WithPrior",
    "WithWhitePrior",
    "aligned",
    "best_of",
    "cosine_distance",
    "deep_leakage",
    "denoised",
    "inverting_gradients",
    "labelled",
    "leaked_examples",
    "psnr",
    "recover_label_counts",
    "recover_labels",
    "relative_squared_distance",
    "rmse",
    "ssim",
    "total_variation",
]
