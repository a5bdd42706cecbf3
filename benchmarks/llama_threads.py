"""Seconds that llama.cpp takes on a busy machine, by its number of threads and by how they wait for each other.

    modekit export OUT FOLDER --gguf --outtype f16
    python benchmarks/llama_threads.py FOLDER/OUT-f16.gguf [--busy 2] [--rounds 3]

Beside `--busy` processes that never wait, 128 tokens are written after a short prompt; every row is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from modekit.engines.llama import Llama

WRITTEN = 128
WAITING = ("active", "passive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} and {arguments.busy} busy processes")
    with ExitStack() as stack:
        for _ in range(arguments.busy):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        for threads in dict.fromkeys((1, os.cpu_count() or 1)):
            for waiting in WAITING:
                print(
                    f"{threads} threads, {waiting}: {_seconds(arguments.file, threads, waiting, arguments.rounds)}", flush=True
                )


def _seconds(file: Path, threads: int, waiting: str, rounds: int) -> str:
    """Of each round."""
    os.environ["OMP_WAIT_POLICY"] = waiting  # which modekit sets to passive where the user has not set it
    found = []
    with Llama(file, context=256, threads=threads) as llama:
        ids = llama.tokenize("The heart moves")
        for _ in range(rounds):
            begun = time.monotonic()
            llama._complete(ids, n_predict=WRITTEN, ignore_eos=True)
            found.append(time.monotonic() - begun)
    return ", ".join(f"{each:.2f} s" for each in found)


if __name__ == "__main__":
    main()
