"""Names of data sets, what opens them, and the protocol that every source keeps."""

import pytest

from common import TIPS, UserError
from sources import joints_of, parse_data, read_index
from trees import meta, noise, person, save, write_coco, write_freihand, write_ho3d, write_yt3d


def test_data_names_are_parsed():
    assert parse_data("dexycb:s1=/a/b:c=d") == ("dexycb", "s1", "/a/b:c=d")
    assert parse_data("folder=x") == ("folder", "", "x")
    assert parse_data("imagenet") == ("imagenet", "", "")
    for wrong, words in (("imagent", "'imagent' is not known.*imagenet"), ("folder=", "NAME"),
                         ("dexycb:=x", "NAME"), ("", "not known")):
        with pytest.raises(UserError, match=words):
            parse_data(wrong)


def test_read_index_reads_by_name_and_refuses_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "data" / "folder" / "a.png", noise(8, 8))
    assert read_index("folder", "", "", "all").id(0) == "a.png"
    for arguments, words in ((("dexycb", "", "", "train"), "data/dexycb"),
                             (("folder", "x", "", "all"), "folder:x"),
                             (("folder", "", "", "trian"), "trian"),
                             (("dexycb", "", "", "all"), "all"),
                             (("synthetic", "", "", "train"), "rendered")):
        with pytest.raises(UserError, match=words) as error:
            read_index(*arguments)
        assert "\n" not in str(error.value)


def test_data_sets_are_read_by_name(tmp_path):
    write_freihand(tmp_path)
    assert parse_data("freihand:90-gs=/a") == ("freihand", "90-gs", "/a")
    assert len(read_index("freihand", "", str(tmp_path), "train")) == 12
    assert len(read_index("freihand", "gs", str(tmp_path), "train")) == 3
    assert len(read_index("freihand", "", str(tmp_path), "val")) == 0
    write_yt3d(tmp_path)
    assert len(read_index("yt3d", "", str(tmp_path), "train")) == 4
    write_ho3d(tmp_path, "train", [meta(0)], ["A/0"])
    assert len(read_index("ho3d", "", str(tmp_path), "train")) == 1
    write_coco(tmp_path, [person(5)])
    assert len(read_index("coco", "", str(tmp_path), "val")) == 2
    for name in ("yt3d", "coco", "ho3d"):
        with pytest.raises(UserError, match=f"{name} has no parts"):
            read_index(name, "x", str(tmp_path), "train")
    with pytest.raises(UserError, match="coco has no split 'test'"):
        read_index("coco", "", str(tmp_path), "test")
    with pytest.raises(UserError, match="freihand has no split 'all'"):
        read_index("freihand", "", str(tmp_path), "all")


def test_tips_are_each_data_sets_own():
    tips = {name: TIPS[joints_of(name).tips] for name in ("freihand", "yt3d", "ho3d")}
    assert tips == {"freihand": (744, 320, 443, 555, 672), "yt3d": (744, 320, 443, 554, 671),
                    "ho3d": (744, 333, 444, 555, 672)}
