"""The error of this package that speaks to the user."""


class DataError(ValueError):
    """Data, or a part, is not what it should be; the message says which file or sample and what to do."""
