"""A worker process that crashes, hangs or leaks on files with such names; started by the tests of the pool."""

import ctypes
import json
import os
import sys
import time

from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.transcode import transcode
from pipeline.ingest.worker import confine_process, serve


def main() -> None:
    """Serve jobs; the name of the file says what goes wrong."""
    confine_process(int(sys.argv[1]))
    serve(_job)


def _job(path: str, out: str, settings: TranscodeSettings, span: object = None) -> object:
    name = os.path.basename(path)
    if name.startswith("segv"):
        ctypes.string_at(0)
    if name.startswith("abort"):
        os.abort()
    if name.startswith("exit"):
        os._exit(7)
    if name.startswith("bug"):
        raise KeyError("of our own")
    if name.startswith("hang"):
        with open(out + ".partial", "wb") as file:
            file.write(json.dumps("half").encode())
        time.sleep(3600)
    if name.startswith("leak"):
        return bytearray(1 << 40)
    if name.startswith("full"):
        raise OSError(28, "No space left on device")
    return transcode(path, out, settings)


if __name__ == "__main__":
    main()
