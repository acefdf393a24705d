"""The C allocator's settings for a process that asks for the same large blocks again and again."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MADV_HUGEPAGE = 14  # sys/mman.h
_PAGE = 1 << 21
_NEVER = (1 << 31) - 1
_LARGEST_BLOCK = 1 << 30

_done: list[str] = []


def keep_freed_memory(num_bytes: int) -> str:
    """Let malloc keep what is freed, and ask for huge pages in the first `num_bytes` it will hand out.

    By default glibc gives every large block back to the system and takes it anew, page by page, at each step. Nothing
    is touched here: memory is taken when it is first written, as before. Done once a process; returns what was done,
    for the log.
    """
    if not _done:
        libc = _glibc()
        _done.append("as the system has it" if libc is None else _configure(libc, num_bytes))
    return _done[0]


def _glibc() -> Any:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None, use_errno=True)


def _configure(libc: Any, num_bytes: int) -> str:
    if not (
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    ):
        return "as the system has it"
    malloc: Callable[[ctypes.c_size_t], int | None] = libc.malloc
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    advised = False
    blocks = []
    left = num_bytes
    while left > 0:  # below the size from which even now blocks come from elsewhere
        size = min(left, _LARGEST_BLOCK // 2)
        block = malloc(ctypes.c_size_t(size))
        if block is None:
            break
        blocks.append(block)
        start, end = -(-block // _PAGE) * _PAGE, (block + size) // _PAGE * _PAGE
        if end > start:
            arguments = (ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)
            advised |= libc.madvise(*arguments) == 0
        left -= size
    for block in reversed(blocks):
        libc.free(block)
    return "freed memory is kept" + (", in huge pages" if advised else "")
