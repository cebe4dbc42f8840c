"""The exceptions, each with an exit code (sysexits) that tells what a retry is worth.

::

    ChunkflowError
    ├── UsageError
    ├── DataError
    ├── MissingInputError
    ├── StorageError
    │   └── BusyError
    └── SpecError
"""


class ChunkflowError(Exception):
    """Base of all errors with a message meant for the user.

    The message is shown in one line, without a traceback.
    """

    exit_code = 1


class UsageError(ChunkflowError):
    """The command line is wrong (EX_USAGE). A retry can't help."""

    exit_code = 64


class DataError(ChunkflowError):
    """Data that can't be right (EX_DATAERR), such as NaN from a model or a corrupt donation.

    A retry can't help.
    """

    exit_code = 65


class MissingInputError(ChunkflowError):
    """A layer, model file or donation isn't there (EX_NOINPUT).

    A retry can help only if it is a donation.
    """

    exit_code = 66


class StorageError(ChunkflowError):
    """Storage or network trouble, after the client's own retries (EX_TEMPFAIL).

    A retry can help.
    """

    exit_code = 75


class BusyError(StorageError):
    """Another run is at work on the output (EX_TEMPFAIL). A retry helps when it has ended."""


class SpecError(ChunkflowError):
    """The volume spec or a credential is wrong (EX_CONFIG). A retry can't help."""

    exit_code = 78


EXIT_CODES = {
    0: "done",
    UsageError.exit_code: "wrong usage",
    DataError.exit_code: "data that can't be right",
    MissingInputError.exit_code: "an input is missing",
    StorageError.exit_code: "storage or network trouble",
    SpecError.exit_code: "wrong spec or credentials",
    ChunkflowError.exit_code: "unforeseen error",
}
"""What each exit code says of how a command ended."""
