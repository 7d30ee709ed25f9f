"""Packages that only some features need: imported when the feature is used, with an error that names the extra."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import OptionError


def need(module: str, extra: str, feature: str) -> Any:
    """A module of an optional package.

    Raises:
        OptionError: it is not installed; how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise OptionError(f"{feature} needs the package {package}, which is not installed: pip install 'sfp_onnx[{extra}]'") from error
