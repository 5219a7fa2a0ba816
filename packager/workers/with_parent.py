"""Runs a script or module and ends it when the parent dies: ``with_parent.py PARENT SCRIPT ARGUMENTS``,
``with_parent.py PARENT -m MODULE ARGUMENTS``; PARENT is the parent's process id.

A build that is killed with SIGKILL cannot end its children; an orphan that keeps writing would disturb the next run.
"""

from __future__ import annotations

import os
import platform
import runpy
import sys
import threading
import time


def die_with_parent(parent: int) -> None:
    """End this process when the parent dies. parent: its process id, from the parent itself: getppid would already give
    another process if the parent died while Python started.
    """
    if platform.system() == "Linux":
        import ctypes
        import signal

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent died before the call above
            os._exit(1)
        return
    if sys.platform != "win32":
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    del sys.argv[:2]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0:1] = []
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # noqa: PTH100, PTH120 - pathlib is not worth its import here
        runpy.run_path(sys.argv[0], run_name="__main__")
