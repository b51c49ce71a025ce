"""The one exception that means: you can fix this, and here is how."""


class UserError(ValueError):
    """A mistake in what the user gave: the message says what was expected, what came and what to do."""
