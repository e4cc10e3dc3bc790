"""How many bytes of large allocations does the C library hold for this process?"""

import ctypes

LARGE_BYTES = "16384"
"""For the environment's MALLOC_MMAP_THRESHOLD_: allocations from here on are mapped, which the C library counts."""


def mapped_bytes() -> int:
    """The bytes in allocations of their own mapping: tensors, not the small objects of Python."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().hblkhd)


class _Mallinfo2(ctypes.Structure):
    """glibc's struct of that name, of which `hblkhd` is the bytes in mapped allocations."""

    _fields_ = [*((f"_{index}", ctypes.c_size_t) for index in range(4)), ("hblkhd", ctypes.c_size_t)]
    _fields_ += [(f"_{index}", ctypes.c_size_t) for index in range(5, 10)]
