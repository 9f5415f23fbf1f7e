"""A run that is stopped, as by Ctrl-C, at a call of its progress."""

from collections.abc import Callable


def interrupt_at(call: int) -> Callable[[str, int, int], None]:
    calls = []

    def progress(name: str, done: int, total: int) -> None:
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt

    return progress
