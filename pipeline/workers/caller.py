"""A child process that calls one function for each value that it is sent; see `confined.py`.

Run as `python -m pipeline.workers.caller PARENT MEMORY_BYTES`.
"""

import os
import pickle
import sys
from typing import Any, BinaryIO

import av

from pipeline.workers.child import die_with_parent, limit_memory, portable

_HEADER_BYTES = 8


def main() -> None:
    """Answer calls until the input ends."""
    parent, memory_bytes = map(int, sys.argv[1:3])
    die_with_parent(parent)
    av.logging.set_level(None)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    function = _receive(sys.stdin.buffer)
    limit_memory(memory_bytes)
    _send(replies, (True, None))
    while True:
        try:
            argument = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: tuple[bool, Any] = True, function(argument)
        except MemoryError:
            reason = f"decoding needs more memory than data.clip_memory_mib allows ({memory_bytes >> 20}); raise it"
            answer = False, ValueError(reason)
        except Exception as error:
            answer = False, portable(error)
        _send(replies, answer)


def _receive(source: BinaryIO) -> Any:
    header = source.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        raise EOFError
    return pickle.loads(source.read(int.from_bytes(header, "little")))


def _send(target: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    target.write(len(data).to_bytes(_HEADER_BYTES, "little") + data)
    target.flush()


if __name__ == "__main__":
    main()
