"""Frames in one pass: decoded planes to normalised crops, on a CPU or, with the same bits, on a GPU.

csrc: the operation. build: compiles it. native: calls it, without torch or DALI. maker: who makes frames, and frames of
whole batches. table: what a GPU is told of a batch. triton_frames: its kernel. device: frames of whole batches there.
"""
