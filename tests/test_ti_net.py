"""TI-Net: Table 1, Eq. 2 and 3, Algorithm 1, each decision of the docstring, the command line."""
import ast
import dataclasses
import inspect
import json
import math

import pytest
import torch

import handmim
import ti_net
from common import Mano, UserError, axis_angle_to_matrix, settle, transform
from hand.builtin import builtin_hand
from ti_net import (Config, Element, HandNet, Operators, TINet, collapse_monitors, compose,
                    constraint_plan, distance, finetune_step, hand_view, lr_at, make_views,
                    ordinary_loss, pretrain_step, rotation_loss, secondary_loss, view_transforms)

TINY = dict(backbone="resnet10", image_size=64, batch_size=2, micro_batch=2, rank=8, embed_dim=4,
            decoder_width=4)
EXACT = torch.float64


def batch_of(n=2, size=96, dtype=torch.float32):
    torch.manual_seed(3)
    return {"image": (255 * torch.rand(n, 3, size, size)).to(dtype), "index": torch.arange(n)}


# ---- Table 1

A1, A2, B1, B2 = (tuple(int(j == k) for j in range(4)) for k in range(4))
NO = (0, 0, 0, 0)


def turns(*signs):
    return tuple(signs)


# rows H, R_a1, HR_a2; columns H, R_b1, HR_b2, as the paper prints them: (flip, a1, a2, b1, b2)
TABLE_1 = [[(0, 0, 0, 0, 0), (1, 0, 0, 1, 0), (0, 0, 0, 0, 1)],
           [(1, -1, 0, 0, 0), (0, 1, 0, 1, 0), (1, -1, 0, 0, 1)],
           [(0, 0, -1, 0, 0), (1, 0, 1, 1, 0), (0, 0, -1, 0, 1)]]
FIRST = [Element(1, NO), Element(0, A1), Element(1, A2)]
THEN = [Element(1, NO), Element(0, B1), Element(1, B2)]


def matrix(element, angles):
    """2x2 oracle typed from the text: flip first, then turn counter-clockwise (y down)."""
    a = sum(t * x for t, x in zip(element.turns, angles))
    R = torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]], dtype=EXACT)
    return R @ torch.tensor([[-1.0 if element.flip else 1.0, 0], [0, 1]], dtype=EXACT)


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("j", range(3))
def test_table_1_cell(i, j):
    flip, *angles = TABLE_1[i][j]
    assert compose(FIRST[i], THEN[j]) == Element(flip, tuple(angles))
    values = (0.3, 1.9, -2.2, 4.4)
    product = matrix(THEN[j], values) @ matrix(FIRST[i], values)          # the row acts first
    assert torch.allclose(matrix(compose(FIRST[i], THEN[j]), values), product, atol=1e-12)


def test_the_right_to_left_reading_breaks_seven_cells_of_table_1():
    values, wrong = (0.3, 1.9, -2.2, 4.4), 0
    for i in range(3):
        for j in range(3):
            flip, *angles = TABLE_1[i][j]
            swapped = matrix(FIRST[i], values) @ matrix(THEN[j], values)
            wrong += not torch.allclose(matrix(Element(flip, tuple(angles)), values), swapped)
    assert wrong == 7


@pytest.mark.parametrize("variant, count", [((), 12), (("algorithm-1",), 11), (("five-ordinary",), 14)])
def test_number_of_pictures(variant, count):
    plan = constraint_plan(variant)
    assert len(plan.pictures) == count and len(set(plan.pictures)) == count
    assert plan.pictures[0] == Element(0, NO) and len(plan.secondary) == 9


def test_each_sample_is_encoded_twelve_times():
    cfg = Config(**TINY)
    model, seen = TINet(cfg), []
    model.backbone.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    pretrain_step(model, batch_of(3), cfg, 0)
    assert sum(seen) == 36


def moved(element, variant):
    """The 3x3 matrix of one element in a 64 px picture, for fixed angles."""
    cfg, plan = Config(**TINY, variant=variant), constraint_plan(())
    angles = torch.tensor([[0.7, 2.0, 4.0, 5.5]], dtype=EXACT)
    eye = torch.eye(3, dtype=EXACT)[None]
    return view_transforms(angles, eye, plan._replace(pictures=[element]), cfg, 64)[0, 0]


