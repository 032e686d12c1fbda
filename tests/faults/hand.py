"""Faults of hand: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    ("hand/official.py", "kind = PICKLE_NAMES.get(f\"{module}.{name}\")", "kind = PICKLE_NAMES.get(f\"{module}.{name}\", \"set\")", "hand/test_official.py", "payloads"),
]
