"""Faults of eval: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    ("eval.py", "area = (99.5 - torch.searchsorted(limits, error, right=True)", "area = (99.5 - torch.searchsorted(limits, error)", "test_eval.py", "zero_under_every"),
    ("eval.py", "mpjpe(f[\"joints\"], f[\"true\"], ok), pa_mpjpe(f[\"joints\"], f[\"true\"], ok, reflect=True)",
     "mpjpe(f[\"joints\"], f[\"true\"], ok), pa_mpjpe(f[\"joints\"], f[\"true\"], ok)", "test_eval.py", "reflections"),
    ("eval.py", "wide = torch.cat([error.masked_fill(left, math.nan), error.masked_fill(~left, math.nan)], 1)", "wide = error",
     "test_eval.py", "joints_first"),
]
