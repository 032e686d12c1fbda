"""README's "What to copy" is true: each piece, with what it needs and no more, works in an empty folder.

TABLE is README's own. A place is a file and what to take from it: its banners, or names in `code`, or
its head, or the whole. What a piece needs are packages and places. A test takes the text out of the files as a
reader would, with those of the file's import lines that it uses, into one module of an otherwise empty
folder, forbids every package of ours and of requirements.txt that is not named, and calls the piece.
The head of a file is what stands above its first banner.
"""
import ast
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
| Procrustes and the scores | `common.py`, Metrics | torch; `common.py`, head, Transforms |
"""
FORBIDDEN = {"common", "hand", "sources", "ti_net", "peclr", "handmim", "hamuco", "eval", "matplotlib", "numpy", "PIL",
             "pytest", "scipy", "torch", "torchvision", "tqdm"}
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
    "Procrustes and the scores": """
        true = torch.rand(3, 21, 3)
        pred = {"joints": 2 * true, "uv": true[..., :2]}
        scores = score(pred, {"joints": true, "joints_ok": torch.ones(3, 21, dtype=torch.bool), "uv": true[..., :2],
                              "crop": torch.eye(3).expand(3, 3, 3)})
        means, n, left_out = summarise(scores)
        assert means["pa_mpjpe_mm"] < 1e-3 < 100 < means["mpjpe_mm"] and n == 3 and means["epe_2d_px"] == 0""",
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


@pytest.mark.parametrize("piece, places, packages", rows(), ids=[row[0] for row in rows()])
def test_a_copied_piece_works_in_an_empty_folder(tmp_path, piece, places, packages):
    (tmp_path / "piece.py").write_text(module(places))
    call = "\n".join(line.removeprefix("        ") for line in CALLS[piece].splitlines())
    forbidden = sorted(FORBIDDEN - set(packages))
    (tmp_path / "call.py").write_text(
        f"import sys\nimport torch, {', '.join(packages)}\nfor name in {forbidden}:\n    sys.modules[name] = None\nfrom piece import *\n{call}\n")
    done = subprocess.run([sys.executable, "call.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_piece_is_called():
    assert [row[0] for row in rows()] == list(CALLS)
