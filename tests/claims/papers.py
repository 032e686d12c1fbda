"""Every table and figure of the four papers: the command that makes each row at full scale, or why none does.

DIR, DIR1, ... are data sets' own folders, FILE a backbone.pt that the line before wrote, RUN a run's folder. Lines of a row run one after
the other. Tables and figures are those of the papers' main text; their supplements are not at hand. The million pictures that Table 2 of
TI-Net names of 100DOH and of Ego4D are cut from videos and read as `folder`, with their boxes in labels.jsonl (`100doh=DIR` reads the
100,000 frames that 100DOH annotates); other methods' rows have no command.
"""
from __future__ import annotations

from typing import NamedTuple

SCHEME = "a drawing of the method: nothing is measured"
OTHER = "another method's numbers, as that method's authors or the paper give them; it is not built here"
NOT_BUILT = "not built here"


class Row(NamedTuple):
    """One line of a table or curve of a figure: its commands, or why there are none."""

    name: str
    commands: tuple[str, ...] = ()
    why: str = ""


class Entry(NamedTuple):
    """A table or figure."""

    paper: str
    item: str
    shows: str
    rows: tuple[Row, ...]


def row(name: str, *commands: str) -> Row:
    """A row with commands."""
    return Row(name, commands)


def others(*names: str, why: str = OTHER) -> tuple[Row, ...]:
    """Rows without."""
    return tuple(Row(name, why=why) for name in names)


# ---- TI-Net --------------------------------------------------------------------------------------

ON_DEXYCB = ("ti_net.py --init FILE --finetune dexycb=DIR2", "eval.py RUN --data dexycb=DIR2 --protocol ti_net dexycb")
TI_NET = (
    Entry("TI-Net", "Figure 1", "three kinds of pre-training", others("drawing", why=SCHEME)),
    Entry("TI-Net", "Figure 2", "the isomorphism", others("drawing", why=SCHEME)),
    Entry("TI-Net", "Table 1", "products of two transformations",
          others("algebra", why="nothing is trained: ti_net.py, `compose`; tests/test_ti_net.py holds its nine cells against "
                                "pictures")),
    Entry("TI-Net", "Figure 3", "the training framework", others("drawing", why=SCHEME)),
    Entry("TI-Net", "Algorithm 1", "the pre-training", (
        row("our defaults: the authors' code where it differs (ti_net.py, points 1 and 5 to 7)", "ti_net.py --data imagenet=DIR1"),
        row("as printed", "ti_net.py --data imagenet=DIR1 --variant algorithm-1 reconstruct-3 unsquared no-identity decode-latent "
            "two-layer-embedding"))),
    Entry("TI-Net", "Table 2", "MPJPE on DexYCB after several pre-trainings (the paper's numbers of SimCLR and PeCLR are copied from HandCLR)", (
        row("SimCLR, 100DOH-1M", "peclr.py --data folder=DIR1 --objective simclr --backbone resnet50 --image-size 224", *ON_DEXYCB),
        row("SimCLR, Ego4D-1M", "peclr.py --data folder=DIR1 --objective simclr --backbone resnet50 --image-size 224", *ON_DEXYCB),
        row("SimCLR, ImageNet-1K", "peclr.py --data imagenet=DIR1 --objective simclr --backbone resnet50 --image-size 224", *ON_DEXYCB),
        row("PeCLR, 100DOH-1M", "peclr.py --data folder=DIR1 --backbone resnet50 --image-size 224", *ON_DEXYCB),
        row("PeCLR, Ego4D-1M", "peclr.py --data folder=DIR1 --backbone resnet50 --image-size 224", *ON_DEXYCB),
        row("Ours, ImageNet-1K", "ti_net.py --data imagenet=DIR1", *ON_DEXYCB))),
    Entry("TI-Net", "Figure 4", "predictions beside SimCLR's on DexYCB", (
        row("sheet.png, of Table 2's runs", "eval.py RUN1 RUN2 --data dexycb=DIR --sheet"),)),
    Entry("TI-Net", "Table 3", "PA-MPJPE and MPJPE on DexYCB", (
        row("Ours", "ti_net.py --data imagenet=DIR1", *ON_DEXYCB),
        *others("METRO", "Spurr et al.", "Liu et al.", "MobRecon", "HandOccNet", "H2ONet", "Zhou et al.", "Deformer"))),
    Entry("TI-Net", "Figure 5", "validation MPJPE by epoch, ours and SimCLR's", (
        row("the curves, of Table 2's runs: RUN1 of SimCLR, RUN2 ours", "eval.py RUN1 RUN2 --curve epoch"),)),
    Entry("TI-Net", "Table 4", "PA-MPJPE and MPJPE on InterHand2.6M", (
        row("Ours", "ti_net.py --data imagenet=DIR1", "ti_net.py --init FILE --finetune interhand=DIR2",
            "eval.py RUN --data interhand=DIR2"),
        *others("InterShape", "Keypoint Transformer", "InterWild", "IntagHand"))),
)