@pytest.mark.parametrize("i, j", [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_composed_pictures_equal_one_step_after_the_other(i, j):
    """Table 1 in pixels needs flip and turn about one centre, (W - 1) / 2; W / 2 is a pixel off."""
    both = {}
    for variant in (("black-corners",), ("black-corners", "half-pixel")):
        one_by_one = moved(THEN[j], variant) @ moved(FIRST[i], variant)
        both[variant] = (one_by_one - moved(compose(FIRST[i], THEN[j]), variant)).abs().max()
    exact, off = both.values()
    assert exact < 1e-9 and off > 0.3


def test_no_view_has_black_corners():
    cfg = Config(**TINY)
    batch = {"image": torch.full((8, 3, 96, 96), 255, dtype=torch.uint8), "index": torch.arange(8)}
    white = lambda cfg: make_views(batch, cfg, 0, constraint_plan(()))[0].amin()
    assert white(cfg) > 2.0                                               # 255 is (1 - .485) / .229 = 2.25 up
    assert white(dataclasses.replace(cfg, variant=("black-corners",))) < -1.5


def test_angles_fill_the_circle_in_radians():
    angles = ti_net.draw_angles(torch.arange(4000), Config(), 0)
    assert angles.shape == (4000, 4) and 0 <= angles.min() and angles.max() < 2 * math.pi
    assert torch.allclose(angles.mean(0), torch.full((4,), math.pi), atol=0.12)


def test_small_angles_are_within_30_degrees_to_both_sides():
    angles = ti_net.draw_angles(torch.arange(4000), Config(variant=("small-angles",)), 0) * 180 / math.pi
    assert -30 <= angles.min() < -29.9 and 29.9 < angles.max() <= 30
    assert torch.allclose(angles.mean(0), torch.zeros(4), atol=1.5) and torch.allclose(angles.std(0), torch.full((4,), 17.3), atol=0.5)


def test_views_turn_as_the_angles_say():
    """A picture with a bright dot right of the centre: R_a moves it counter-clockwise by a."""
    cfg = Config(**TINY)
    batch = batch_of(4)
    plan = constraint_plan(())
    views, angles, A = make_views(batch, cfg, 0, plan)
    assert views.shape == (4, 12, 3, 64, 64) and angles.shape == (4, 4)
    k = plan.pictures.index(Element(0, A1))
    turn = (A[:, k] @ torch.linalg.inv(A[:, 0]))[:, :2, :2]
    c, s = angles[:, 0].cos(), angles[:, 0].sin()
    assert torch.allclose(turn, torch.stack([torch.stack([c, s], 1), torch.stack([-s, c], 1)], 1), atol=1e-4)
    again, *_ = make_views({k: v[1:3] for k, v in batch.items()}, cfg, 0, plan)
    assert torch.allclose(again, views[1:3], atol=1e-6)                   # a sample ignores its batch
    other, *_ = make_views(batch, cfg, 1, plan)
    assert not torch.allclose(other, views, atol=0.1)                     # and heeds the epoch


# ---- Eq. 2 and 3 against the golden arrays


def golden_operators(g):
    cfg = Config(rank=3, embed_dim=4)
    operators = Operators(12, cfg).double()
    t = lambda name: torch.tensor(g[f"tinet_{name}"])
    with torch.no_grad():
        for name in ("H", "R", "HR"):
            operators.T[name].N.weight.copy_(t(f"N_{name}"))
            operators.T[name].M.weight.copy_(t(f"M_{name}"))
        for k, name in ((0, "K1"), (2, "K2"), (4, "K3")):
            operators.K[k].weight.copy_(t(name))
            if k < 4:
                operators.K[k].bias.copy_(t(name + "b"))
    return operators


ORDER = {"I": (0, NO), "H": (1, NO), "R(a1)": (0, A1), "HR(a2)": (1, A2), "R(b1)": (0, B1),
         "HR(b2)": (1, B2), "HR(b1)": (1, B1), "HR(-a1)": (1, (-1, 0, 0, 0)), "R(b2)": (0, B2),
         "R(a1+b1)": (0, (1, 0, 1, 0)), "R(-a2)": (0, (0, -1, 0, 0)), "HR(b2-a1)": (1, (-1, 0, 0, 1)),
         "HR(a2+b1)": (1, (0, 1, 1, 0)), "R(b2-a2)": (0, (0, -1, 0, 1))}


def test_operators_match_golden(golden):
    g = golden("ti_net")
    operators, v = golden_operators(g), torch.tensor(g["tinet_latents"][0])
    a1, a2 = torch.tensor(g["tinet_a1"]), torch.tensor(g["tinet_a2"])
    embedded = operators.K(torch.stack([a1.cos(), a1.sin()], -1))
    for found, name in ((operators("H", v, None), "TH"), (operators("R", v, a1), "TR_a1"),
                        (operators("HR", v, a2), "THR_a2"), (embedded, "embed_a1")):
        assert torch.allclose(found, torch.tensor(g[f"tinet_{name}"]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("variant", [("five-ordinary",), ()])
def test_losses_match_golden(golden, variant):
    g = golden("ti_net")
    plan = constraint_plan(variant)
    names = [ORDER[n] for n in g["tinet_image_order"]]
    latents = torch.tensor(g["tinet_latents"])
    v = torch.stack([latents[names.index(tuple(e))] for e in plan.pictures], 1)
    angles = torch.stack([torch.tensor(g[f"tinet_{n}"]) for n in ("a1", "a2", "b1", "b2")], 1)
    model = TINet.__new__(TINet)
    torch.nn.Module.__init__(model)
    model.plan, model.operators = plan, golden_operators(g)
    with torch.no_grad():
        ordinary, secondary, identity = model.move(v[:, 0], angles)
    each = [float(distance(v[:, p], secondary[:, k])) for k, (*_, p) in enumerate(plan.secondary)]
    assert torch.allclose(torch.tensor(each, dtype=EXACT), torch.tensor(g["tinet_sec"]).flatten(), atol=1e-13)
    L_ord, L_sec = ordinary_loss(v, ordinary, plan), secondary_loss(v, secondary, plan)
    L_id = distance(identity, v[:, 0])
    assert abs(float(L_id) - float(g["tinet_iden"])) < 1e-13
    if variant:                                                           # the code: identity, 5, 9
        assert abs(float(L_id + L_ord + L_sec) - float(g["tinet_total_code"])) < 1e-12
    else:                                                                 # the paper: 3, 9
        assert abs(float(L_ord + L_sec) - float(g["tinet_total_paper"])) < 1e-12


def test_operators_start_at_the_identity_and_have_low_rank():
    operators, v = Operators(12, Config(rank=3, embed_dim=4)), torch.randn(5, 12)
    angle = torch.rand(5)
    for name in ("H", "R", "HR"):
        assert torch.equal(operators(name, v, angle), v)
    random = Operators(12, Config(rank=3, embed_dim=4, variant=("random-m",)))
    change = random("H", v, None) - v
    assert change.abs().max() > 0.01 and torch.linalg.matrix_rank(change.detach()) == 3


def test_distance_is_a_mean_square_or_a_mean_norm():
    a, b = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert float(distance(a, b)) == pytest.approx((9 + 16 + 4) / 4)
    assert float(distance(a, b, unsquared=True)) == pytest.approx((5 + 2) / 2)


def linear_part(operators, angle):
    """A of T_R(v; a) = A v + b(a), as the Jacobian at two latents, which must agree."""
    at = lambda v: torch.autograd.functional.jacobian(lambda u: operators("R", u[None], torch.tensor([angle], dtype=EXACT))[0], v)
    A, again = at(torch.zeros(6, dtype=EXACT)), at(torch.randn(6, dtype=EXACT))
    assert torch.allclose(A, again, atol=1e-12)
    return A


def test_the_proof_of_limit_15_holds_step_by_step():
    """A does not know the angle; a = 0 makes it the identity on differences; then turns can only shift, and add up."""
    torch.manual_seed(2)
    torch.set_default_dtype(EXACT)
    try:
        operators = Operators(6, Config(rank=3, embed_dim=4, variant=("random-m",)))
        modulated = Operators(6, Config(rank=3, embed_dim=4, variant=("random-m", "modulated")))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(linear_part(operators, 0.3), linear_part(operators, 2.5), atol=1e-12)
    assert not torch.allclose(linear_part(modulated, 0.3), linear_part(modulated, 2.5), atol=1e-3)
    # the best A and b(a) of any kind on 8 latents and their 16 turns: no error only where nothing turns
    left = {}
    for spread in (0.0, 1.0):
        still, moved = torch.randn(8, 1, 6, dtype=EXACT), torch.randn(8, 16, 6, dtype=EXACT)
        orbit = still + spread * (moved - moved.mean(1, keepdim=True))               # (pictures, turns, d)
        X, Y = [], []
        for a in range(16):                                                          # v(turn k + a) = A v(turn k) + b(a)
            one_hot = torch.zeros(8 * 16, 16, dtype=EXACT)
            one_hot[:, a] = 1
            X.append(torch.cat([orbit.flatten(0, 1), one_hot], 1))
            Y.append(orbit.roll(-a, 1).flatten(0, 1))
        X, Y = torch.cat(X), torch.cat(Y)
        solved = torch.linalg.lstsq(X, Y).solution
        left[spread] = float((Y - X @ solved).square().mean())
        if not spread:                                      # exact latents: A is the identity on differences, b is 0
            differences = still[1:, 0] - still[:1, 0]
            assert torch.allclose(differences @ solved[:6], differences, atol=1e-9)
            assert torch.allclose(still[0] @ solved[:6] + solved[6:], still[0].expand(16, 6), atol=1e-9)
    assert left[0.0] < 1e-18 and left[1.0] > 0.5


def test_eq_3_cannot_rotate_but_the_modulated_operator_can():
    """Docstring 15: the best A v + b(a), any b, leaves all of a perfectly equivariant latent unexplained."""
    theta = torch.linspace(0, 2 * math.pi, 65, dtype=EXACT)[:-1]
    v = torch.stack([theta.cos(), theta.sin()], 1)
    X, Y = [], []
    for k, a in enumerate(theta[::4]):
        one_hot = torch.zeros(64, 16, dtype=EXACT)
        one_hot[:, k] = 1
        X.append(torch.cat([v, one_hot], 1))
        Y.append(torch.stack([(theta + a).cos(), (theta + a).sin()], 1))
    X, Y = torch.cat(X), torch.cat(Y)
    left = Y - X @ torch.linalg.lstsq(X, Y).solution
    assert left.square().sum() / Y.square().sum() > 0.999

    operators = Operators(2, Config(rank=4, embed_dim=4, variant=("modulated",))).double()
    pair = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=EXACT)
    with torch.no_grad():                                     # e = (cos, sin, 0, 0); g = (c-1, c-1, s, s)
        for p in operators.parameters():
            p.zero_()
        operators.K[0].weight.copy_(pair)
        operators.K[2].weight.copy_(torch.eye(4))
        operators.K[4].weight[:2] = pair.T
        T = operators.T["R"]
        T.N.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, -1], [1, 0]]))
        T.M.weight.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))
        T.g.weight[:2, 0] = 1
        T.g.weight[2:, 1] = 1
        T.g.bias[:2] = -1
        turned = operators("R", v, torch.full_like(theta, 0.9))
    assert torch.allclose(turned, torch.stack([(theta + 0.9).cos(), (theta + 0.9).sin()], 1), atol=1e-12)


