"""Clips decoded by NVDEC with decoders that live on, beside CPU workers.

decoder: what a decoder is, and its CPU twin. hardware: NVIDIA's library behind it. pool: threads with decoders.
share, trial: how many clips of a batch go where, by what each side decodes here. source: both as one source of clips.
choice: who decodes a split on a device.
"""
