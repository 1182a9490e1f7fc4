"""Files of many gigabytes that take no room on the disk."""

import ctypes
import sys

FSCTL_SET_SPARSE = 0x900C4  # winioctl.h


def extend(file, size):
    """Make an open file `size` bytes long; what was not written is a hole of zeros. Closing it keeps that.

    On Windows `truncate` would write every zero, and a file has holes only once it is told so.
    """
    if sys.platform != "win32":
        file.truncate(size)
        return
    import msvcrt

    kernel32, handle = ctypes.windll.kernel32, ctypes.c_void_p(msvcrt.get_osfhandle(file.fileno()))
    file.flush()
    written = ctypes.byref(ctypes.c_ulong())
    done = kernel32.DeviceIoControl(handle, FSCTL_SET_SPARSE, None, 0, None, 0, written, None)
    done = done and kernel32.SetFilePointerEx(handle, ctypes.c_int64(size), None, 0) and kernel32.SetEndOfFile(handle)
    if not done:
        raise ctypes.WinError()