def test_monitors_tell_collapse_from_isomorphism():
    plan = constraint_plan(())
    v, moved = torch.randn(64, 12, 8), torch.randn(64, 3, 8)
    out = lambda v, moved: ti_net.Moved(v, moved, moved, moved[:, 0], None)
    still = v[:, :1].expand(-1, 12, -1)
    assert float(collapse_monitors(out(still, moved), plan)["turn_change"]) == 0
    k = plan.pictures.index(Element(0, A1))
    good = moved.clone()
    good[:, 1] = v[:, k]
    assert float(collapse_monitors(out(v, good), plan)["residual"]) == 0
    same = v[:, :1].expand(-1, 3, -1)
    assert float(collapse_monitors(out(v, same), plan)["residual"]) == pytest.approx(1)
    assert float(collapse_monitors(out(torch.ones(64, 12, 8), moved), plan)["variance"]) == 0
    # the numbers themselves, from their words
    found = {name: float(x) for name, x in collapse_monitors(out(v, moved), plan).items()}
    source, turned, guess = v[:, 0], v[:, k], moved[:, 1]
    variance = sum(float(x.var(correction=0)) for x in source.T) / 8
    change = float((turned - source).square().mean())
    assert found["variance"] == pytest.approx(variance, rel=1e-5)
    assert found["turn_change"] == pytest.approx(change / variance, rel=1e-5)
    assert found["residual"] == pytest.approx(float((turned - guess).square().mean()) / change, rel=1e-5)


