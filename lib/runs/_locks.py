"""One process at a time in a folder: a lock that the kernel takes back when its holder dies.

The lock is flock's, on FOLDER/.lock, so no lock outlives its process, however that ends. The file
itself stays: it says who holds the lock, or held it last. Locks are advisory: they keep out whoever
asks, and readers do not.
"""

import contextlib
import errno
import os
import platform
import sys
import threading
import weakref
from pathlib import Path

with contextlib.suppress(ImportError):  # not on Windows, where folders stay without locks
    import fcntl

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderBusyError(OSError):
    """Another process holds the folder. The message names both."""


class FolderLock:
    """A lock held: it is let go of with the last reference to it, and with the process."""

    def __init__(self, folder: Path, wait: bool):
        self.descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self.descriptor)
        _take(self.descriptor, folder, wait)


_HELD: "weakref.WeakValueDictionary[Path, FolderLock]" = weakref.WeakValueDictionary()
_GUARD = threading.Lock()


def lock_folder(folder: str | os.PathLike, *, wait: bool = False) -> FolderLock:
    """Locks an existing folder against other processes; within a process the lock is shared.

    Where another process holds it this raises FolderBusyError or, with `wait`, says so on stderr
    and waits. On a file system without locks it says that and goes on. Raises OSError where the
    folder cannot be written to.
    """
    folder = Path(folder)
    where = folder.resolve()
    with _GUARD:
        lock = _HELD.get(where)
        if lock is None:
            _HELD[where] = lock = FolderLock(folder, wait)
        return lock


def _take(descriptor: int, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
        if not wait:
            message = f"{folder} is in use by {holder}: let it end, or stop it, and run this again"
            raise FolderBusyError(message) from None
        print(f"waiting for {holder}, which works in {folder}", file=sys.stderr, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (NameError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        print(f"{folder}: no locks here, so start nothing else in it", file=sys.stderr, flush=True)
        return
    # Only words for others: a full disk is no reason to stop here.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
