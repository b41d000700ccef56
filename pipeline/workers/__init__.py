"""Worker processes that read and decode clips into shared memory.

machine: how many are worth starting, and how much memory is free. slots: how a clip lies in memory. ring: the shared
slots and the table of jobs. child: one process. pool: what the loader sees. confined, caller: single calls, for files
of unknown origin. Nothing here imports torch or DALI.
"""
