"""Faults of tests/claims: file, line as it stands, line as broken, the test file and the part of the test's name."""

PLAN, SIT, MEASURE, VERDICT, SHOW = (f"tests/claims/{name}.py" for name in ("plan", "sitting", "measure", "verdict", "show"))
ALGEBRAIC, TEST = "tests/claims/lt_algebraic.py", "test_reproduce.py"

FAULTS = [(file, old, new, TEST, words) for file, old, new, words in [
    (PLAN, "return max(1, round(budget * scale.unit / (views * samples_of(weights, scale))))",
     "return max(1, round(budget * scale.unit / samples_of(weights, scale)))", "accept_every_planned and ti_net"),
    (PLAN, "1 - 2 * math.log(100) / steps", "1 - math.log(100) / steps", "teachers_momentum"),
    (SIT, "execute(words + [\"--resume\"] * out.exists(), ", "execute(words, ", "stopped_stage"),
    (SIT, "seconds = before + time.monotonic() - began", "seconds = time.monotonic() - began", "stopped_stage"),
    (SIT, "            child.terminate()\n", "", "interrupted_is_stopped"),
    (SIT, "found.sort(key=lambda one: one[:2])", "found.sort(key=lambda one: one[1])", "whole_seed"),
    (SIT, "if claim.tunings and scores[\"small_mpjpe_mm\"] > scores", "if False and scores[\"small_mpjpe_mm\"] > scores",
     "above_the_mean_pose"),
    (MEASURE, "X = {split: (x - mean) / scale for split, x in X.items()}", "X = {split: x - mean for split, x in X.items()}",
     "ridge_is"),
    (MEASURE, "errors(\"val\", weight).mean()", "errors(\"test\", weight).mean()", "ridge_is"),
    (MEASURE, "    X = X - X.mean(0)\n    C", "    C", "dimensions_are"),
    (ALGEBRAIC, "used = weight[b, joint] * others[view]", "used = weight[b, joint]", "vouch_for_itself"),
    (ALGEBRAIC, "~known, -1e9).softmax(-2)", "~known, -1e9).softmax(-1)", "weight_a_bad_view_less"),
    (ALGEBRAIC, "return torch.where(batch[\"view_ok\"][..., None, None], P, 0)", "return P", "views_that_are_missing"),
    (ALGEBRAIC, "        used.register_hook(lambda gradient: tamed(gradient, STEEPEST * share))\n", "        pass\n", "gradients_are_finite"),
    (ALGEBRAIC, "keepdim=True).clamp(min=1e-30)).clamp(max=1)", "keepdim=True).clamp(min=1e-30))", "derivative"),
    (ALGEBRAIC, "& others).sum(-1) > 1)", "& others).sum(-1) > 0)", "views_that_are_missing"),
    (ALGEBRAIC, "limit[b].square()).log1p()", "limit[0].square()).log1p()", "vouch_for_itself"),
    (ALGEBRAIC, "model(uv, c).mT)", "c.mT)", "weight_a_bad_view_less"),
    (VERDICT, "budget = 0 if without_pictures(row) else budget", "budget = budget", "serves_all_budgets"),
    (VERDICT, "than[:, drawn]", "than[:, drawn[::-1]]", "drawn_alike"),
    (VERDICT, "gains.std(ddof=1)", "gains.std()", "interval_over_seeds"),
    (VERDICT, "if seeds[0] > 0 and hands[0] > 0 and", "if seeds[0] > 0 and", "few_hands"),
    (VERDICT, "if seeds[1] < least:", "if seeds[1] < 0:", "follow_the_plans_rule"),
    (SHOW, "return f\"{before}{BEGIN}\\n\\n{block}\\n\\n{END}{after}\"", "return f\"{before}{BEGIN}\\n\\n{block}\\n\\n{END}\"",
     "between_the_marks"),
]]
