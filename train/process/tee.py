"""`tee.py LOG OUT ERR`: passes the pipes OUT and ERR on to stdout and stderr, and appends their lines to LOG.

A process beside each rank (`train.process.rank_log`), so that the words of one that is killed or hangs are kept too. It
ends with its rank, which holds the other end of stdin. Only whole lines are appended, each in one write; of a line
that a progress bar has drawn over, the last state. Imports nothing of ours: it starts in milliseconds.
"""

import os
import select
import signal
import sys
from contextlib import suppress


def main() -> None:
    """See above."""
    # Who stops a rank may tell all processes around it; its last words come after that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError:
        log = -1  # nothing can be written to it; the rank goes on
    targets = {int(sys.argv[2]): 1, int(sys.argv[3]): 2}
    begun = dict.fromkeys(targets, b"")  # the line that has no end yet
    watched = [0, *targets]
    # Once the rank has gone, what is left in the pipes and no more: its children may keep them open.
    while ready := select.select(watched, [], [], None if 0 in watched else 0)[0]:
        for source in ready:
            chunk = os.read(source, 1 << 16)
            if source in targets and chunk:
                write(targets[source], chunk)
                *lines, begun[source] = (begun[source] + chunk).split(b"\n")
                write(log, b"".join(last_state(line).rstrip(b"\r") + b"\n" for line in lines))
                begun[source] = last_state(begun[source])
            else:
                watched.remove(source)
    for rest in filter(None, begun.values()):
        write(log, rest.rstrip(b"\r") + b"\n")


def last_state(line: bytes) -> bytes:
    """What follows the last carriage return that something follows."""
    end = b"\r" if line.endswith(b"\r") else b""
    return line.rstrip(b"\r").rpartition(b"\r")[2] + end


def write(target: int, data: bytes) -> None:
    """All of it; a terminal that was closed or a full disk takes nothing from the other side."""
    with suppress(OSError):
        while data:
            data = data[os.write(target, data) :]


if __name__ == "__main__":
    main()
