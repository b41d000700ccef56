"""A folder of plain videos, served through the same interface as a store.

dataset: splits, classes and tables. describe: what is known of one file. read: its frames and sound by number.
"""
