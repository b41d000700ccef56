"""Media into a store: worker processes, findings, journal, report (docs/ingest.md)."""