# ---- PeCLR ---------------------------------------------------------------------------------------

FROZEN = "peclr.py --init FILE --finetune freihand:90=DIR1 --backbone resnet50 --image-size 128 --freeze"
JUDGED = "eval.py RUN --data freihand:90=DIR1 --protocol peclr"        # its absolute errors and its AUC up to 50 cm
ALONE = ("scale", "rotation", "translation", "colour-jitter", "colour-drop", "cut-out", "blur", "noise", "sobel")


def tuned(fraction: str = "") -> str:
    """Fine-tuning on FreiHAND, scored as its server scores it; of Fig. 6 on a share of the labels."""
    more = f" --image-size 128 --label-fraction {fraction}" if fraction else ""
    return f"peclr.py --init FILE --finetune freihand:centre=DIR1 --two-pass{more}"


BOTH = "peclr.py --data freihand=DIR1 yt3d=DIR2"
PECLR = (
    Entry("PeCLR", "Figure 1", "the two stages", (*others("drawing", why=SCHEME), *others("errors below it", why="numbers of Tables 1 to 3 and Figure 6"))),
    Entry("PeCLR", "Figure 2", "the method", others("drawing", why=SCHEME)),
    Entry("PeCLR", "Table 1", "frozen features on FreiHAND's own tenth", (
        row("SimCLR", "peclr.py --data freihand:90=DIR1 --backbone resnet50 --objective simclr", FROZEN, JUDGED),
        row("PeCLR", "peclr.py --data freihand:90=DIR1 --backbone resnet50", FROZEN, JUDGED))),
    Entry("PeCLR", "Figure 3", "predictions on YouTube3DHands and FreiHAND", (
        row("YouTube3DHands", "eval.py RUN1 RUN2 --data yt3d=DIR2 --sheet"),
        row("FreiHAND", "eval.py RUN1 RUN2 --data freihand:centre=DIR1 --two-pass --sheet"))),
    Entry("PeCLR", "Figure 4", "the transformations on one picture", (
        row("transformations.png of any pre-training", "peclr.py --data freihand=DIR1 --epochs 0"),)),
    Entry("PeCLR", "Figure 5 a", "SimCLR with one transformation, frozen", (
        *(row(name, f"peclr.py --data freihand:90=DIR1 --backbone resnet50 --objective simclr --augment {name}", FROZEN)
          for name in ALONE),
        row("random initialisation", "peclr.py --finetune freihand:90=DIR1 --backbone resnet50 --image-size 128 --freeze"))),
    Entry("PeCLR", "Figure 5 b", "PeCLR with one transformation, frozen", tuple(
        row(name, f"peclr.py --data freihand:90=DIR1 --backbone resnet50 --augment {name}", FROZEN)
        for name in ("translation", "rotation"))),
    Entry("PeCLR", "Figure 6", "error by share of the labels", (
        *(row(f"baseline, {share}", tuned(share).replace("--init FILE ", "")) for share in ("0.2", "0.4", "1")),
        *(row(f"FreiHAND, {share}", "peclr.py --data freihand=DIR1", tuned(share)) for share in ("0.2", "0.4", "1")),
        *(row(f"FreiHAND and YouTube3DHands, {share}", BOTH, tuned(share)) for share in ("0.2", "0.4", "1")),
        row("the curves, wrist on wrist", "eval.py RUN1 RUN2 RUN3 --curve label_fraction --metric mpjpe_mm"),
        row("absolute errors, as its 3D EPE is by Sec. 4.2", "eval.py RUN --data freihand:centre=DIR1 --two-pass --protocol peclr"))),
    Entry("PeCLR", "Table 2", "PA-EPE and PA-AUC on FreiHAND's server", (
        row("RN50", tuned().replace("--init FILE ", "") + " --backbone resnet50",
            "eval.py RUN --data freihand:centre=DIR1 --two-pass --submit"),
        row("RN50 + PeCLR", BOTH + " --backbone resnet50", tuned() + " --backbone resnet50",
            "eval.py RUN --data freihand:centre=DIR1 --two-pass --submit"),
        row("RN152", tuned().replace("--init FILE ", ""), "eval.py RUN --data freihand:centre=DIR1 --two-pass --submit"),
        row("RN152 + PeCLR", BOTH, tuned(), "eval.py RUN --data freihand:centre=DIR1 --two-pass --submit"),
        *others("Spurr et al.", "Kulon et al.", "Li et al.", "Pose2Mesh", "I2L-MeshNet"))),
    Entry("PeCLR", "Table 3", "Table 2's networks on FreiHAND and YouTube3DHands", (
        row("RN152 on FreiHAND", "eval.py RUN1 --data freihand:centre=DIR1 --two-pass"),
        row("RN152 + PeCLR on FreiHAND", "eval.py RUN2 --data freihand:centre=DIR1 --two-pass"),
        row("RN152 on YouTube3DHands", "eval.py RUN1 --data yt3d=DIR2"),
        row("RN152 + PeCLR on YouTube3DHands", "eval.py RUN2 --data yt3d=DIR2"))),
)

