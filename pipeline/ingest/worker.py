"""The child process of ingest: one JSON job a line on stdin, one JSON result a line on stdout.

It bounds its own memory and the files it writes, dies with its parent, and never imports torch or DALI.
Run as `python -m pipeline.ingest.worker MEMORY_BYTES`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import av

from pipeline.ingest.item import Item, TranscodeSettings
from pipeline.ingest.spans import Span
from pipeline.ingest.transcode import transcode

PR_SET_PDEATHSIG = 1
MAX_FILE_BYTES = 16 << 30


def confine_process(memory_bytes: int) -> None:
    """Limit this process: address space, size of a written file, no core dump; SIGKILL when the parent dies."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the closed pipe ends the loop
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    av.logging.set_level(None)


def serve(work: Callable[[str, str, TranscodeSettings, Span | None], Any]) -> None:
    """Answer jobs until stdin ends.

    Args:
        work: called with the media file, the payload to write, the settings and the span; returns the item.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reply

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")

    reply({"ready": os.getpid()})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            span = None if job["span"] is None else (job["span"][0], job["span"][1])
            item = work(job["path"], job["out"], TranscodeSettings.from_json(job["settings"]), span)
        except MemoryError:
            item = Item(refused="decoding needs more memory than the limit allows", for_resources=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # no fault of this file
                reply({"fatal": f"{job['out']}: {error.strerror}; make room there and run again"})
                continue
            item = Item(refused=f"cannot be read: {error.strerror}")
        reply({"item": asdict(item)})


def main() -> None:
    """Confine this process and serve."""
    confine_process(int(sys.argv[1]))
    serve(transcode)


if __name__ == "__main__":
    main()
