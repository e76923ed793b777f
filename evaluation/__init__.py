"""Floor 4: what a trained model scores, with every error bar, and where its bits go."""

from evaluation.estimators import Default, Draws, Estimator, Full, Importance, Stratified, ThreeVariable
from evaluation.saved import SavedRun

__all__ = ["Default", "Draws", "Estimator", "Full", "Importance", "SavedRun", "Stratified", "ThreeVariable"]
