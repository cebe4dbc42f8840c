"""The exception tree; each class carries the exit code (sysexits) that tells what a retry is worth."""


class ChunkflowError(Exception):
    """Base of all errors with a message meant for the user: shown in one line, without a traceback."""

    exit_code = 1


class UsageError(ChunkflowError):
    """The command line is wrong (EX_USAGE). A retry can't help."""

    exit_code = 64


class DataError(ChunkflowError):
    """Data that can't be right (EX_DATAERR): NaN from a model, a corrupt donation. A retry can't help."""

    exit_code = 65


class MissingInputError(ChunkflowError):
    """A layer, model file or donation isn't there (EX_NOINPUT)."""

    exit_code = 66


class StorageError(ChunkflowError):
    """Storage or network trouble, after the client's own retries (EX_TEMPFAIL). Worth a retry."""

    exit_code = 75


class SpecError(ChunkflowError):
    """The volume spec is wrong (EX_CONFIG). A retry can't help."""

    exit_code = 78
