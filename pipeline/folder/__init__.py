"""A folder of plain videos, served through the same interface as a store."""
