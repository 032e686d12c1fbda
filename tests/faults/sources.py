"""Faults of sources: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    ("sources/loader.py", "order = torch.cat([order + k * again for k in", "order = torch.cat([order for k in", "sources/test_loader.py", "taken_again"),
    ("sources/loader.py", "micro = order.view(steps, -1, cfg.micro_batch)[first:,", "micro = order.view(steps, -1, cfg.micro_batch)[:steps - first,",
     "sources/test_loader.py", "goes_on_where"),
    ("sources/interhand.py", "INTERHAND_TO_OURS = (20, 3, 2, 1, 0,", "INTERHAND_TO_OURS = (20, 0, 1, 2, 3,", "sources/test_interhand.py", "interhand"),
    ("sources/interhand.py", 'column["world"] - column["campos"][:, None]) / 1000', 'column["world"] - column["campos"][:, None]) / 100',
     "sources/test_interhand.py", "interhand"),
    ("sources/hands.py", 'M[v] = D @ index.columns["cameras"][row] @ D',
     'M[v] = index.columns["cameras"][row]', "sources/test_cameras.py", "left_hands_are_mirrored"),
    ("sources/stages.py", '"joints": mean(t["joints"] - t["joints"][:, :1]),', '"joints": mean(t["joints"]),', "test_common_metrics.py", "mean_hand_is_rooted"),
]