# ---- HandMIM -------------------------------------------------------------------------------------

HANDS = "--data freihand=DIR1 yt3d=DIR2 folder:hands=DIR3"
SIZES = (("Small", "vit_s"), ("Base", "vit_b"), ("Large", "vit_l"))
TARGETS = (("FreiHAND", "freihand=DIR1"), ("HO3D", "ho3d=DIR4"))


def handmim_rows(target: str) -> tuple[Row, ...]:
    """Rows of Tables 1 and 2: from random weights, and pre-trained."""
    return (*(row(f"ViT-{size}", f"handmim.py --backbone {vit} --finetune {target}")
              for size, vit in SIZES if size != "Base"),
            *(row(f"HandMIM-{size}", f"handmim.py {HANDS} --backbone {vit}",
                  f"handmim.py --init FILE --backbone {vit} --finetune {target}") for size, vit in SIZES))


def handmim_variants(target: str) -> tuple[Row, ...]:
    """Rows of Table 3 on a data set."""
    tune = f"handmim.py --init FILE --finetune {target}"
    return (row("ViT-S", f"handmim.py --finetune {target}"),
            row("ViT-S + iBOT", f"handmim.py {HANDS} --objective ibot", tune),
            row("ViT-S + PeCLR", "peclr.py --data freihand=DIR1 yt3d=DIR2 folder:hands=DIR3 --backbone vit_s --image-size 224", tune),
            row("ViT-S + HandMIM", f"handmim.py {HANDS}", tune))


