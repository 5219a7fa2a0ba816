"""Run a command without a network: python demo/offline.py [--check | -- COMMAND ...]   (Linux)

The command gets a network namespace of its own with nothing in it but the loopback device, so a server and its client
can talk and nothing can leave. It needs root, or a system that lets users make namespaces; else --check prints why not
and exits 1.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def leave_network() -> None:
    """Move this process into a new network namespace with its loopback up. Raises OSError where that is not allowed."""
    if sys.platform != "linux":
        raise OSError("network namespaces exist on Linux only")
    uid, gid = os.getuid(), os.getgid()
    try:
        _unshare(CLONE_NEWNET)
    except PermissionError:
        _unshare(CLONE_NEWUSER | CLONE_NEWNET)
        # The same user inside as outside, so that new files belong to the caller.
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", encoding="ascii")
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
        # Kernels put idle tunnel devices into every new namespace; one that is up would be a way out.
        up = [name for _, name in socket.if_nameindex() if name != "lo" and _flags(handle.fileno(), name) & IFF_UP]
    if up:
        raise OSError(f"the new namespace still has {', '.join(up)}")


def _flags(handle: int, device: str) -> int:
    import fcntl

    answer = fcntl.ioctl(handle, SIOCGIFFLAGS, struct.pack("16sh14x", device.encode(), 0))
    return int(struct.unpack_from("16sh", answer)[1])


def main() -> int:
    arguments = sys.argv[1:]
    try:
        leave_network()
    except OSError as error:
        print(f"{error.strerror or error}")
        return 1
    if arguments == ["--check"]:
        return 0
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        print(__doc__)
        return 2
    os.execvp(command[0], command)  # noqa: S606 - the caller's own command, as a list


if __name__ == "__main__":
    raise SystemExit(main())
