"""Worker processes that read and decode clips into shared memory.

cpus: how many are worth starting. slots: how a clip lies in memory. ring: the shared slots and the table of jobs.
child: one process. pool: what the loader sees. Nothing here imports torch or DALI.
"""
