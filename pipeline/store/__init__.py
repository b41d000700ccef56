"""A store: shards and a memory-mapped index (docs/store.md). Imports media and the data set's contract alone.

format: names and store.json. schemas: the tables. rows: what goes in. rules: what the numbers must be.
writer: writes one, whole or not at all. reader: opens one, out of tables (opened and checked), shards (descriptors),
streams (bytes of a medium) and mapped (columns of a file). verify: compares every byte.
durable: files, folders and locks that survive kills.
"""
