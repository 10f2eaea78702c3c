"""Lines that tell the user something beside the results."""

import sys


def note(text: str, end: str = "\n") -> None:
    """Write a line on stderr, at once. Where there is no stderr, or it takes nothing, the line is lost: never does it
    stand among the results on stdout, and never does it stop the work."""
    stream = sys.stderr
    if stream is None:      # print(file=None) would write on stdout
        return
    try:
        stream.write(text + end)
        getattr(stream, "flush", lambda: None)()
    except (OSError, ValueError, AttributeError):   # full, closed, or no stream
        pass
