"""A process that competes for directories: a line of its input names one, the next gives it back."""

import functools
import os
import sys

from moma_jax.errors import InputError
from moma_jax.runs import directory
from moma_jax.storage.lease import Lease

BEAT, STALE = 0.2, 2.0


def main():
    directory.Lease = functools.partial(Lease, beat=BEAT, stale=STALE)
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        try:
            with directory.RunDir(line.strip()).locked() as run:
                print("won", flush=True)
                sys.stdin.readline()
                run.require_writer()
                run.write("written", b"by the winner")
                print("wrote", flush=True)
        except InputError as error:
            print(error, flush=True)
            sys.stdin.readline()


if __name__ == "__main__":
    main()
