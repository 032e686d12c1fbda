"""README's "What to copy" is true: each piece, with what it needs and no more, works in an empty folder.

TABLE is README's own. A place is a file and what to take from it: its banners, or names in `code`, or
its head, or the whole. What a piece needs are packages and places. A test takes the text out of the files as a
reader would, with those of the file's import lines that it uses, into one module of an otherwise empty
folder, forbids every package of ours and of requirements.txt that is not named, and calls the piece.
The head of a file is what stands above its first banner.
"""
import ast
import builtins
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = """
| 3x3 transforms and `warp` | `common.py`, Transforms | torch |
| counter-based draws | `common.py`, Draws | torch |
| MANO in NumPy and in Torch | `common.py`, MANO | numpy, torch; `common.py`, head |
| the reader of MANO's file | `hand/official.py`, whole | numpy; `common.py`, head, `MANO_PARENTS` |
| the built-in hand | `hand/builtin.py`, whole | numpy, scipy, torch; `common.py`, head, Draws, `MANO_PARENTS` |
| back-bones | `common.py`, Back-bones | torch, torchvision; `common.py`, head, `load_checkpoint` |
| colours and blur | `common.py`, Augmentation | torch |
| Procrustes and the scores | `common.py`, Metrics | torch; `common.py`, head, Transforms |
| TI-Net: constraints, operators, losses | `ti_net.py`, `Element`, `NO_TURN`, `compose`, `Operation`, `Plan`, `operations`, `constraint_plan`, `Operator`, `Operators`, `distance`, `ordinary_loss`, `secondary_loss`, `reconstruction_loss` | torch |
| PeCLR: undoing a view, the loss, LARS | `peclr.py`, `undo_view`, `nt_xent`, `Lars` | torch |
| PeCLR: a step over a batch larger than the memory, of your own `projections` | `peclr.py`, `cached_step`, `contrast`, `contrast_monitors`, `gathered`, `nt_xent` | torch; `common.py`, `accumulate`, `rank`, `world` |
| PeCLR: 2.5D to 3D | `peclr.py`, `root_depth`, `lift` | torch |
| HandMIM: moving and undoing points, masks, decoder, rectifier | `handmim.py`, `View`, `turn`, `move`, `undo`, `block_mask`, `Decoder`, `PointMlp`, `Rectifier` | torch; `common.py`, head |
| HaMuCo: alignment with its derivative | `hamuco.py`, `best_rotation`, `align` | torch |
| HaMuCo: triangulation, RANSAC, robust refinement | `hamuco.py`, `RANSAC_PX`, `triangulate`, `reproject`, `ransac`, `refine` | torch |
"""
FORBIDDEN = {"common", "hand", "sources", "ti_net", "peclr", "handmim", "hamuco", "eval", "matplotlib", "numpy", "PIL",
             "pytest", "scipy", "torchvision", "tqdm"}
