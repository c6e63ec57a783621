"""A reader on one CPU beside a writer on the other: the reader asks without pause and counts what
no state of the writer's answers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

HEAVIEST = 20
"""Kinds of wrong answers that are told."""


class Reader(Protocol):
    reads: int
    wrong: Counter[str]

    def round(self) -> None: ...


def race(
    reading: Callable[[], AbstractContextManager[Reader]],
    turns: Iterator[None],
    enough: Callable[[], bool],
) -> tuple[int, list[tuple[str, int]]]:
    """Reads in a child while this process takes turns until there are enough: (reads, what was
    wrong and how often). Needs two CPUs."""
    cpus = os.sched_getaffinity(0)
    told_read, told = os.pipe()
    results, out = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(told)
            os.sched_setaffinity(0, {sorted(cpus)[1]})
            with reading() as reader:
                _read_until_told(reader, told_read, out)
        finally:
            os._exit(0)
    os.close(out)
    os.close(told_read)
    try:
        os.sched_setaffinity(0, {min(cpus)})
        for _ in turns:
            if enough():
                break
    finally:
        os.close(told)
        os.sched_setaffinity(0, cpus)
        with os.fdopen(results) as file:
            text = file.read()
        os.waitpid(child, 0)
    told_back = json.loads(text)
    return told_back["reads"], [tuple(pair) for pair in told_back["wrong"]]


def _read_until_told(reader: Reader, told: int, out: int) -> None:
    """The child's whole life. `told` is readable or closed when it is time to end."""
    os.set_blocking(told, False)
    while True:
        reader.round()
        try:
            os.read(told, 1)
            break
        except BlockingIOError:
            continue
    with os.fdopen(out, "w") as file:
        json.dump({"reads": reader.reads, "wrong": reader.wrong.most_common(HEAVIEST)}, file)
