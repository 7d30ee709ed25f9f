"""Calibration and test data: found, checked against the model, preprocessed, and streamed in batches."""

from .dataset import BATCH, Dataset, check_classes, open_data
from .preprocessing import Preprocessing

__all__ = ["BATCH", "Dataset", "Preprocessing", "check_classes", "open_data"]
