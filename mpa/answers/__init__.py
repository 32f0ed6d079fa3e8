"""Pure functions on text and numbers: normalising, reading replies, matching, metrics, statistics. Nothing here opens a file, and no
preset or dataset is known by name."""
