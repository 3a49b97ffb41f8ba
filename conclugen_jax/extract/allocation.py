"""How the process takes memory from the system."""

import ctypes

# Of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next allocation, instead of giving it back to the system at once.

    XLA takes and frees hundreds of MiB for every batch on a processor; without this a fifth of the time goes into pages that
    the system fills with zeros. To be called before threads are started; freed memory stays with the process from then on.

    Returns:
      Whether the C library can do it; others are left as they are.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    done = [set_option(M_ARENA_MAX, 1), set_option(M_MMAP_THRESHOLD, 2**30), set_option(M_TRIM_THRESHOLD, 2**31 - 1)]
    return all(done)