def test_dimensions_see_a_collapse_onto_one_axis_that_variance_does_not():
    plan = constraint_plan(())

    def dimensions(source):
        v = source[:, None].expand(-1, 12, -1)
        return float(collapse_monitors(ti_net.Moved(v, v[:, :3], v[:, :9], source, None), plan)["dimensions"])

    torch.manual_seed(4)
    spread, line = torch.randn(64, 8) + 3, torch.randn(64, 1) * torch.randn(8) * 9 + 5
    eigenvalues = torch.linalg.eigvalsh(torch.cov(spread.T))
    assert dimensions(spread) == pytest.approx(float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()), rel=1e-4)
    assert dimensions(spread) > 6 and dimensions(line) == pytest.approx(1, abs=1e-4)
    assert dimensions(torch.ones(64, 8)) == 0 and dimensions(torch.randn(5, 800)) > 3.5      # at most B - 1


# ---- A step, its variants and its processes


def two_steps(variant):
    torch.manual_seed(0)
    cfg = Config(**TINY | dict(backbone="vit_mini", image_size=16), variant=variant, w=1.0)
    model, batch = TINet(cfg), batch_of(size=24)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for epoch in range(2):
        terms = pretrain_step(model, batch, cfg, epoch)
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(terms["loss"].detach()), model.backbone.patch_embed.proj.weight.detach().clone()