CALLS = {
    "3x3 transforms and `warp`": """
        A = rotation(torch.tensor([torch.pi / 2]), 5) @ scale(torch.tensor([1.0]), 5)
        picture = torch.arange(25.0).view(1, 1, 5, 5)
        assert torch.allclose(warp(picture, A, 5), picture.rot90(1, (2, 3)), atol=1e-4)
        assert torch.allclose(transform(A, torch.tensor([[[4.0, 2]]])), torch.tensor([[[2.0, 0]]]), atol=1e-5)
        K = torch.tensor([[[100.0, 0, 2], [0, 100, 2], [0, 0, 1]]])
        points = torch.rand(1, 6, 3) + torch.tensor([0, 0, 1.0])
        assert torch.allclose(place(points - 1, project(points, K), K), torch.ones(1, 3), atol=1e-3)""",
    "counter-based draws": """
        index = torch.arange(4)
        assert torch.equal(uniform(index, 2, 0, "x")[2:], uniform(index[2:], 2, 0, "x"))
        assert normal(index, 2, 0, "x").abs().max() < 6 and permutation(9, 0).sort().values.tolist() == list(range(9))""",
    "MANO in NumPy and in Torch": """
        draw = np.random.default_rng(0)
        params = {key: draw.random(shape) for key, shape in dict(
            v_template=(778, 3), shapedirs=(778, 3, 10), posedirs=(778, 3, 135), J_regressor=(16, 778), weights=(778, 16),
            hands_mean=(45,), hands_components=(45, 45)).items()} | {
            "f": np.zeros((1538, 3), int), "kintree_table": np.array([MANO_PARENTS, range(16)])}
        hand = Mano(params, dtype=torch.float64)
        R = axis_angle_to_matrix(torch.rand(2, 16, 3, dtype=torch.float64))
        verts, joints = hand(R, torch.zeros(2, 10))
        assert np.allclose(mano_numpy(params, R.numpy(), np.zeros((2, 10)))[0], verts) and joints.shape == (2, 21, 3)""",
    "the reader of MANO's file": """
        try:
            load_mano("absent.pkl")
        except UserError as error:
            assert "absent.pkl" in str(error)
        assert MANO_SHAPES["v_template"] == (778, 3)
        arrays = {key: np.ones(shape, np.int64 if key in ("f", "kintree_table") else float) for key, shape in MANO_SHAPES.items()}
        arrays |= {"kintree_table": np.array([MANO_PARENTS, range(16)]), "weights": arrays["weights"] / 16,
                   "J_regressor": arrays["J_regressor"] / 778}
        save_mano("hand.npz", arrays)
        assert all((value == arrays[key]).all() for key, value in load_mano("hand.npz").items())""",
    "the built-in hand": """
        hand = builtin_hand()
        assert hand["v_template"].shape == (778, 3) and draw_shape(torch.arange(2), 0).shape == (2, 10)""",
    "back-bones": """
        net = build_backbone("vit_mini", 32)
        assert net(torch.rand(1, 3, 32, 32))[-1].shape == (1, 128, 4, 4)
        torch.save({"teacher": net.state_dict()}, "w.pt")
        assert "tensors read" in load_backbone(build_backbone("vit_mini", 32), "w.pt")""",
    "colours and blur": """
        images = torch.rand(2, 3, 9, 9)
        assert torch.allclose(jitter_colour(images, torch.tensor([[1.0, 1, 1, 0]] * 2)), images, atol=1e-5)
        on = torch.tensor([True, False])
        grey = to_grey(blur(solarise(images, on), torch.ones(2)), on)
        assert grey[0].std(0).max() < 1e-6 < grey[1].std(0).max()""",
    "Procrustes and the scores": """
        true = torch.rand(3, 21, 3)
        pred = {"joints": 2 * true, "uv": true[..., :2]}
        scores = score(pred, {"joints": true, "joints_ok": torch.ones(3, 21, dtype=torch.bool), "uv": true[..., :2],
                              "crop": torch.eye(3).expand(3, 3, 3)})
        means, n, left_out = summarise(scores)
        assert means["pa_mpjpe_mm"] < 1e-3 < 100 < means["mpjpe_mm"] and n == 3 and means["epe_2d_px"] == 0""",
    "TI-Net: constraints, operators, losses": """
        import types
        plan = constraint_plan(())
        cfg = types.SimpleNamespace(variant=(), rank=8, embed_dim=4)
        T, v, angles = Operators(6, cfg), torch.rand(2, len(plan.pictures), 6), torch.rand(2, 4)
        turn = lambda one: None if one.angle is None else angles[:, one.angle]
        once = torch.stack([T(one.name, v[:, 0], turn(one)) for one, _ in plan.ordinary], 1)
        twice = torch.stack([T(b.name, T(a.name, v[:, 0], turn(a)), turn(b)) for a, b, _ in plan.secondary], 1)
        loss = ordinary_loss(v, once, plan) + secondary_loss(v, twice, plan) + reconstruction_loss(v, v, [1, 2])
        assert loss > 0 and once.shape == (2, 3, 6) and twice.shape == (2, 9, 6)""",
    "PeCLR: undoing a view, the loss, LARS": """
        z = torch.rand(2, 4, 10, requires_grad=True)
        nt_xent(z, 0.5).backward()
        Lars([z], lr=0.1).step()
        assert undo_view(z[0], torch.rand(4), torch.rand(4, 2)).shape == (4, 10)""",
    "PeCLR: a step over a batch larger than the memory, of your own `projections`": """
        import piece, types
        net = torch.nn.Linear(3, 4)
        piece.projections = lambda net, batch, cfg, epoch: net(batch["x"])
        parts = [{"x": torch.rand(2, 5, 3)} for _ in range(3)]
        terms = cached_step(net, parts, types.SimpleNamespace(tau=0.5, micro_batch=5), 0)
        cached = net.weight.grad.clone()
        net.zero_grad()
        loss = nt_xent(net(torch.cat([part["x"] for part in parts], 1)), 0.5)
        loss.backward()
        assert torch.allclose(net.weight.grad, cached, atol=1e-6) and torch.allclose(terms["loss"], loss)""",
    "PeCLR: 2.5D to 3D": """
        true = torch.rand(2, 21, 3) + torch.tensor([0, 0, 5.0])
        true = true / (true[:, 9] - true[:, 0]).norm(dim=1)[:, None, None]
        rays, d = true[..., :2] / true[..., 2:], true[..., 2] - true[:, :1, 2]
        roots = root_depth(rays, d, (0, 9), 1e-8)
        assert lift(rays, d, roots).shape == true.shape and ((lift(rays, d, roots)[:, 9] - lift(rays, d, roots)[:, 0]).norm(
            dim=1) - 1).abs().max() < 1e-2""",
    "HandMIM: moving and undoing points, masks, decoder, rectifier": """
        view = View(torch.eye(3).expand(2, 2, 3, 3), torch.rand(2, 2), 1 + torch.rand(2, 2), torch.rand(2, 2, 2))
        points = torch.rand(2, 2, 7, 2)
        assert torch.allclose(undo(move(points, view), view), points, atol=1e-5)
        assert 0 < block_mask(torch.rand(3, 20, 4), torch.full((3,), 0.4), 14).float().mean() < 0.5
        assert Decoder(8, 2, 4, 4)([torch.rand(1, 16, 8)] * 2).shape == (1, 3, 16, 16)
        assert (Rectifier(8, 5, False)(torch.rand(2, 21, 8), torch.rand(2, 8), torch.rand(2, 5)) == 0).all()""",
    "HaMuCo: alignment with its derivative": """
        x = torch.rand(2, 3, 21, 3, dtype=torch.float64, requires_grad=True)
        aligned = align(x, None)
        aligned.sum().backward()
        assert aligned.shape == (2, 3, 3, 21, 3) and torch.allclose(aligned[:, 0, 0], x[:, 0]) and x.grad.isfinite().all()""",
    "HaMuCo: triangulation, RANSAC, robust refinement": """
        turn = torch.linalg.matrix_exp(torch.rand(5, 1, 1) * torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 0]]))
        P = torch.diag(torch.tensor([500.0, 500, 1])) @ torch.cat([turn, torch.rand(5, 3, 1) + torch.tensor([[0.0], [0], [3]])], 2)
        X, ok = torch.rand(4, 3), torch.ones(4, 5, dtype=torch.bool)
        uv = reproject(X.double(), P.double().expand(4, 5, 3, 4))
        assert torch.allclose(triangulate(uv, P.expand(4, 5, 3, 4)).float(), X, atol=1e-4)
        uv[:, 2] += 200
        found, inliers = ransac(uv, P.expand(4, 5, 3, 4), ok)
        assert not inliers[:, 2].any() and torch.allclose(found.float(), X, atol=1e-3)
        assert torch.allclose(refine(found, uv, P.expand(4, 5, 3, 4), inliers).float(), X, atol=1e-3)""",
}


