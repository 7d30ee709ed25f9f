"""The page as text."""

from __future__ import annotations

from base64 import b64encode
from importlib import resources
from typing import Any

from ..errors import OptionError
from .blocks import Page

TEMPLATE = "page.html.j2"


def require() -> Any:
    """Jinja2, which comes with the extra ``report``.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        hint = "Install it: pip install jinja2 (it is the extra 'report': sfp_onnx[report])"
        raise OptionError(f"--report needs Jinja2, which cannot be imported ({error}). {hint}") from error
    return jinja2


def render(page: Page) -> str:
    """The page as one HTML file. Equal pages give equal text.

    Raises:
        OptionError: Jinja2 is not installed.
    """
    jinja2 = require()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda data: "data:image/png;base64," + b64encode(data).decode()
    environment.filters["n"] = lambda value: f"{value:.2f}".rstrip("0").rstrip(".")
    text: str = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text("utf-8")).render(page=page)
    return text.lstrip()
