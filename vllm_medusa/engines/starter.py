"""A process that imports what engines need, once, and forks into each of them.

It is given a module. Each message on its socket orders a fork in which the module's ``main(FD)``
runs. With the message come four file descriptors: the fork's standard input, its standard output
and error, FD, and a socket on which the fork tells its process id and the starter how it ended.
The other end is `engines.worker_process`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from selectors import EVENT_READ, BaseSelector, DefaultSelector

_LONGEST_ORDER = 2**20
_NUM_DESCRIPTORS = 4


def main(orders: socket.socket, name: str, prepares: bool) -> None:
    """Fork as ordered until nobody is left to order.

    Args:
        orders: a socket that keeps messages apart.
        name: of the module.
        prepares: whether the module's ``prepare()`` runs here, before all forks.
    """
    with suppress(Exception):  # a fork fails likewise, with a log
        module = importlib.import_module(name)
        if prepares:
            module.prepare()
    # What was imported is no garbage: no fork needs to look through it.
    gc.collect()
    gc.freeze()
    # In a fork `_next_fork` returns, and has closed what is the starter's alone.
    if (fork := _next_fork(orders)) is not None:
        replies = _begin(*fork)
        importlib.import_module(name).main(replies)
        sys.stdout.flush()
        sys.stderr.flush()
        # Python's own end would take apart all that was imported, which takes seconds.
        os._exit(0)


def _next_fork(orders: socket.socket) -> tuple[bytes, Sequence[int]] | None:
    """Return in each fork its order and file descriptors, and in the starter None at the end."""
    with orders, DefaultSelector() as selector:
        selector.register(orders, EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not orders:
                    selector.unregister(key.fileobj)
                    _tell_end(key.fd, *key.data)
                    continue
                order, descriptors, *_ = socket.recv_fds(orders, _LONGEST_ORDER, _NUM_DESCRIPTORS)
                if not order:
                    return None
                if (pid := os.fork()) == 0:
                    _forget(selector)
                    return order, descriptors
                *others, news = descriptors
                for descriptor in others:
                    os.close(descriptor)
                selector.register(os.pidfd_open(pid), EVENT_READ, (pid, news))


def _forget(selector: BaseSelector) -> None:
    """Close what is there for other forks: one that is open here does not tell its end."""
    for key in selector.get_map().values():
        if key.data is not None:
            os.close(key.fd)
            os.close(key.data[1])


def _tell_end(pidfd: int, pid: int, news: int) -> None:
    """Tell how a fork ended, as `subprocess.Popen.returncode` has it."""
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    with socket.socket(fileno=news) as told, suppress(OSError):  # the caller may be gone
        told.send(str(os.waitstatus_to_exitcode(status)).encode())


def _begin(order: bytes, descriptors: Sequence[int]) -> int:
    """Make this fork the process that was ordered; return where its replies go."""
    os.setsid()
    standard_input, log, replies, news = descriptors
    with socket.socket(fileno=news) as told, suppress(OSError):
        told.send(str(os.getpid()).encode())
    for descriptor, places in ((standard_input, (0,)), (log, (1, 2))):
        for place in places:
            os.dup2(descriptor, place)
        os.close(descriptor)
    values = json.loads(order)
    os.environ.clear()
    os.environ.update(values["environment"])
    os.chdir(values["folder"])
    return replies


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], bool(int(sys.argv[3])))
