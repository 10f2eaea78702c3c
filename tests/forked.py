"""A function called in a forked child of this warm process: what kills, hangs or exits there is an outcome here."""
import contextlib
import faulthandler
import os
import pickle
import select
import signal
import sys
import time
import traceback
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """How a child ended: "ok" with what the function returned, "raised" with (class name, message), "crash", "hang"."""

    kind: str
    value: Any
    said: str           # what it wrote to stdout and stderr


def in_child(function, *args, timeout=60.0):
    """Call function(*args) in a child. The child's own threads are the only ones that it has."""
    told, says = os.pipe(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            faulthandler.disable()
            os.dup2(says[1], 1)
            os.dup2(says[1], 2)
            sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))
            try:
                answer = "ok", function(*args)
            except BaseException as e:
                lines = traceback.extract_tb(e.__traceback__)
                answer = "raised", (type(e).__name__, str(e), f"{lines[-1].filename}:{lines[-1].lineno}")
            sys.stdout.flush()
            sys.stderr.flush()
            data = pickle.dumps(answer)
            while data:
                data = data[os.write(told[1], data):]
            status = 0
        os._exit(status)
    os.close(told[1])
    os.close(says[1])
    got, end, ends = {told[0]: b"", says[0]: b""}, time.monotonic() + timeout, {told[0], says[0]}
    while ends and (left := end - time.monotonic()) > 0:
        for fd in select.select(list(ends), [], [], left)[0]:
            data = os.read(fd, 1 << 16)
            got[fd] += data
            if not data:
                ends.discard(fd)
    hung = bool(ends)
    if hung:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for fd in (told[0], says[0]):
        os.close(fd)
    said = got[says[0]].decode(errors="replace")
    if hung:
        return Outcome("hang", None, said)
    if status or not got[told[0]]:
        return Outcome("crash", status, said)
    return Outcome(*pickle.loads(got[told[0]]), said)
