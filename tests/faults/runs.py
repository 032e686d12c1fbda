"""Faults of sources/runs.py: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    ("sources/runs.py", "for k, v in stored.items()} | given", "for k, v in (given | stored).items()}", "sources/test_runs.py", "remembers"),
]
