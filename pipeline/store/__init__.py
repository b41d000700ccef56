"""Stores: shards and a memory-mapped index (docs/store.md)."""
