"""How the C library hands memory out in processes that do nothing but audit."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD


def keep_freed_memory() -> bool:
    """Lets this process keep up to 256 MiB that it has freed, where it otherwise returns every larger tensor at once.

    A pass then reuses the last one's memory. Otherwise the system hands out, zeroes and takes back every page of it: a
    quarter of the time on a CPU. For processes of our own only: it is a setting of the whole process.

    Returns:
        Whether it was set: only glibc has the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none by that name
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 * 1024**2) and mallopt(_TRIM_THRESHOLD, 256 * 1024**2))
