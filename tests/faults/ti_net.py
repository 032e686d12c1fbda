"""Faults of ti_net: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    ("ti_net.py", "sign = -1 if then.flip else 1", "sign = 1", "test_ti_net.py", "table_1"),
    ("ti_net.py", "return v + self.M(self.N(code))", "return v - self.M(self.N(code))", "test_ti_net.py", "operators_match"),
    # orders
    ("ti_net.py", "number(compose(one.element, two.element)))", "number(compose(two.element, one.element)))", "test_ti_net.py", "losses_match"),
    ("ti_net.py", "secondary = [apply(two, firsts[one])", "secondary = [apply(one, firsts[one])",
     "test_ti_net.py", "losses_match"),
    ("ti_net.py", "return cut @ turn @ flip(flips, square)", "return cut @ flip(flips, square).to(turn) @ turn", "test_ti_net.py", "one_step_after"),
    ("ti_net.py", "return 2 * math.pi * uniform(index, 4, cfg.seed", "return 360 * uniform(index, 4, cfg.seed", "test_ti_net.py", "fill_the_circle"),
    ("ti_net.py", "xy = 10 * camera[:, None, :1].exp()", "xy = 10 * camera[:, None, :1]", "test_ti_net.py", "back_in_the_picture"),
    # detached, masked, counted
    ("ti_net.py", "self.extra(torch.cat([f, theta], 1).detach())", "self.extra(torch.cat([f, theta], 1))", "test_ti_net.py", "does_not_reach"),
    ("ti_net.py", 'ok.any(1) & ~has["pose"])', 'ok.any(1))', "test_ti_net.py", "without_a_label"),
    ("ti_net.py", "self.decoded = list(range(len(self.plan.pictures)))", "self.decoded = [0]", "test_ti_net.py", "mean_over_all"),
    ("ti_net.py", "    if element not in pictures:\n            pictures.append(element)", "    pictures.append(element)", "test_ti_net.py", "number_of_pictures"),
    ("ti_net.py", "square = S if corners else math.ceil(S * math.sqrt(2))", "square = S", "test_ti_net.py", "black_corners"),
    ("ti_net.py", "nn.init.zeros_(self.M.weight)", "pass", "test_ti_net.py", "start_at_the_identity"),
    ("ti_net.py", "return difference.square().mean()", "return difference.square().sum()", "test_ti_net.py", "mean_square"),
    ("ti_net.py", "with autocast(views.device):", "if True:",
     "test_ti_net.py", "bfloat16"),
    ("ti_net.py", 'ok = batch["joints_ok"] & batch["joints_ok"][:, :1]', 'ok = batch["joints_ok"]', "test_ti_net.py", "without_a_wrist"),
]
