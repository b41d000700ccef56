"""Frames on a CPU: decoded planes to normalised crops, in one compiled pass.

csrc: the operation. build: compiles it. native: calls it, without torch or DALI. maker: frames of whole batches.
"""
