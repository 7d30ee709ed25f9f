"""Calibration and test data: found, checked against the model, preprocessed, and streamed in batches."""

from .dataset import BATCH, Dataset, Source, check_classes, open_data
from .images import is_images
from .preprocessing import RESAMPLING, Preprocessing
from .presets import CONFIG, PRESETS, hub_config, preset

__all__ = [
    "BATCH", "CONFIG", "PRESETS", "RESAMPLING", "Dataset", "Preprocessing", "Source", "check_classes", "hub_config", "is_images",
    "open_data", "preset",
]  # fmt: skip
