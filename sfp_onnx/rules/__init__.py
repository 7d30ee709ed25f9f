"""Operator rules: what each operator does to channel labels. A new operator is a few lines in one of these modules."""

from . import attention, elementwise, indexed, mixing, movement, norm, quantized  # noqa: F401  (registration)
