"""A report as one HTML file that needs nothing else: values in, text out. What goes into it is decided elsewhere.

Jinja2 fills the page and the charts, which are inline SVG: their colours follow the page into the dark, they scale on a phone, their
text can be selected, and a plotting library of a hundred times the size would add nothing to bars, dots and squares.
"""

from .arms import Arms, arm_chart
from .blocks import Card, Chart, Page, Picture, Section, Table
from .charts import heat_map, pair_bars, scatter, short_names, strips
from .png import png
from .render import render, require

__all__ = [
    "Arms",
    "Card",
    "Chart",
    "Page",
    "Picture",
    "Section",
    "Table",
    "arm_chart",
    "heat_map",
    "pair_bars",
    "png",
    "render",
    "require",
    "scatter",
    "short_names",
    "strips",
]
