"""Faults of sources/runs.py and sources/progress.py: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    ("sources/runs.py", "for k, v in stored.items()} | given", "for k, v in (given | stored).items()}", "sources/test_runs.py", "remembers"),
    # one trained thing
    ("sources/progress.py", "\"seed\", \"samples\", \"precision\")}", "\"seed\", \"samples\")}", "test_common_run.py", "another_precision"),
    ("sources/progress.py", "stored = {\"precision\": \"fp32\" if device.type == \"cpu\" else \"bf16\"} | state[\"cfg\"]", "stored = state[\"cfg\"]", "test_common_run.py", "another_precision"),
    ("sources/progress.py", "device=str(device), precision=cfg.precision)", "device=str(device), precision=\"auto\")", "test_common_run.py", "another_precision"),
    ("sources/progress.py", 'self.log = Log(folder, state["log_bytes"] if state else 0)', "self.log = Log(folder, 10 ** 9)", "test_common_run.py", "cuts_its_log"),
    ("sources/progress.py", 'optimizer.load_state_dict(state["optimizer"])\n', "pass\n", "test_common_run.py", "optimiser_back"),
    ("sources/progress.py", 'self.lost = self.lost | ~terms["loss"].isfinite()', 'self.lost = ~terms["loss"].isfinite() & self.lost', "test_common_run.py", "lost_loss"),
]
