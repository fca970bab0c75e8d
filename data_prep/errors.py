"""The error of this package that speaks to the user, and the defect of one record."""


class DataError(ValueError):
    """Data, or a part, is not what it should be; the message says which file or sample and what to do."""


class Defect(ValueError):
    """One thing wrong with one record.

    Attributes:
        reason: short and countable, e.g. ``image missing``.
        detail: what exactly, e.g. the file.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # survives the way back from a worker process
        return type(self), (self.reason, self.detail)