def rows():
    """(piece, places to copy, packages it needs) of every row of TABLE."""
    out = []
    for line in TABLE.strip().splitlines():
        piece, where, needs = line.strip("| ").split(" | ")
        packages, *places = needs.split("; ")
        out.append((piece, [*places, where], packages.split(", ")))
    return out


def taken(place):
    """(file, lines of it) that a place names: banners, names or the whole."""
    file, *items = place.split(", ")
    text = (ROOT / file.strip("`")).read_text()
    lines = text.splitlines()
    banners = [k for k, line in enumerate(lines) if line.startswith("# ---- ")]
    parts = {lines[a].strip("# -"): range(a, b) for a, b in zip(banners, [*banners[1:], len(lines)])}
    parts |= {"head": range(min(banners, default=0)), "whole": range(len(lines))}
    keep = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.If):
            continue
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = {name.id for target in targets for name in ast.walk(target or node) if isinstance(name, ast.Name)}
        names = {node.name} if hasattr(node, "name") else names
        first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))]) - 1
        if any(item.strip("`") in names if item[0] == "`" else first in parts[item] for item in items):
            keep += lines[first:node.end_lineno]
    assert keep, place
    return file.strip("`"), keep


def module(places):
    """One module of all places, opened by those imports of their files that it uses."""
    found = [taken(place) for place in places]
    body = "\n".join(line for _, lines in found for line in ["", *lines])
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    heads = set()
    for file in {file for file, _ in found}:
        for node in ast.parse((ROOT / file).read_text()).body:
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                module = getattr(node, "module", alias.name)
                ours = module.split(".")[0] in ("common", "hand", "sources")
                if (alias.asname or alias.name.split(".")[0]) in used and not ours and module != "__future__":
                    heads.add(ast.unparse(ast.ImportFrom(module, [alias], 0) if isinstance(node, ast.ImportFrom)
                                          else ast.Import([alias])))
    return "\n".join(["from __future__ import annotations", *sorted(heads), body, ""])