HANDMIM = (
    Entry("HandMIM", "Figure 1", "error by number of parameters",
          others("plot", why="a plot of Table 1's numbers; a run's parameters stand in its table")),
    Entry("HandMIM", "Figure 2", "the framework", others("drawing", why=SCHEME)),
    Entry("HandMIM", "Table 1", "FreiHAND", (
        *handmim_rows("freihand=DIR1"),
        row("PeCLR, with ResNet-50", BOTH + " --backbone resnet50", tuned() + " --backbone resnet50", "eval.py RUN --data freihand:centre=DIR1 --two-pass --submit"),
        *others("I2L-MeshNet", "I2UV-HandNet", "HIU-DMTL", "Tang et al.", "Mesh Graphormer", "METRO", "MobRecon"))),
    Entry("HandMIM", "Figure 3", "areas under the curves of joints and vertices, ViT-B", (
        *(row(f"{name}: pck.png, auc", f"eval.py RUN --data {target}") for name, target in TARGETS), *others("other methods' curves"))),
    Entry("HandMIM", "Table 2", "HO3D v2", (
        *handmim_rows("ho3d=DIR4"), row("what its server reads", "eval.py RUN --data ho3d=DIR4 --submit"),
        *others("Liu et al.", "HandOccNet", "S2Contact", "ArtiBoost"))),
    Entry("HandMIM", "Figure 4", "predictions on FreiHAND", (row("ours", "eval.py RUN --data freihand=DIR1"),
                                                             *others("I2L-MeshNet", "Tang et al."))),
    Entry("HandMIM", "Figure 5", "predictions on HO3D v2", (row("ours", "eval.py RUN --data ho3d=DIR4"),
                                                            *others("HandOccNet", "Liu et al."))),
    Entry("HandMIM", "Table 3", "self-supervised methods under one head", tuple(
        Row(f"{one.name}, {name}", one.commands) for name, target in TARGETS for one in handmim_variants(target))),
    Entry("HandMIM", "Table 4", "tuned on one data set, tested on the other", (
        row("HandMIM/ViT-S, FreiHAND to HO3D", f"handmim.py {HANDS}", "handmim.py --init FILE --finetune freihand=DIR1",
            "eval.py RUN --data ho3d=DIR4"),
        row("HandMIM/ViT-S, HO3D to FreiHAND", f"handmim.py {HANDS}", "handmim.py --init FILE --finetune ho3d=DIR4",
            "eval.py RUN --data freihand=DIR1"),
        row("PeCLR, FreiHAND to HO3D (the paper's number is TempCLR's)", BOTH, tuned(), "eval.py RUN --data ho3d=DIR4"),
        row("PeCLR, HO3D to FreiHAND (the paper's number is TempCLR's)", BOTH, "peclr.py --init FILE --finetune ho3d=DIR4", "eval.py RUN --data freihand=DIR1"),
        *others("Hasson et al.", "Hampali et al.", "TempCLR"))),
    Entry("HandMIM", "Figure 6", "meshes before and after pre-training, ViT-B", tuple(
        row(name, f"handmim.py --backbone vit_b --finetune {target}", f"handmim.py {HANDS} --backbone vit_b",
            f"handmim.py --init FILE --backbone vit_b --finetune {target}", f"eval.py RUN1 RUN2 --data {target} --sheet")
        for name, target in TARGETS)),
    Entry("HandMIM", "Table 5", "losses removed", (
        row("all", f"handmim.py {HANDS}", "handmim.py --init FILE --finetune freihand=DIR1"),
        *(row(f"without L_{name}", f"handmim.py {HANDS} --variant no-{name}", "handmim.py --init FILE --finetune freihand=DIR1")
          for name in ("pose", "patch", "recon")))),
    Entry("HandMIM", "Figure 7", "error by number of frozen blocks", (
        *(row(f"{name}, {n} blocks", f"handmim.py {HANDS}{more}", f"handmim.py --init FILE --finetune freihand=DIR1 --freeze-blocks {n}")
          for name, more in (("HandMIM", ""), ("iBOT", " --objective ibot")) for n in (0, 2, 4, 6, 8, 10, 12)),
        row("the curves, of these runs", "eval.py RUN1 RUN2 RUN3 --curve freeze_blocks --metric pa_mpvpe_mm"))),
)

# ---- HaMuCo --------------------------------------------------------------------------------------

