"""Loaders that people use today, each written the way its users write it, and this project's, behind one signature.

A way is a function `(videos, settings) -> iterator of (frames, log_mel)`: frames (B, 3, 32, 224, 224) float32 and
log-mel (B, 1, 128, 80) float32, both normalised. common: what they share. measure: one of them in a process of its own.
They are installed by `make peers` and are no dependency of the project.
"""