@pytest.fixture(scope="module")
def plain():
    return two_steps(())


@pytest.mark.parametrize("variant", sorted(ti_net.VARIANTS))
def test_variant_changes_loss_and_weights(plain, variant):
    loss, weight = two_steps((variant,))
    assert abs(loss - plain[0]) > 1e-6 * abs(plain[0]), "the loss after two steps is the same"
    assert not torch.equal(weight, plain[1]), "the weights after two steps are the same"


def test_two_equal_runs_are_equal(plain):
    loss, weight = two_steps(())
    assert loss == plain[0] and torch.equal(weight, plain[1])


def test_the_loss_is_eq_1():
    cfg = Config(**TINY, w=0.25)
    torch.manual_seed(0)
    terms = pretrain_step(TINet(cfg), batch_of(), cfg, 0)
    total = terms["L_classic"] + 0.25 * (terms["L_ord"] + terms["L_sec"] + terms["L_id"])
    assert torch.allclose(terms["loss"], total)
    assert float(terms["L_id"].detach()) == 0 and float(terms["L_ord"].detach()) > 0        # T starts as the identity


def test_reconstruction_is_the_mean_over_all_pictures():
    cfg = Config(**TINY)
    torch.manual_seed(0)
    model, batch = TINet(cfg), batch_of()
    views, angles, _ = make_views(batch, cfg, 0, model.plan)
    out = model(views, angles)
    expected = sum(float(((out.pictures[:, k] - views[:, k]) ** 2).mean()) for k in range(12)) / 12
    torch.manual_seed(0)
    again = TINet(cfg)
    assert float(pretrain_step(again, batch, cfg, 0)["L_classic"]) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_for_the_network_only():
    """The encoder computes in bfloat16, but views, angles and losses do not."""
    cfg, batch, seen = Config(**TINY, precision="bf16"), batch_of(), {}
    torch.manual_seed(0)
    model = TINet(cfg)
    model.register_forward_pre_hook(lambda _, x: seen.update(views=x[0]))
    model.backbone.register_forward_hook(lambda _, x, y: seen.update(map=y[-1]))
    model.operators.K.register_forward_hook(lambda _, x, y: seen.update(e=y.dtype))
    terms = pretrain_step(model, batch, cfg, 0)
    assert seen["map"].dtype == torch.bfloat16 and seen["e"] == torch.float32 and terms["loss"].dtype == torch.float32
    assert torch.equal(seen["views"], make_views(batch, cfg, 0, model.plan)[0])


def test_a_hand_without_a_wrist_is_no_target():
    cfg, batch = Config(**TINY), hand_batch()
    batch["has"]["pose"] = torch.zeros(2, dtype=torch.bool)
    batch["joints"][0, 0] = math.nan
    batch["joints_ok"] = batch["joints"].isfinite().all(-1)
    theta = torch.zeros(2, 48, requires_grad=True)
    finetune_step(Perfect(theta, torch.zeros(2, 10)), batch, cfg)["L_joints"].backward()
    assert theta.grad[0].abs().sum() == 0 and theta.grad[1].abs().sum() > 0


def test_bfloat16_is_for_the_training_of_the_back_bone_only():
    torch.manual_seed(0)
    cfg = Config(**TINY, precision="bf16")
    net, seen = HandNet(cfg), {}
    net.backbone.register_forward_hook(lambda _, x, y: seen.update(map=y[-1].dtype))
    net.head.register_forward_hook(lambda _, x, y: seen.update(f=x[0].dtype, theta=y.dtype))
    net.extra.register_forward_hook(lambda _, x, y: seen.update(extra=y.dtype))
    for call, kind in ((lambda: finetune_step(net, hand_batch(), cfg), torch.bfloat16),
                       (lambda: net.predict(hand_batch()), torch.float32)):
        seen.clear()
        call()
        assert seen == {"map": kind, "f": torch.float32, "theta": torch.float32, "extra": torch.float32}


def test_vit_uses_the_mean_patch_and_decodes_the_grid():
    cfg = Config(**TINY | dict(backbone="vit_mini", image_size=32))
    model = TINet(cfg)
    views = torch.randn(2, 12, 3, 32, 32)
    out = model(views, torch.rand(2, 4))
    assert out.v.shape == (2, 12, 128) and out.pictures.shape == (2, 12, 3, 32, 32)
    tokens = model.backbone.tokens(views[:, 0])[:, 1:].mean(1)
    assert torch.allclose(out.v[:, 0], tokens, atol=1e-5)


