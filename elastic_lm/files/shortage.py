"""Errors that come from what the machine lacks, and say nothing about the files that are read or written."""

import errno
import os

# No room on the disk, no permission, too many open files.
NUMBERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


def lacks_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a device was too small."""
    # XLA and TensorStore have no class of their own for it.
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def is_shortage(error: BaseException) -> bool:
    """Whether the machine lacks memory, room or permission, whichever library says so in its own words."""
    if lacks_memory(error) or isinstance(error, PermissionError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NUMBERS
    return "PERMISSION_DENIED" in str(error) or any(os.strerror(n) in str(error) for n in NUMBERS)
