"""What every room may use: types, options, errors, the system below."""

PLUGINS: list[str] = []
"""Modules that register something (scores, sections of the report); they are imported when the registry of scores is."""
