"""Run a command from a small process: `python spawn.py COMMAND...` prints seconds to its first byte of output, seconds
to its end, its peak memory in bytes and its exit status.

A process of its own, since Linux counts what the starting process had in memory into the peak of what it starts.
"""

import os
import sys
import time


def main() -> None:
    """Run the command, and print the four numbers."""
    if len(sys.argv) < 2:
        sys.exit("usage: python spawn.py COMMAND...")
    read, write = os.pipe()
    clock = time.perf_counter()
    pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)])
    os.close(write)
    first = len(os.read(read, 1)) and time.perf_counter() - clock
    while os.read(read, 65536):
        pass
    _, status, usage = os.wait4(pid, 0)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(first, time.perf_counter() - clock, peak, os.waitstatus_to_exitcode(status))


main()
