"""Operator rules: what each operator does to channel labels. A new operator is a few lines in one of these modules."""

from . import attention, channelwise, indexed, mixing, movement, quantized  # noqa: F401  (registration)