def undefined(text):
    """Names that a module's code asks for and nobody gives; hints are not asked for."""
    tree = ast.parse(text)
    given = set(dir(builtins)) | {"__file__"}
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Constant(None))
        given |= {getattr(node, "name", None), getattr(node, "arg", None)}
        given |= {alias.asname or alias.name.split(".")[0] for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)}
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    given |= {name.id for name in used if not isinstance(name.ctx, ast.Load)}
    return {name.id for name in used} - given


# One process loads the packages, slowly, and forks for each folder: `call.py` runs in a fresh copy of it.
DRIVER = """
import os, sys, traceback
import numpy, scipy.optimize, torch, torchvision
for folder in sys.argv[1:]:
    if not os.fork():
        os.chdir(folder)
        sys.path[0] = folder
        try:
            exec(open("call.py").read(), {})
        except BaseException:
            traceback.print_exc(file=open("error.txt", "w"))
        os._exit(0)
    if os.wait()[1] == 0:
        open(os.path.join(folder, "done"), "w").close()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{piece: the folder that it was copied to, alone, and called in}."""
    made, home = {}, tmp_path_factory.mktemp("copies")
    for piece, places, packages in rows():
        made[piece] = home / str(len(made))
        made[piece].mkdir()
        (made[piece] / "piece.py").write_text(module(places))
        call = "\n".join(line.removeprefix("        ") for line in CALLS[piece].splitlines())
        (made[piece] / "call.py").write_text(
            f"import sys\nimport torch\nfor name in {sorted(FORBIDDEN - set(packages))}:\n"
            f"    sys.modules[name] = None\nfrom piece import *\n{call}\n")
    (home / "driver.py").write_text(DRIVER)
    subprocess.run([sys.executable, home / "driver.py", *made.values()], cwd=home, check=True, timeout=300,
                   env={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    return made


@pytest.mark.parametrize("piece", [row[0] for row in rows()])
def test_a_copied_piece_works_in_an_empty_folder(folders, piece):
    assert undefined((folders[piece] / "piece.py").read_text()) <= set(re.findall("`(.+?)`", piece))
    error = folders[piece] / "error.txt"
    assert not error.exists(), error.read_text()[-2000:]
    assert (folders[piece] / "done").exists()


def test_the_table_is_readme_s_own():
    readme = (ROOT / "README.md").read_text()
    found = readme.partition("## What to copy")[2].partition("Weights:")[0]
    assert [line for line in found.splitlines() if line.startswith("| ")][1:] == TABLE.strip().splitlines()


def test_every_piece_is_called():
    assert [row[0] for row in rows()] == list(CALLS)
