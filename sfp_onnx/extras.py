"""Code from outside that only some features need: packages of the extras, and functions of the user. Imported when used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import OptionError

PACKAGES = {"PIL": "pillow"}  # modules of packages with other names


def need(module: str, extra: str, feature: str) -> Any:
    """A module of an optional package.

    Raises:
        OptionError: it is not installed; how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module.partition(".")[0], module)
        raise OptionError(
            f"{feature} needs {package}, which is not installed: pip install {package} (it is the extra '{extra}': sfp_onnx[{extra}])"
        ) from error


def user_function(name: str, option: str) -> Callable[..., Any]:
    """The function ``module:function``; modules in the current folder are found. ``option`` is what messages begin with.

    Raises:
        OptionError: it cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise OptionError(f"{option}: cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(found, attribute):
        raise OptionError(f"{option}: cannot be imported: cannot import name '{attribute}' from '{module}'")
    function: Callable[..., Any] = getattr(found, attribute)
    if not callable(function):
        raise OptionError(f"{option}: '{attribute}' is no function")
    return function
