"""Command lines and the strict YAML loader."""
