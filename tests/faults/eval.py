"""Faults of eval: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    ("sources/freihand.py", "first = torch.searchsorted(limits, error, right=True)", "first = torch.searchsorted(limits, error)",
     "test_eval.py", "zero_under_every"),
    ("sources/dexycb.py", 'aligned = pa_mpjpe(f["joints"], f["true"], ok, reflect=True)', 'aligned = pa_mpjpe(f["joints"], f["true"], ok)',
     "test_eval.py", "reflections"),
    ("sources/interhand.py", "wide = torch.cat([error.masked_fill(left, math.nan), error.masked_fill(~left, math.nan)], 1)", "wide = error",
     "test_eval.py", "joints_first"),
]
