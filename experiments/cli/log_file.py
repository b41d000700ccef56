"""A log file that never ends a run: a full disk is told once, a deleted folder is waited for."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys


class LogFile(logging.handlers.WatchedFileHandler):
    """Appends to a file; opens it again where it was deleted or moved; says once per outage that it cannot be written.

    Lines that a full disk refuses stay in memory and are written with the next line that it takes.
    """

    _told = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; never raises."""
        try:
            super().emit(record)
        except OSError:  # the folder is not there: reopening fails outside the part that handles errors
            self.handleError(record)

    def flush(self) -> None:
        """Write what is waiting."""
        super().flush()
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say on stderr which file cannot be written, once until it can be again."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            with contextlib.suppress(OSError):
                os.write(2, f"log file {self.baseFilename} cannot be written ({error.strerror}); going on\n".encode())

    def close(self) -> None:
        """Close the file; what the disk refuses to the end is given up."""
        with contextlib.suppress(OSError):
            super().close()