def test_rate_warms_up_and_falls_as_a_cosine():
    cfg = Config(batch_size=68, lr=1.5e-3, epochs=50, warmup_epochs=1.0)
    peak = 1.5e-3 * 68 / 256                                              # 3.984e-4
    assert lr_at(0, cfg, 100) == pytest.approx(peak / 100)
    assert lr_at(99, cfg, 100) == pytest.approx(peak)
    assert lr_at(100 + 2450, cfg, 100) == pytest.approx(peak / 2)
    assert lr_at(4999, cfg, 100) == pytest.approx(0, abs=1e-8)
    constant = Config(batch_size=128, warmup_epochs=0.0)
    assert lr_at(0, constant, 10) == lr_at(999, constant, 10) == pytest.approx(7.5e-4)


# ---- Fine-tuning


def test_rotation_loss_matches_scipy():
    from scipy.spatial.transform import Rotation
    torch.manual_seed(1)
    a, b = torch.randn(3, 48, dtype=EXACT), torch.randn(3, 48, dtype=EXACT)
    R = [Rotation.from_rotvec(x.reshape(-1, 3).numpy()).as_matrix() for x in (a, b)]
    expected = abs(R[0] - R[1]).reshape(3, -1).sum(1)
    assert rotation_loss(a, b).numpy() == pytest.approx(expected, rel=1e-10)


def hand_batch(n=2, size=96):
    torch.manual_seed(5)
    pose, shape = 0.3 * torch.randn(n, 48), 0.5 * torch.randn(n, 10)
    hand = Mano(builtin_hand())
    joints = hand.joints(axis_angle_to_matrix(pose.unflatten(-1, (16, 3))), shape)
    yes = torch.ones(n, dtype=torch.bool)
    return {"image": torch.randint(0, 255, (n, 3, size, size), dtype=torch.uint8), "joints": joints,
            "joints_ok": yes[:, None].expand(n, 21), "pose": pose, "shape": shape,
            "uv": size * torch.rand(n, 21, 2), "has": {"pose": yes, "joints": yes, "shape": yes},
            "index": torch.arange(n)}


class Perfect(torch.nn.Module):
    """Answers with given theta, beta, camera; projects and poses as HandNet."""

    def __init__(self, theta, beta):
        super().__init__()
        self.answer, self.size = (theta, beta, torch.zeros(len(theta), 3)), 64
        self.mano, self.boxed = Mano(builtin_hand()), torch.tensor(True)

    project = HandNet.project

    def forward(self, crops):
        return self.answer


def test_a_perfect_answer_has_no_loss_but_the_camera_s():
    cfg, batch = Config(**TINY), hand_batch()
    terms = finetune_step(Perfect(batch["pose"], batch["shape"]), batch, cfg)
    assert float(terms["L_theta"]) < 1e-5 and float(terms["L_beta"]) == 0
    assert float(terms["L_joints"]) == 0 and float(terms["L_camera"]) > 0.01


def test_samples_without_a_label_do_not_count():
    cfg, batch = Config(**TINY), hand_batch(3)
    batch["has"]["pose"] = torch.tensor([True, False, False])
    batch["has"]["joints"] = torch.tensor([True, True, False])
    batch["pose"][1:], batch["joints"][2], batch["uv"][2], batch["shape"][2] = (math.nan,) * 4
    batch["has"]["shape"] = torch.tensor([True, True, False])
    batch["joints_ok"] = torch.tensor([True, True, False])[:, None].expand(3, 21)
    theta = torch.zeros(3, 48, requires_grad=True)
    terms = finetune_step(Perfect(theta, torch.zeros(3, 10)), batch, cfg)
    terms["loss"].backward()
    alone = rotation_loss(torch.zeros(1, 48), batch["pose"][:1])
    assert torch.allclose(terms["L_theta"], alone.mean())
    flat = Mano(builtin_hand()).joints(torch.eye(3).expand(1, 16, 3, 3), torch.zeros(1, 10))[0]
    off = (flat - flat[0]) - (batch["joints"][1] - batch["joints"][1, 0])  # only sample 1 lacks a pose
    assert float(terms["L_joints"].detach()) == pytest.approx(10 * float(off.abs().sum()), rel=1e-4)
    assert theta.grad.isfinite().all() and theta.grad[1].abs().sum() > 0
    assert theta.grad[2].abs().sum() == 0


def test_the_extra_head_does_not_reach_the_backbone():
    """Docstring 14: shape and camera read detached features, so the paper's recipe is untouched."""
    cfg, batch = Config(**TINY), hand_batch()
    net = HandNet(cfg)
    torch.nn.init.normal_(net.extra[-1].weight)
    terms = finetune_step(net, batch, cfg)
    (terms["L_beta"] + terms["L_camera"]).backward()
    assert net.backbone.conv1.weight.grad is None and net.head[0].weight.grad is None
    assert net.extra[0].weight.grad.abs().sum() > 0


