"""What everything stands on: types, options, errors, and the system below."""
