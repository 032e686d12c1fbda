"""The processes that read pictures: they may be spawned, and they may die."""
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import torch

from common import guarded
from sources import Joined, Rows, batches
from sources.folder import index_folder
from sources.hands import Hands
from sources.reading import Planned, read_items
from trees import noise, one, open_tree, rig_tree, save


class Dies:
    """A data set whose third batch kills the worker that reads it, as the system's OOM killer does."""

    picture_bytes = 1

    def read(self, rows: list[int]) -> dict:
        if rows == [2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"row": torch.tensor(rows)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_ends_the_run_in_one_sentence(capsys, workers):
    plan = [torch.tensor([k]) for k in range(9)]
    assert guarded(lambda: print(*read_items(Dies(), plan, torch.device("cpu"), workers))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "reads pictures was killed" in said and "--workers" in said


def test_spawned_workers_read_what_this_process_reads(tmp_path, monkeypatch):
    for k in range(4):
        save(tmp_path / f"{k}.png", noise(30, 40, k))
    data = Rows(Hands(index_folder(tmp_path), 16, 1.0), torch.arange(1, 4))
    plan = [torch.tensor([2, 0]), torch.tensor([1])]
    here = list(batches(data, plan, torch.device("cpu"), 0))
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context",
                        multiprocessing.get_context("spawn"))
    there = list(batches(data, plan, torch.device("cpu"), 1))
    assert [batch["id"] for batch in there] == [["3.png", "1.png"], ["2.png"]]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(here, there))


def test_every_source_can_be_handed_to_a_spawned_worker(tmp_path):
    hands = Hands(one(tmp_path, noise(40, 40), joints=np.ones((21, 3)), box=[1, 1, 20, 20]), 16, 1.0)
    rig_tree(tmp_path / "rig", frames=4)
    for data in (hands, Rows(hands, torch.tensor([0])), Joined([hands, hands]), open_tree(tmp_path / "rig")):
        again = pickle.loads(pickle.dumps(Planned(data, [torch.tensor([0])])))
        batch = next(iter(again.data.batches([torch.tensor([0])], torch.device("cpu"), 0)))
        same = next(iter(data.batches([torch.tensor([0])], torch.device("cpu"), 0)))
        assert torch.equal(batch["image"], same["image"])
