"""Ways to choose what leaves that register themselves; the core never imports them."""

from . import bandits, dilution, sfp, training  # noqa: F401  (registration)
