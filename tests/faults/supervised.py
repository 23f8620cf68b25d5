"""A supervisor in a process of its own, to be killed: `python -m tests.faults.supervised FOLDER WORKERS`.

It imports everything, says `ready`, and starts when it reads a line: the next supervisor is there in the
moment in which the one before dies. SIGTERM ends it as it ends `vidkv render`.
"""

from __future__ import annotations

import os
import signal
import sys


def main(folder: str, workers: int) -> int:
    from multiprocessing import forkserver

    from tests.faults.oracle import OFTEN, one_threaded
    from vidkv.jobs.store import JobStore
    from vidkv.jobs.supervisor import Supervisor

    caught, parent = list[int](), os.getppid()
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    with JobStore(folder) as store:
        supervisor = one_threaded(Supervisor(store, ["cpu"] * workers, OFTEN))
        forkserver.ensure_running()
        print("ready", flush=True)
        if not sys.stdin.readline():
            # nobody needs it
            return 0
        with supervisor:
            print("holding", flush=True)
            while not caught and os.getppid() == parent and supervisor.step():
                pass
    return 128 + caught[0] if caught else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
