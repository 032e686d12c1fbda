"""The protocol of a source, kept by every one of them; batches: which samples, in which order."""
import json
import multiprocessing
import types

import pytest
import torch
from PIL import Image

import ti_net
from common import UserError, steps_per_epoch
from sources import Source, batches, open_data, reading, training_steps
from sources.folder import index_folder
from sources.hands import Hands
from sources.loader import Joined, Rows
from sources.reading import read_ahead, read_items
from sources.stages import evaluate
from sources.synthetic import Cached, Synthetic
from sources.views import Cameras, Views
from trees import KEYS, noise, open_tree, rig_tree, save

CPU = torch.device("cpu")
WIDE = KEYS | {"cameras", "view_ok"}


def folder(root, n=4):
    """n photos, two of them of left hands, each with a hand's box, key points and joints."""
    lines = []
    for k in range(n):
        save(root / f"{k}.png", noise(40, 50, k))
        uv = [[10.0 + k + j, 12.0 + j] for j in range(21)]
        joints = [[0.001 * j, 0.002 * k, 0.5] for j in range(21)]
        lines.append({"path": f"{k}.png", "side": ("right", "left")[k % 2], "box": [8, 6, 30, 24],
                      "uv": uv, "joints": joints, "K": [[60, 0, 24.5], [0, 60, 19.5], [0, 0, 1]]})
    (root / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Hands(index_folder(root), 32, 1.25)


def photos(root, n=3):
    """n photos of which nothing is known."""
    for k in range(n):
        save(root / f"{k}.png", noise(30, 40, k))
    return Hands(index_folder(root), 32, 1.25)


SOURCES = {
    "hands": lambda p: folder(p), "photos": lambda p: photos(p),
    "views": lambda p: (rig_tree(p, frames=6), open_tree(p))[1],
    "rows": lambda p: Rows(folder(p, 6), torch.tensor([0, 2, 3, 5])),
    "joined": lambda p: Joined([folder(p / "a"), Cached(Synthetic(32, 3, margin=1.25), p / "c"), photos(p / "b")]),
    "live": lambda p: Joined([Synthetic(32, 2, margin=1.25), folder(p)]),
    "synthetic": lambda p: Synthetic(32, 5), "synthetic views": lambda p: Synthetic(32, 4, views=2),
    "some views": lambda p: Cameras(Synthetic(32, 4, views=3), (2, 0)),
    "cached": lambda p: Cached(Synthetic(32, 5), p), "cached views": lambda p: Cached(Synthetic(32, 4, views=2), p)}


def equal(a, b):
    """Whether two batches hold the same, NaN where the other has NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(-7e9), b.nan_to_num(-7e9))
    return a == b


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_keeps_the_protocol(name, tmp_path):
    data = SOURCES[name](tmp_path)
    n, wide = len(data), "views" in name
    assert isinstance(data, Source) and isinstance(data.name, str) and isinstance(data.box_source, str)
    both = list(data.batches([torch.tensor([2, 0]), torch.tensor([1])], CPU, 0))
    assert [len(batch["id"]) for batch in both] == [2, 1]                  # a batch for each of the plan, in its order
    alone = [next(data.batches([torch.tensor([row])], CPU, 0)) for row in range(n)]
    ids = [batch["id"][0] for batch in alone]
    assert len(set(ids)) == n and both[0]["id"] == [ids[2], ids[0]] and both[1]["id"] == [ids[1]]
    assert equal(both[1], alone[1])                                        # a sample is the same in any batch
    for batch in both:
        B = len(batch["id"])
        assert set(batch) - {"mask"} == (WIDE if wide else KEYS)
        lead = (B, 2) if wide else (B,)
        shapes = {"image": (3, 32, 32), "crop": (3, 3), "size": (2,), "K": (3, 3), "joints": (21, 3), "joints_ok": (21,),
                  "verts": (778, 3), "uv": (21, 2), "uv_label": (21, 2), "confidence": (21,), "visible": (21,), "pose": (48,),
                  "shape": (10,), "trans": (3,), "scale": ()} | ({"cameras": (4, 4), "view_ok": ()} if wide else {})
        if name == "views":
            shapes["image"] = (3, 64, 64)
        for key, dims in shapes.items():
            want = {"image": torch.uint8, "joints_ok": torch.bool, "visible": torch.bool, "view_ok": torch.bool}
            assert batch[key].shape == lead + dims and batch[key].dtype == want.get(key, torch.float32), key
        assert batch["has"].keys() == {"K", "joints", "uv", "verts", "pose", "shape", "cameras"}
        assert all(flag.shape == (B,) and flag.dtype == torch.bool for flag in batch["has"].values())
        assert all(len(batch[key]) == B and set(map(type, batch[key])) == {str} for key in ("id", "side", "box_source"))
        for key in ("K", "joints", "uv", "verts", "pose", "shape"):
            assert batch["has"][key].tolist() == batch[key].flatten(1).isfinite().any(1).tolist(), key
    targets = data.targets(torch.tensor([2, 0]))
    numbers = {"crop", "K", "joints", "joints_ok", "verts", "uv", "uv_label", "confidence", "pose", "shape", "trans", "scale"}
    for key in numbers | ({"cameras", "view_ok"} if wide else set()):
        assert equal(targets[key], both[0][key]), key
    assert "image" not in targets and targets["side_px"].tolist() == [both[0]["image"].shape[-1]] * 2
    parts = data.parts()
    assert sum(map(len, parts)) == n and (len(parts) > 1 or parts[0] is data)
    assert all(len(column) == 2 for column in data.columns(torch.tensor([2, 0])).values())
    assert data.gives("uv_label") == (name not in ("hands", "photos", "rows", "joined", "live"))
    assert data.gives("cameras") == wide


@pytest.mark.parametrize("name, rows", [("joined", [4, 8, 1, 0, 9, 5]), ("live", [5, 0, 3, 1])])
def test_joined_samples_come_in_the_order_asked_for(name, rows, tmp_path):
    data = SOURCES[name](tmp_path)
    alone = [next(data.batches([torch.tensor([row])], CPU, 0)) for row in rows]
    batch, targets = next(data.batches([torch.tensor(rows)], CPU, 0)), data.targets(torch.tensor(rows))
    assert batch["id"] == targets["id"] == [one["id"][0] for one in alone] and "mask" not in batch
    for key in ("image", "crop", "joints", "confidence"):
        assert equal(batch[key], torch.cat([one[key] for one in alone])), key
    assert equal(targets["joints"], batch["joints"]) and all("mask" not in one for one in alone)


@pytest.mark.parametrize("name", ["hands", "joined", "rows"])
def test_worker_processes_change_nothing(name, tmp_path):
    data = SOURCES[name](tmp_path)
    plan = [torch.tensor([3, 1]), torch.tensor([0, 2, 3])]
    for one, many in zip(data.batches(plan, CPU, 0), data.batches(plan, CPU, 2)):
        assert equal(one, many)


def test_rows_of_a_batch_are_planned_modulo_the_length(tmp_path):
    data = folder(tmp_path)
    batch = next(batches(data, [torch.tensor([5, 0, 11])], CPU, 0))
    assert batch["index"].tolist() == [5, 0, 11] and batch["id"] == ["1.png#2", "0.png#1", "3.png#4"]


def test_a_label_that_is_missing_is_never_the_truth(tmp_path):
    batch = next(folder(tmp_path).batches([torch.arange(4)], CPU, 0))
    assert batch["uv"].isfinite().all() and batch["uv_label"].isnan().all() and (batch["confidence"] == 1).all()


def test_columns_are_the_data_set_s_own_and_none_of_joined_ones(tmp_path):
    data = folder(tmp_path / "a")
    assert {key: value.tolist() for key, value in data.columns(torch.tensor([1])).items()} == {"box": [[8, 6, 30, 24]]}
    assert Rows(data, torch.tensor([0, 3])).columns(torch.tensor([1, 0]))["box"].shape == (2, 4)
    assert Joined([data, photos(tmp_path / "b")]).columns(torch.tensor([0])) == {}


@pytest.mark.parametrize("name, row", [("hands", 2), ("photos", 2), ("rows", 1), ("joined", 2), ("live", 4)])
def test_a_picture_that_breaks_later_spoils_its_own_sample_only(name, row, tmp_path, capsys):
    data = SOURCES[name](tmp_path)
    whole = next(data.batches([torch.arange(len(data))], CPU, 0))
    file, = tmp_path.rglob("a/2.png" if name == "joined" else "2.png")
    file.write_bytes(file.read_bytes()[:60])
    batch = next(data.batches([torch.arange(len(data))], CPU, 0))
    assert "2.png" in capsys.readouterr().err
    others = [k for k in range(len(data)) if k != row]
    assert batch["image"][row].max() == 0 and batch["joints"][row].isnan().all() and batch["id"] == whole["id"]
    assert not any(flag[row] for flag in batch["has"].values())
    for key in ("image", "joints", "uv", "crop"):
        assert equal(batch[key][others], whole[key][others])


def test_a_broken_view_is_black_and_its_moment_stays(tmp_path):
    rig_tree(tmp_path, frames=2)
    data = open_tree(tmp_path)
    file = tmp_path / "frames" / "cam1" / "0001.jpg"
    file.write_bytes(file.read_bytes()[:60])
    batch = next(data.batches([torch.arange(2)], CPU, 0))
    assert batch["view_ok"].all() and batch["image"][1, 1].max() == 0 and batch["image"][1, 0].max() > 0
    assert batch["uv_label"][1, 1].isnan().all() and batch["uv_label"][0].isfinite().all() and batch["cameras"].isfinite().all()


class Numbers(Source):
    """Sample i is the number i."""

    batches = read_items

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"x": torch.tensor(i)}


@pytest.mark.parametrize("n, workers", [(50, 0), (50, 2), (3, 0)])
def test_an_epoch_visits_samples_once_and_goes_on_where_it_stopped(n, workers):
    cfg = ti_net.Config(batch_size=8, micro_batch=4, workers=workers)
    whole = list(training_steps(Numbers(n), cfg, 1, 0, CPU))
    assert len(whole) == steps_per_epoch(n, 8) == max(1, n // 8)
    order = torch.cat([b["x"] for _, micro in whole for b in micro])
    assert torch.equal(order, torch.cat([b["index"] for _, micro in whole for b in micro]) % n)
    assert len(set(order.tolist())) == min(n, len(order))
    if n > 8:
        rest = list(training_steps(Numbers(n), cfg, 1, 3, CPU))
        assert [s for s, _ in rest] == [3, 4, 5]
        assert torch.equal(rest[0][1][1]["x"], whole[3][1][1]["x"])


def test_samples_taken_again_get_numbers_of_their_own():
    """Five samples, a batch of eight: three come twice, and a second view of one must not equal its first."""
    cfg = ti_net.Config(batch_size=8, micro_batch=8, workers=0)
    (_, (batch,)), = training_steps(Numbers(5), cfg, 0, 0, CPU)
    assert sorted(batch["index"].tolist()) != batch["x"].tolist() and len(batch["index"].unique()) == 8
    assert torch.equal(batch["index"] % 5, batch["x"])
    (_, (batch,)), = training_steps(Numbers(5), cfg, 0, 0, CPU, torch.tensor([1, 6, 11, 0, 2, 3, 4, 9]))
    assert batch["x"].tolist() == [1, 1, 1, 0, 2, 3, 4, 4] and batch["index"].tolist() == [1, 6, 11, 0, 2, 3, 4, 9]


class Asked(Numbers):
    """Says how many batches were asked for."""

    asked = 0

    def batches(self, plan, device, workers):
        for batch in super().batches(plan, device, workers):
            self.asked += 1
            yield batch


def test_the_first_micro_batch_is_computed_before_the_others_are_waited_for():
    """The oracle counts what was taken when each is at hand; what a step passes over is not the next one's."""
    data, cfg = Asked(50), ti_net.Config(batch_size=8, micro_batch=2, workers=0)
    steps = training_steps(data, cfg, 0, 0, CPU)
    _, micro = next(steps)
    assert len(micro) == 4 and data.asked == 0
    assert [data.asked for _ in micro] == [1, 2, 3, 4] and [data.asked for _ in micro] == [4] * 4
    with pytest.raises(IndexError):
        micro[4]
    first = next(steps)[1][0]
    assert data.asked == 5
    third = next(steps)[1]
    whole = list(training_steps(Numbers(50), cfg, 0, 0, CPU))
    assert equal(first, whole[1][1][0]) and equal(third[3], whole[2][1][3])


def test_a_step_left_in_the_middle_leaves_no_process_behind():
    steps = training_steps(Numbers(50), ti_net.Config(batch_size=8, micro_batch=2, workers=2), 0, 0, CPU)
    _, micro = next(steps)
    assert micro[0]["x"].shape == (2,) and len(multiprocessing.active_children()) == 2
    steps.close()
    assert not multiprocessing.active_children()
    with pytest.raises(StopIteration):
        micro[1]
    with pytest.raises(ArithmeticError):
        for _, micro in training_steps(Numbers(50), ti_net.Config(batch_size=8, micro_batch=2, workers=2), 0, 2, CPU):
            raise ArithmeticError(str(micro[1]["x"]))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("side, rows, workers, shared, ahead", [
    (336, 64, 4, 2 ** 35, 12), (380, 17, 4, 2 ** 35, 16), (64, 2, 3, 2 ** 35, 21), (2000, 512, 2, 2 ** 35, 2), (336, 64, 2, 2 ** 30, 6)])
def test_a_step_is_read_ahead_as_far_as_memory_goes(side, rows, workers, shared, ahead, tmp_path, monkeypatch):
    """1 GiB and 64 batches: HandMIM's 64 pictures of 336 px are 21.7 MB, so 48 of them wait where a step has 16."""
    monkeypatch.setattr(reading, "SHARED", str(tmp_path))
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=shared))
    data = Numbers(9)
    data.picture_bytes = 3 * side ** 2
    assert read_ahead(data, [torch.arange(2), torch.arange(rows)], workers) == ahead


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_copied_beside_the_computing_are_the_same():
    plan = list(torch.arange(50).split(7))
    for one, other in zip(Numbers(50).batches(plan, CPU, 0), Numbers(50).batches(plan, torch.device("cuda"), 2), strict=True):
        assert other["x"].is_cuda and torch.equal(one["x"], other["x"].cpu())


