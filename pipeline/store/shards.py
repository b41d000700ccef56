"""The shards of an opened store: descriptors that threads share, and reads whose errors name medium and stream."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from pipeline.dataset import MediaError
from pipeline.media.reading import OPEN_READS, folder_problem, patiently
from pipeline.store.format import SHARD_FOLDER, StoreError, shard_file
from pipeline.store.mapped import SharedFile

_MAX_OPEN_SHARDS = 128


class Shards:
    """Reads from the shards of a store; keeps the descriptors of the latest ones.

    Args:
        path: the store. ids: names of the media, for messages.
    """

    def __init__(self, path: Path, ids: Sequence[str]) -> None:
        self._path, self._ids = path, ids
        self._files: OrderedDict[int, SharedFile] = OrderedDict()

    def read(self, media: int, stream: str, shard: int, offset: int, target: memoryview) -> None:
        """Fill `target` with bytes of a medium's "video" or "audio".

        Raises:
            MediaError: they are not there.
            StoreError: the whole store is not there.
        """
        try:
            count = patiently(lambda: self._fill(shard, offset, target))
        except (OSError, OverflowError) as error:
            gone = folder_problem(self._path) or folder_problem(self._path / SHARD_FOLDER)
            if gone:
                raise StoreError(gone) from error
            reason = f"{shard_file(max(shard, 0))} byte {offset}: {error}; verify the store"
            raise self.error(media, stream, reason) from error
        if count != len(target):
            reason = (
                f"{shard_file(shard)}: bytes ({count}) at {offset} must be {len(target)}; it was cut, copy it again"
            )
            raise self.error(media, stream, reason)

    def _fill(self, shard: int, offset: int, target: memoryview) -> int:
        """Read into `target`, as much as there is; returns the number of bytes."""
        path, done = self._path / shard_file(shard), 0
        try:
            with OPEN_READS.of(path, offset):
                file = self._file(shard)  # held: another thread may give it up meanwhile, which closes it
                while done < len(target) and (count := os.preadv(file.descriptor, [target[done:]], offset + done)):
                    done += count
        except OSError as error:
            self._files.pop(shard, None)  # a stale handle of a network file system is opened again
            raise OSError(error.errno, error.strerror, str(path)) from error
        return done

    def error(self, media: int, stream: str, reason: str, time_s: float | None = None) -> MediaError:
        """Return the error that names a medium of this store."""
        return MediaError(f"{self._ids[media]} in {self._path}", stream, reason, time_s=time_s)

    def _file(self, number: int) -> SharedFile:
        file = self._files.get(number)
        if file is None:
            file = self._files.setdefault(number, SharedFile(self._path / shard_file(number)))
            while len(self._files) > _MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
        return file
