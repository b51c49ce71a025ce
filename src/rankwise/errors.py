"""Failures that are no defect: a mistake that the user can fix, and a run that was stopped."""


class UserError(ValueError):
    """A mistake in what the user gave: the message says what was expected, what came and what to do."""


class Interrupted(RuntimeError):
    """The run was stopped by Ctrl-C; the message says how to go on."""