def test_synthetic_hands_and_a_folder_make_one_data_set(tmp_path):
    (tmp_path / "photos").mkdir()
    for k in range(3):
        Image.new("RGB", (50, 40), (80 * k, 0, 0)).save(tmp_path / "photos" / f"{k}.png")
    cfg = ti_net.Config(samples=5, cache=str(tmp_path / "cache"), workers=0)
    both = open_data(cfg, ("synthetic:calm", f"folder={tmp_path / 'photos'}"), "train", 32, 1.7,
                            CPU)
    assert len(both) == 8
    batch = next(batches(both, [torch.tensor([6, 1, 7])], CPU, 0))
    assert batch["has"]["pose"].tolist() == [False, True, False] and batch["image"].shape == (3, 3, 32, 32)
    found = both.targets(torch.tensor([6, 1]))
    assert found["joints"][0].isnan().all() and torch.equal(found["joints"][1], batch["joints"][1])


def test_scoring_an_empty_data_set_gives_no_scores():
    model = torch.nn.Module()
    assert evaluate(model, Numbers(0), ti_net.Config(workers=0), CPU) == {}


def test_some_cameras_are_the_ones_named_in_that_order(tmp_path):
    rig_tree(tmp_path, frames=3)
    hands = open_tree(tmp_path).hands
    both, turned = Views(hands, 2), Views(hands, 2, (1, 0))
    second = Views(hands, 2, (1,))
    for key in ("image", "uv_label", "K", "cameras", "view_ok"):
        assert equal(turned[0][key], both[0][key].flip(0)) and equal(second[0][key], both[0][key][1:]), key
        assert equal(next(Cameras(both, (1,)).batches([torch.arange(2)], CPU, 0))[key][0], both[0][key][1:]), key
    assert Cameras(both, (1,)).targets(torch.arange(2))["uv_label"].shape == (2, 1, 21, 2)
    with pytest.raises(UserError, match="has 2 cameras, from 0 on, so no 2"):
        Views(hands, 2, (2,))