def test_prediction_is_rooted_posed_and_back_in_the_picture():
    cfg = Config(**TINY)
    net = HandNet(cfg).eval()
    image = torch.randint(0, 255, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        out = net.predict({"image": image})
    assert out["joints"].shape == (2, 21, 3) and out["verts"].shape == (2, 778, 3)
    assert out["pose"].shape == (2, 16, 3, 3) and out["shape"].shape == (2, 10)
    assert out["joints"][:, 0].abs().max() == 0
    # camera 0 puts the joints' box where the stored square has the hand's: in its middle, 1 / 1.7 of 96 px
    low, high = out["uv"].amin(1), out["uv"].amax(1)
    assert torch.allclose((low + high) / 2, torch.full((2, 2), 47.5), atol=1e-3)
    assert torch.allclose((high - low).amax(1), torch.full((2,), 96 / 1.7), atol=1e-2)
    spread = (out["joints"][..., :2].amax(1) - out["joints"][..., :2].amin(1)).amax(1)
    px = 96 / 1.7 / spread[:, None, None] * out["joints"][..., :2]
    assert torch.allclose(out["uv"] - out["uv"][:, :1], px, atol=1e-2)


def test_a_network_of_before_keeps_its_camera():
    """Its weights have no `boxed`: at camera 0 the wrist is central, and a metre spans ten half crops."""
    old, net = HandNet(Config(**TINY)), HandNet(Config(**TINY))
    net.load_state_dict({key: value for key, value in old.state_dict().items() if key != "boxed"})
    points = torch.tensor([[[0.0, 0.0, 0.0], [0.03, -0.05, 0.1]]])
    half = TINY["image_size"] / 2
    uv = net.project(torch.tensor([[0.0, 0.0, 0.0]]), points)
    assert torch.allclose(uv - (half - 0.5), torch.tensor([[[0.0, 0.0], [0.3 * half, -0.5 * half]]]), atol=1e-4)
    net.load_state_dict(old.state_dict())
    assert net.boxed and not torch.allclose(net.project(torch.tensor([[0.0, 0.0, 0.0]]), points), uv, atol=1)


def test_the_network_sees_the_middle_of_the_stored_square():
    image = torch.zeros(1, 3, 102, 102)
    image[:, :, 15:-15, 15:-15] = 255                                     # 72 of 102: 1.2 / 1.7
    crops, A = hand_view(image, 72)
    assert (crops.amin((2, 3)) > 1.5).all()
    assert torch.allclose(transform(A, torch.tensor([[[50.5, 50.5]]])), torch.tensor([[[35.5, 35.5]]]))


# ---- The command line


@pytest.mark.parametrize("name, value", [("w", 0.1), ("rank", 8), ("embed_dim", 8), ("decoder_width", 8),
                                         ("probe_every", 1), ("variant", ("disc",))])
def test_flags_of_pretraining_are_refused_in_fine_tuning(name, value):
    assert getattr(settle(Config, {name: value}, "pretrain", {}), name) == value
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: belongs to pre-training"):
        settle(Config, {name: value}, "finetune", {})


def test_each_stage_has_its_recipe_by_default():
    recipe = lambda stage: {name: getattr(settle(Config, {}, stage, {}), name) for name in (
        "backbone", "image_size", "epochs", "batch_size", "micro_batch", "lr", "warmup_epochs", "weight_decay")}
    assert recipe("pretrain") == dict(backbone="resnet50", image_size=224, epochs=50, batch_size=68, micro_batch=17,
                                      lr=1.5e-3, warmup_epochs=1.0, weight_decay=0.05)
    assert recipe("finetune") == dict(backbone="resnet50", image_size=224, epochs=120, batch_size=128, micro_batch=32,
                                      lr=1.5e-3, warmup_epochs=0.0, weight_decay=0.0)
    cfg = settle(Config, {}, "pretrain", {})
    assert (cfg.w, cfg.rank, cfg.embed_dim, cfg.decoder_width, cfg.probe_every, cfg.variant) == (1e-3, 128, 32, 256, 5, ())
    assert (ti_net.MARGIN, ti_net.STORE, ti_net.CROP, ti_net.CLIP) == (1.7, 1.5, 1.2, 5.0)


@pytest.mark.parametrize("given", [{}, {"epochs": 1}, {"epochs": 1, "quick": True}, {"epochs": 3, "warmup_epochs": 2.5}])
def test_no_step_is_above_the_peak_and_one_epoch_is_more_than_warm_up(given):
    cfg = settle(Config, given, "pretrain", ti_net.QUICK)
    steps, peak = 7, cfg.lr * cfg.batch_size / 256
    rates = [lr_at(t, cfg, steps) for t in range(cfg.epochs * steps)]
    assert max(rates) <= peak * (1 + 1e-9) and max(rates) > 0.9 * peak
    if "warmup_epochs" not in given:
        assert rates[-1] < 0.1 * peak                                     # the cosine has come down
    else:
        assert rates.index(max(rates)) == 17                              # 2.5 epochs of 7 steps, as given


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """run_stages with stages that only note what they were asked for."""
    calls = []
    monkeypatch.setattr(ti_net, "pretrain", lambda cfg, out, device: calls.append(("pretrain", cfg)))
    monkeypatch.setattr(ti_net, "finetune", lambda cfg, out, row, device: calls.append((row, cfg)))
    monkeypatch.setattr(ti_net, "report", lambda cfg, folder, row, *rest: calls.append(("report", (cfg, folder.name, rest[1:]))))
    (tmp_path / "pretrain-ti_net-disc").mkdir()                           # what a real pre-training leaves
    (tmp_path / "backbone.pt").write_bytes(b"")
    (tmp_path / "pretrain-ti_net-disc" / "config.json").write_text(
        json.dumps({"method": "ti_net", "cfg": {"data": ["synthetic:calm"], "init": "random", "variant": ["disc"]}}))
    return lambda given: (calls.clear(), ti_net.run_stages(given, tmp_path, torch.device("cpu")), calls[:])[-1], tmp_path


def test_quick_pretrains_then_fine_tunes_from_that(stages):
    run, out = stages
    found = run({"quick": True, "variant": ("disc",), "lr": 0.7})
    name = "ti_net-disc"
    assert [name for name, _ in found] == ["pretrain", name, "report"]
    (_, first), (_, tuned), (_, (last, folder, rest)) = found
    assert first.epochs == 1 and first.variant == ("disc",) and tuned.epochs == 15
    assert tuned.init == str(out / "backbone.pt") and last == tuned
    assert tuned.finetune == "synthetic:calm" and {c.lr for c in (first, tuned)} == {0.7}
    assert folder == f"finetune-{name}" and rest == (ti_net.build, 96, 1.7)
    assert run({"quick": True, "finetune": "dexycb=X"})[1][1].finetune == "dexycb=X"


def test_one_command_runs_one_stage(stages):
    run, out = stages
    (name, cfg), = run({"data": ("imagenet=X",)})
    assert name == "pretrain" and cfg.data == ("imagenet=X",) and cfg.epochs == 50
    (row, cfg), (name, (last, folder, rest)) = run({"finetune": "dexycb", "init": str(out / "backbone.pt")})
    assert (row, name, folder) == ("ti_net-disc-on-synthetic-calm", "report", f"finetune-{row}") and last == cfg and cfg.epochs == 120
    assert cfg.init == str(out / "backbone.pt") and rest == (ti_net.build, 336, 1.7)
    assert run({"finetune": "dexycb", "row": "mine"})[0][0] == "mine"


def test_the_hand_has_the_joints_of_the_data_it_is_tuned_on():
    tips = {spec: HandNet(Config(**TINY, finetune=spec, mano="builtin")).mano.tips.tolist()
            for spec in ("dexycb:s1=DIR", "freihand", "synthetic:calm", "")}
    assert tips == {"dexycb:s1=DIR": [745, 317, 444, 556, 673], "freihand": [744, 320, 443, 555, 672],
                    "synthetic:calm": [744, 320, 443, 554, 671], "": [744, 320, 443, 554, 671]}


def test_pictures_are_named_as_table_1_names_them():
    names = [ti_net.element_name(element) for element in constraint_plan(()).pictures]
    assert names == ["I", "H", "R a1", "HR a2", "HR b1", "R b2", "HR -a1", "R a1+b1", "HR -a1+b2", "R -a2", "HR a2+b1",
                     "R -a2+b2"]
    assert ti_net.element_name(constraint_plan(("algorithm-1",)).pictures[7]) == "R 2b1"


def test_a_decoder_needs_whole_cells():
    with pytest.raises(UserError, match="--image-size 40.*stride 32"):
        TINet(Config(**TINY | dict(image_size=40)))


@pytest.mark.parametrize("name", ["masked", "some"])
def test_twins_of_handmim_agree(name):
    def body(module):
        function = ast.parse(inspect.getsource(getattr(module, name))).body[0]
        return [ast.dump(line) for line in function.body if not isinstance(getattr(line, "value", None), ast.Constant)]

    assert body(ti_net) == body(handmim) and f"# twin: handmim.py:{name}" in inspect.getsource(ti_net)
