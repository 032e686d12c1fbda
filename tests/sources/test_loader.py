"""Batches of any source: which samples, in which order, from whatever they are read."""
import pytest
import torch
from PIL import Image

import ti_net
from common import steps_per_epoch
from sources import Source, batches, open_data, training_steps
from sources.loader import read_items
from sources.stages import evaluate


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
    whole = list(training_steps(Numbers(n), cfg, 1, 0, torch.device("cpu")))
    assert len(whole) == steps_per_epoch(n, 8) == max(1, n // 8)
    order = torch.cat([b["x"] for _, micro in whole for b in micro])
    assert torch.equal(order, torch.cat([b["index"] for _, micro in whole for b in micro]) % n)
    assert len(set(order.tolist())) == min(n, len(order))
    if n > 8:
        rest = list(training_steps(Numbers(n), cfg, 1, 3, torch.device("cpu")))
        assert [s for s, _ in rest] == [3, 4, 5]
        assert torch.equal(rest[0][1][1]["x"], whole[3][1][1]["x"])


def test_samples_taken_again_get_numbers_of_their_own():
    """Five samples, a batch of eight: three come twice, and a second view of one must not equal its first."""
    cfg = ti_net.Config(batch_size=8, micro_batch=8, workers=0)
    (_, (batch,)), = training_steps(Numbers(5), cfg, 0, 0, torch.device("cpu"))
    assert sorted(batch["index"].tolist()) != batch["x"].tolist() and len(batch["index"].unique()) == 8
    assert torch.equal(batch["index"] % 5, batch["x"])
    (_, (batch,)), = training_steps(Numbers(5), cfg, 0, 0, torch.device("cpu"), torch.tensor([1, 6, 11, 0, 2, 3, 4, 9]))
    assert batch["x"].tolist() == [1, 1, 1, 0, 2, 3, 4, 4] and batch["index"].tolist() == [1, 6, 11, 0, 2, 3, 4, 9]


def test_synthetic_hands_and_a_folder_make_one_data_set(tmp_path):
    (tmp_path / "photos").mkdir()
    for k in range(3):
        Image.new("RGB", (50, 40), (80 * k, 0, 0)).save(tmp_path / "photos" / f"{k}.png")
    cfg = ti_net.Config(samples=5, cache=str(tmp_path / "cache"), workers=0)
    both = open_data(cfg, ("synthetic:calm", f"folder={tmp_path / 'photos'}"), "train", 32, 1.7,
                            torch.device("cpu"))
    assert len(both) == 8
    batch = next(batches(both, [torch.tensor([6, 1, 7])], torch.device("cpu"), 0))
    assert batch["has"]["pose"].tolist() == [False, True, False] and batch["image"].shape == (3, 3, 32, 32)
    found = both.targets(torch.tensor([6, 1]))
    assert found["joints"][0].isnan().all() and torch.equal(found["joints"][1], batch["joints"][1])


def test_scoring_an_empty_data_set_gives_no_scores():
    model = torch.nn.Module()
    assert evaluate(model, Numbers(0), ti_net.Config(workers=0), torch.device("cpu")) == {}
