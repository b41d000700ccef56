"""Media and annotations into a store (docs/ingest.md).

run: the whole, which goes on where a killed one was. item: settings, shape of the store, what became of a file.
In the parent: target (what may stand there), journal (what is finished), pool (child processes), fill (items into the
store), chunks (windows on long videos), report.
In the children: worker (the process), transcode (one file), source and spans (what of it is read), passes and timeline
(decoding, time stamps), encoder (what is written), findings (what was found, in words).
"""
