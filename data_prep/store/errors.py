"""The errors of this package that speak to the user, and the defect of one record."""

from pathlib import Path


class DataError(ValueError):
    """Data, or a part, is not what it should be; the message says which file or sample and what to do."""


class CorruptShardError(DataError):
    """A shard that cannot be read.

    Attributes:
        file: The shard.
        samples: How many it should hold.
    """

    def __init__(self, message: str, file: Path, samples: int) -> None:
        super().__init__(message)
        self.file, self.samples = file, samples

    def __reduce__(self):  # survives the way back from a worker process
        return type(self), (str(self), self.file, self.samples)


class Defect(ValueError):
    """One thing wrong with one record.

    Attributes:
        reason: Short and countable, e.g. `image missing`.
        detail: What exactly, e.g. the file.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # survives the way back from a worker process
        return type(self), (self.reason, self.detail)