FULL = "hamuco.py --data hanco=DIR --init resnet50.pt"
R18 = "hamuco.py --data hanco=DIR --backbone resnet18 --init resnet18.pt"
ON_FREIHAND = "eval.py RUN --data freihand=DIR1"
HAMUCO = (
    Entry("HaMuCo", "Figure 1", "pipelines compared", others("drawing", why=SCHEME)),
    Entry("HaMuCo", "Figure 2", "the networks", others("drawing", why=SCHEME)),
    Entry("HaMuCo", "Table 1", "one view of HanCo", (
        *others("MobRecon, fully supervised"),
        row("EpipolarPose, fully supervised (its idea in our network)",
            FULL + " --variant single-view --supervision truth3d"),
        row("EpipolarPose, known cameras (its idea in our network)",
            FULL + " --variant single-view --supervision triangulated"),
        row("CanonPose, known cameras (its idea)", "tests/claims/canonpose.py --data hanco=DIR --views 8 --out RUN"),
        *others("EpipolarPose, unknown cameras", "CanonPose, unknown cameras", why=NOT_BUILT),
        row("Ours, known cameras", FULL), row("Ours, unknown cameras", FULL + " --calibration none"))),
    Entry("HaMuCo", "Table 2", "FreiHAND's evaluation set", (
        *others("YoutubeHand", "I2UV-HandNet", "MobRecon", "S2HAND"),
        row("Ours-SV, FreiHAND, fully supervised", "hamuco.py --data freihand=DIR1 --init resnet50.pt --variant single-view "
            "--supervision truth3d", ON_FREIHAND),
        *(row(f"Ours-SV, FreiHAND, {net}", f"hamuco.py --data freihand=DIR1 --backbone {net} --init {net}.pt --variant single-view",
              ON_FREIHAND) for net in ("efficientnet_b0", "resnet50")),
        *(row(f"{name}, HanCo, {net}", f"hamuco.py --data hanco=DIR --backbone {net} --init {net}.pt{more}", ON_FREIHAND)
          for name, more in (("Ours-SV", " --variant single-view"), ("Ours", "")) for net in ("efficientnet_b0", "resnet50")))),
    Entry("HaMuCo", "Table 3", "eight views of HanCo", (
        row("DLT and RANSAC of the labels: rows dlt, ransac, and ransac_huber, which ends in a robust fit", "hamuco.py --data hanco=DIR --epochs 0"),
        *others("Pictorial", why=NOT_BUILT),
        row("Ours, fully supervised: rows fusion_center, fusion_ransac", FULL + " --supervision truth3d"),
        row("EpipolarPose, fully supervised (its idea in our network): row fusion", FULL + " --variant single-view --supervision truth3d",
            "eval.py RUN --data hanco=DIR"),
        row("Ours, self-supervised: rows fusion_center, fusion_ransac", FULL),
        row("EpipolarPose, self-supervised (its idea in our network): row fusion", FULL + " --variant single-view --supervision triangulated",
            "eval.py RUN --data hanco=DIR"),
        row("LT-Algebraic, self-supervised (its idea): dlt_learnt", "tests/claims/lt_algebraic.py --data hanco=DIR --views 8 --out RUN"),
        *others("EpipolarTrans, both", "LT-Algebraic, fully supervised", "LT-Volumetric, both", "LT-Volumetric with the true centre, both",
                why=NOT_BUILT),
        row("CanonPose (its idea): fusion, PA-MPJPE only, for its hands have no size", "tests/claims/canonpose.py --data hanco=DIR --views 8 --out RUN"))),
    Entry("HaMuCo", "Table 4", "parts removed", (
        row("1 Full, ResNet-50", FULL), row("2 Full, ResNet-18", R18),
        *(row(f"{n} without {name}", f"{R18} --variant no-{name}")
          for n, name in enumerate(("vsf", "cva", "g1", "g2", "g3", "c2d", "cf", "dcvi", "c", "d"), 3)))),
    Entry("HaMuCo", "Figure 3", "(a) by share of the data, (b) by number of views", (
        *(row(f"a: {share}", f"{R18} --data-fraction {share}") for share in ("0.25", "0.5", "1")),
        row("a: the curve", "eval.py RUN1 RUN2 RUN3 --curve data_fraction --metric n_mpjpe_mm"),
        *(row(f"b, line 1: {n} views in training", f"{R18} --views {n}", "eval.py RUN --data hanco=DIR --views 1") for n in (2, 4, 8)),
        row("b, line 2: eight in training", R18 + " --mask-epochs 5",
            *(f"eval.py RUN --data hanco=DIR --views {n}" for n in (1, 2, 4, 6, 8))),
        row("b, line 2: the curve; line 1 is read from its runs' tables", "eval.py RUN --curve views --metric n_mpjpe_mm"))),
    Entry("HaMuCo", "Figure 4", "2D joints of labels, single view, interaction", (
        row("pck_2d.png, and the line on training moments", FULL),)),
    Entry("HaMuCo", "Figure 5", "2D predictions of two views", (row("predictions.png", FULL),)),
    Entry("HaMuCo", "Figure 6", "3D predictions of two views", (
        row("Ours and EpipolarPose's idea: sheet.png", "eval.py RUN1 RUN2 --data hanco=DIR --sheet"),
        *others("CanonPose", why="its idea (tests/claims/canonpose.py) sees no pictures, and eval.py does not read it"))),
    Entry("HaMuCo", "Section 4.6", "sentences with numbers", (
        row("any number of views", R18 + " --mask-epochs 5"), row("iterative training", R18 + " --rounds 3"))),
)

ENTRIES = (*TI_NET, *PECLR, *HANDMIM, *HAMUCO)


def listing() -> str:
    """All of it as text: a heading for each table, a line for each row and command."""
    out = [(__doc__ or "").strip().partition("\n\n")[2]]
    for entry in ENTRIES:
        out += ["", f"{entry.paper}, {entry.item}: {entry.shows}"]
        for one in entry.rows:
            if one.why:
                out.append(f"  {one.name}: {one.why}")
            else:
                out += [f"  {one.name}:", *(f"    python {command}" for command in one.commands)]
    commands = sum(bool(one.commands) for entry in ENTRIES for one in entry.rows)
    total = sum(len(entry.rows) for entry in ENTRIES)
    out += ["", f"{len(ENTRIES)} tables and figures, {total} rows, {commands} with commands"]
    return "\n".join(out)
