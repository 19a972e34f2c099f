"""The library of native kernels: where it is. Programs run without it, more slowly."""

import logging
from pathlib import Path

from service.errors import BundleError

logger = logging.getLogger(__name__)

BUILDS = Path("build/native")  # where `make native` puts them
LIBRARY = "libclustered_attention.so"


def find_native_library(named: Path | None) -> Path | None:
    """Find the library.

    Args:
        named: by the settings; None takes the newest that was built here.
    Returns: its path; None if there is none.
    Raises: BundleError if the one named is not there.
    """
    if named is not None:
        if not named.is_file():
            raise BundleError(
                f"SERVICE_NATIVE_LIBRARY names {named}, which is no file; build it with `make native`, "
                "or leave the setting out"
            )
        return named
    return max(BUILDS.glob(f"*/{LIBRARY}"), key=lambda path: path.stat().st_mtime, default=None)
