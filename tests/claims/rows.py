"""PLAN.md as data: the claims, their rows and what is compared."""
from __future__ import annotations

from claims.plan import GRID, SHARE, Claim, Comparison, Row, Tuning, Weights

# ---- Core claims ---------------------------------------------------------------------------------

SMALL, ALL = Tuning("small", SHARE), Tuning("all", 1.0)
LONG = Tuning("small", SHARE, times=2)                 # TI-Net's head; PLAN.md, Changes
LENGTH = {1: "", 2: "-twice"}                          # in a calibration's names
OURS = ("--augment", "scale", "rotation", "translation", "colour-jitter")      # PeCLR's best


def simclr(*augment: str) -> Weights:
    """SimCLR with its own best transformations, or those named."""
    return Weights("peclr", ("--objective", "simclr", *augment))


def only(name: str) -> tuple[str, ...]:
    """One transformation alone, as in PeCLR's Fig. 5."""
    return ("--augment", name)


def ti_net(*variant: str, words: tuple[str, ...] = ()) -> Weights:
    """TI-Net's pre-training with some variants."""
    return Weights("ti_net", (*words, *(("--variant", *variant) if variant else ())))


def handmim(*variant: str, objective: str = "handmim") -> Weights:
    """HandMIM's, or with objective="ibot" iBOT's."""
    return Weights("handmim", ("--objective", objective, *(("--variant", *variant) if variant else ())))


def hamuco(*words: str, share: float = 1.0, data: str = "synthetic") -> Weights:
    """HaMuCo's one training."""
    return Weights("hamuco", words, share, data)


def hamuco_rows(data: str) -> tuple[Row, ...]:
    """HaMuCo whole and without its parts, and two baselines that see labels alone."""
    return (Row("full", hamuco(data=data)),
            *(Row(name, hamuco("--variant", name, data=data)) for name in ("single-view", "no-dcvi", "no-c", "no-d")),
            Row("canonpose", Weights("canonpose", data=data)),
            Row("lt-algebraic", Weights("lt_algebraic", data=data)))


PECLR_WEIGHTS = Weights("peclr")
MEAN_POSE = (("mean pose", "scratch", "mean_pose"),)
PROBE, SMALL_MM, ALL_MM = "probe_mpjpe_mm", "small_mpjpe_mm", "all_mpjpe_mm"

PECLR = Claim(
    "peclr", "PeCLR, frozen features (Tab. 1, Fig. 5 b)", "peclr",
    (Row("random"), Row("simclr", simclr()), Row("simclr-peclr-views", simclr(*OURS)),
     Row("peclr", PECLR_WEIGHTS),
     Row("simclr-rotation", simclr(*only("rotation"))),
     Row("peclr-rotation", Weights("peclr", only("rotation"))),
     Row("simclr-translation", simclr(*only("translation")), budgets=(1,)),
     Row("peclr-translation", Weights("peclr", only("translation")), budgets=(1,))),
    (Comparison("PeCLR beats SimCLR, each at its best augmentations", ("peclr", PROBE),
                ("simclr", PROBE), "3.4 % (Tab. 1, 3D EPE)", 1),
     Comparison("the same in 2D", ("peclr", "probe_2d_px"), ("simclr", "probe_2d_px"),
                "12.8 % (Tab. 1, 2D EPE)", 1),
     Comparison("undoing the views helps, augmentations alike", ("peclr", PROBE),
                ("simclr-peclr-views", PROBE), "not given", 1),
     Comparison("undoing rotation helps", ("peclr-rotation", PROBE), ("simclr-rotation", PROBE),
                "56 % (Fig. 5 b; Sec. 4.4: 57 %)", 1),
     Comparison("undoing translation helps", ("peclr-translation", PROBE),
                ("simclr-translation", PROBE), "34 % (Fig. 5 b)", 1),
     Comparison("PeCLR beats random features", ("peclr", PROBE), ("random", PROBE),
                "yes (Sec. 4.4)", 5)),
    probe=True, budgets=(1, 4), minutes=1)

PECLR_LABELS = Claim(
    "peclr-labels", "PeCLR, tuned end to end (Tab. 2, Fig. 6)", "peclr",
    (Row("scratch"), Row("simclr", simclr()), Row("peclr", PECLR_WEIGHTS)),
    (Comparison("PeCLR beats scratch with few labels", ("peclr", SMALL_MM), ("scratch", SMALL_MM),
                "up to 43 % 3D EPE (Sec. 1, Fig. 6)", 2),
     Comparison("and with all labels", ("peclr", ALL_MM), ("scratch", ALL_MM),
                "10.8 to 14.5 % PA-EPE (Tab. 2; pre-trained on YT3D as well)", 2),
     Comparison("PeCLR beats SimCLR with few labels", ("peclr", SMALL_MM), ("simclr", SMALL_MM),
                "not given", 2)),
    tunings=(SMALL, ALL), budgets=(1, 4), minutes=9, also=("small_pa_mpjpe_mm", "all_pa_mpjpe_mm"), beside=MEAN_POSE)

PECLR_TENTH = Claim(
    "peclr-tenth", "PeCLR, tuned with a tenth of the labels (Fig. 6; asked after a result)", "peclr",
    (Row("scratch"), Row("simclr", simclr()), Row("peclr", PECLR_WEIGHTS)),
    (Comparison("PeCLR beats scratch with a tenth of the labels", ("peclr", "tenth_mpjpe_mm"),
                ("scratch", "tenth_mpjpe_mm"), "up to 43 % 3D EPE (Sec. 1, Fig. 6)", 2),
     Comparison("PeCLR beats SimCLR", ("peclr", "tenth_mpjpe_mm"), ("simclr", "tenth_mpjpe_mm"), "not given", 2),
     Comparison("PeCLR learns faster than scratch", ("peclr", "tenth_area_mm"), ("scratch", "tenth_area_mm"),
                "not given", 2)),
    tunings=(Tuning("tenth", 0.1),), minutes=5, also=("tenth_pa_mpjpe_mm",), beside=MEAN_POSE)

STRONG = ("--w", "0.1")                                # a hundred times the paper's
NO_CONSTRAINTS = ("no-ordinary", "no-secondary", "no-identity")         # reconstruction alone
TI_NET_MONITORS = ("L_ord", "L_sec", "variance", "turn_change", "residual")
TI_NET = Claim(
    "ti_net", "TI-Net (Tab. 2, Fig. 5)", "ti_net",
    (Row("scratch"), Row("reconstruction", ti_net(*NO_CONSTRAINTS)),
     Row("simclr", simclr()), Row("peclr", PECLR_WEIGHTS, budgets=(1.5, 6)), Row("ti_net", ti_net(), budgets=(1.5, 6)),
     Row("ti_net-modulated", ti_net("modulated"), budgets=(1.5, 6)), Row("ti_net-strong", ti_net(words=STRONG))),
    (Comparison("TI-Net beats PeCLR", ("ti_net", SMALL_MM), ("peclr", SMALL_MM),
                "8.7 % (Tab. 2; PeCLR's copied: other pictures, split, head)", 2),
     Comparison("TI-Net beats SimCLR", ("ti_net", SMALL_MM), ("simclr", SMALL_MM),
                "17.4 % (Tab. 2, ImageNet; SimCLR's copied: other split, head)", 2),
     Comparison("TI-Net learns faster than SimCLR", ("ti_net", "small_area_mm"),
                ("simclr", "small_area_mm"), "yes (Fig. 5)", 2),
     Comparison("TI-Net beats scratch", ("ti_net", SMALL_MM), ("scratch", SMALL_MM),
                "not given", 2),
     Comparison("the constraints help beside reconstruction", ("ti_net", SMALL_MM),
                ("reconstruction", SMALL_MM), "not given", 2),
     Comparison("the same, frozen", ("ti_net", PROBE), ("reconstruction", PROBE), "not given", 1),
     Comparison("operators that can turn help", ("ti_net-modulated", SMALL_MM),
                ("ti_net", SMALL_MM), "ours (ti_net.py, 15)", 2),
     Comparison("w = 0.1 helps beside reconstruction (asked after a result)", ("ti_net-strong", SMALL_MM),
                ("reconstruction", SMALL_MM), "not given", 2),
     Comparison("w = 0.1 helps against scratch (asked after a result)", ("ti_net-strong", SMALL_MM), ("scratch", SMALL_MM),
                "not given", 2)),
    probe=True, tunings=(LONG,), budgets=(1.5,), minutes=11, monitors=TI_NET_MONITORS, also=("small_pa_mpjpe_mm",), beside=MEAN_POSE)

CLASS, PATCH = "class_mpjpe_mm", "patch_mpjpe_mm"
HALF = (0.5,)                          # of the claims whose pictures cost most; PLAN.md, Changes
HANDMIM = Claim(
    "handmim", "HandMIM (Tab. 3 and 5)", "handmim",
    (Row("scratch"), Row("ibot", handmim(objective="ibot")), Row("handmim", handmim()),
     Row("handmim-no-pose", handmim("no-pose")), Row("handmim-no-patch", handmim("no-patch")),
     Row("handmim-no-recon", handmim("no-recon"))),
    (Comparison("HandMIM beats iBOT, tuned with few labels", ("handmim", SMALL_MM),
                ("ibot", SMALL_MM), "3.1 to 5.9 % PA-JPE (Tab. 3)", 2),
     Comparison("frozen class token", ("handmim", CLASS), ("ibot", CLASS), "not given", 1),
     Comparison("frozen patches", ("handmim", PATCH), ("ibot", PATCH), "not given", 1),
     Comparison("HandMIM beats scratch", ("handmim", SMALL_MM), ("scratch", SMALL_MM),
                "5.3 to 8.9 % PA-JPE (Tab. 3)", 2),
     *(Comparison(f"L_{loss} helps", ("handmim", SMALL_MM), (f"handmim-no-{loss}", SMALL_MM),
                  f"{gain} % PA-JPE (Tab. 5)", 2)
       for loss, gain in (("pose", 4.4), ("patch", 4.1), ("recon", 2.5)))),
    probe=True, tunings=(SMALL,), budgets=(*HALF, 2), minutes=11, monitors=("L_pose", "entropy", "entropy_mean", "agreement"),
    also=("small_pa_mpjpe_mm",), beside=MEAN_POSE)

SINGLE, FUSION, ALONE = "single_n_mpjpe_mm", "fusion_n_mpjpe_mm", "single_view_n_mpjpe_mm"
LEARNT = "dlt_learnt_pa_mpjpe_mm"
HAMUCO_ALSO = ("single_mpjpe_mm", "fusion_mpjpe_mm", "single_pa_mpjpe_mm")
HAMUCO_BESIDE = tuple((title, "full", prefix) for title, prefix in (
    ("full, triangulated by RANSAC", "fusion_ransac"), ("labels", "labels"), ("labels, DLT", "dlt"),
    ("labels, DLT by confidence", "dlt_confidence"), ("labels, RANSAC", "ransac"), ("mean pose", "mean_pose")))
HAMUCO_COMPARED = (
    Comparison("the whole beats single views", ("full", SINGLE), ("single-view", ALONE),
               "46.6 % PA (Tab. 2, ResNet-50)", 2),
    Comparison("DCVI helps single views", ("full", SINGLE), ("no-dcvi", SINGLE),
               "17.4 % (Tab. 4)", 2),
    Comparison("L_c helps single views", ("full", SINGLE), ("no-c", SINGLE), "20.4 % (Tab. 4)", 2),
    Comparison("L_c helps fusion", ("full", FUSION), ("no-c", FUSION), "24.9 % (Tab. 4)", 2),
    Comparison("L_d helps single views", ("full", SINGLE), ("no-d", SINGLE), "34.5 % (Tab. 4)", 2),
    Comparison("interaction beats single views", ("full", "interaction_n_mpjpe_mm"),
               ("full", SINGLE), "25.9 % (Tab. 4)", 2),
    Comparison("in 2D predictions beat the labels learnt from", ("full", "single_2d_px"),
               ("full", "labels_2d_px"), "yes (Fig. 4)", 5),
    Comparison("fusion beats RANSAC of the labels, PA", ("full", "fusion_pa_mpjpe_mm"),
               ("full", "ransac_pa_mpjpe_mm"), "45.9 % (Tab. 3)", 2),
    Comparison("fusion beats DLT of the labels, PA", ("full", "fusion_pa_mpjpe_mm"),
               ("full", "dlt_pa_mpjpe_mm"), "59.8 % (Tab. 3)", 2),
    Comparison("pictures beat lifted labels (CanonPose's idea)", ("full", SINGLE),
               ("canonpose", SINGLE), "64.1 % (Tab. 1)", 2),
    Comparison("the same fused, PA", ("full", "fusion_pa_mpjpe_mm"),
               ("canonpose", "fusion_pa_mpjpe_mm"), "49.5 % (Tab. 3)", 2),
    Comparison("fusion beats labels triangulated by learnt confidences (LT-Algebraic's idea), PA",
               ("full", "fusion_pa_mpjpe_mm"), ("lt-algebraic", LEARNT), "32.1 % (Tab. 3)", 2),
    Comparison("such confidences beat DLT, PA", ("lt-algebraic", LEARNT), ("full", "dlt_pa_mpjpe_mm"),
               "40.9 % (Tab. 3; there 2D points are learnt, too)", 2))
HAMUCO = Claim(
    "hamuco", "HaMuCo (Tab. 1 to 4, Fig. 3 b and 4)", "hamuco",
    (*hamuco_rows("synthetic"),
     Row("2-views", hamuco("--views", "2"), budgets=HALF), Row("8-views", hamuco("--views", "8"))),
    (*HAMUCO_COMPARED,
     Comparison("4 views teach more than 2", ("full", SINGLE), ("2-views", SINGLE),
                "yes (Fig. 3 b)", 2),
     Comparison("8 views teach more than 4", ("8-views", SINGLE), ("full", SINGLE),
                "yes (Fig. 3 b)", 2)),
    budgets=(*HALF, 2), minutes=1, also=HAMUCO_ALSO, beside=HAMUCO_BESIDE)
HAMUCO_CALM = Claim(
    "hamuco-calm", "HaMuCo on palms that face the first camera (Tab. 1 to 4, Fig. 4; asked after a result)", "hamuco",
    hamuco_rows("synthetic:calm"), HAMUCO_COMPARED, budgets=HALF, minutes=1, chooser="hamuco-calm", also=HAMUCO_ALSO,
    beside=HAMUCO_BESIDE)

CORE = (PECLR, TI_NET, HAMUCO, HAMUCO_CALM, HANDMIM, PECLR_LABELS, PECLR_TENTH)

# ---- Further claims, in the order in which time goes to them -------------------------------------

TI_NET_WHY = Claim(
    "ti_net-why", "TI-Net, what stands in the way of its constraints: weight, operators, angles (frozen; asked after a result)", "ti_net",
    (Row("reconstruction", ti_net(*NO_CONSTRAINTS)), Row("ti_net", ti_net()), Row("modulated", ti_net("modulated")),
     Row("strong", ti_net(words=STRONG)), Row("strong-modulated", ti_net("modulated", words=STRONG)),
     Row("reconstruction-small-angles", ti_net(*NO_CONSTRAINTS, "small-angles")), Row("small-angles", ti_net("small-angles")),
     Row("strong-small-angles", ti_net("small-angles", words=STRONG))),
    (Comparison("w = 0.1 helps beside reconstruction", ("strong", PROBE), ("reconstruction", PROBE), "not given", 1),
     Comparison("so it does with operators that can turn", ("strong-modulated", PROBE), ("reconstruction", PROBE), "not given", 1),
     Comparison("operators that can turn help at w = 0.001", ("modulated", PROBE), ("reconstruction", PROBE), "not given", 1),
     Comparison("within 30 degrees the constraints help", ("small-angles", PROBE), ("reconstruction-small-angles", PROBE),
                "not given", 1),
     Comparison("the same at w = 0.1", ("strong-small-angles", PROBE), ("reconstruction-small-angles", PROBE), "not given", 1)),
    probe=True, budgets=(1.5,), minutes=1, monitors=TI_NET_MONITORS)
FROZEN_BLOCKS = Claim(
    "frozen-blocks", "HandMIM, first blocks frozen (Fig. 7)", "handmim",
    tuple(Row(f"{name}-{n}", weights, ("--freeze-blocks", str(n)))
          for n in (2, 4) for name, weights in (("scratch", None),
                                                ("ibot", handmim(objective="ibot")),
                                                ("handmim", handmim()))),
    tuple(Comparison(f"HandMIM beats iBOT, {n} of 4 blocks frozen", (f"handmim-{n}", SMALL_MM),
                     (f"ibot-{n}", SMALL_MM), "yes (Fig. 7)", 2) for n in (2, 4)),
    tunings=(SMALL,), budgets=HALF, minutes=10)
UNLABELLED = Claim(
    "unlabelled", "PeCLR, amount of unlabelled pictures (Fig. 6)", "peclr",
    (Row("eighth", Weights("peclr", share=0.125)), Row("whole", PECLR_WEIGHTS)),
    (Comparison("eight times the pictures help, frozen", ("whole", PROBE), ("eighth", PROBE),
                "not given", 1),
     Comparison("tuned with few labels", ("whole", SMALL_MM), ("eighth", SMALL_MM),
                "yes (Fig. 6, FH against FH + YT3D)", 2)),
    probe=True, tunings=(SMALL,), minutes=6)
DOMAINS = Claim(
    "domains", "HandMIM on another domain (Tab. 4)", "handmim",
    (Row("scratch"), Row("ibot", handmim(objective="ibot")), Row("handmim", handmim())),
    (Comparison("HandMIM beats scratch on a domain not tuned on", ("handmim", "small_on_B_mpjpe_mm"),
                ("scratch", "small_on_B_mpjpe_mm"), "not given", 2),
     Comparison("HandMIM beats iBOT there", ("handmim", "small_on_B_mpjpe_mm"),
                ("ibot", "small_on_B_mpjpe_mm"), "20.8 to 27.2 % PA-JPE against PeCLR (Tab. 4)", 2)),
    tunings=(SMALL,), tests=("synthetic", "synthetic:B"), budgets=HALF, minutes=11)
CALIBRATION = Claim(
    "calibration", "HaMuCo without known cameras (Tab. 1)", "hamuco",
    (Row("known", hamuco()), Row("unknown", hamuco("--calibration", "none")),
     Row("single-view", hamuco("--variant", "single-view"))),
    (Comparison("known cameras beat unknown ones", ("known", SINGLE), ("unknown", SINGLE),
                "27.0 % (Tab. 1)", 2),
     Comparison("unknown cameras still beat single views", ("unknown", SINGLE),
                ("single-view", ALONE), "not given", 2)), budgets=HALF, minutes=1)
ROUNDS = Claim(
    "rounds", "HaMuCo, iterative training (Sec. 4.6)", "hamuco",
    (Row("one", hamuco()), Row("three", hamuco("--rounds", "3"))),
    (Comparison("three rounds beat one, of three times the pictures", ("three", FUSION), ("one", FUSION),
                "1.4 % (Sec. 4.6)", 2),), budgets=HALF, minutes=1)
DATA_SHARE = Claim(
    "data-share", "HaMuCo, share of the moments (Fig. 3 a)", "hamuco",
    (Row("quarter", hamuco(share=0.25)), Row("whole", hamuco())),
    (Comparison("four times the moments help", ("whole", SINGLE), ("quarter", SINGLE),
                "yes (Fig. 3 a)", 2),), budgets=HALF, minutes=1)
SUPERVISION = Claim(
    "supervision", "HaMuCo, what is learnt from (Tab. 1 and 3)", "hamuco",
    (Row("noisy", hamuco()), Row("truth2d", hamuco("--supervision", "truth2d")),
     Row("truth3d", hamuco("--supervision", "truth3d")),
     Row("triangulated", hamuco("--variant", "single-view", "--supervision", "triangulated"))),
    (Comparison("true 3D beats noisy 2D, fused", ("truth3d", FUSION), ("noisy", FUSION),
                "31.8 % MPJPE, Opt-Center (Tab. 3)", 2),
     Comparison("learning together beats single views that learn triangulated labels", ("noisy", SINGLE),
                ("triangulated", ALONE), "43.7 % (Tab. 1, EpipolarPose)", 2)), budgets=HALF, minutes=1)

FURTHER = (TI_NET_WHY, FROZEN_BLOCKS, UNLABELLED, DOMAINS, CALIBRATION, ROUNDS, DATA_SHARE, SUPERVISION)

# ---- Calibration: the fine-tuning's rate on `scratch` alone, on a seed that no claim uses --------

CALIBRATE = (
    *(Claim(f"calibrate-{script}", f"the fine-tuning's rate of {script}, on scratch alone", script,
            tuple(Row(f"scratch-{rate:g}-of-{SHARE:g}{LENGTH[tuning.times]}", rate=rate)
                  for rate in GRID[script]), (), tunings=(tuning,), first_seed=100, minutes=minutes)
      for script, tuning, minutes in (("peclr", SMALL, 5), ("ti_net", LONG, 10), ("handmim", SMALL, 11))),
    *(Claim(f"calibrate-{name}", f"the rate of {name}, on single views alone", "hamuco",
            tuple(Row(f"single-view-{rate:g}", hamuco("--variant", "single-view", data=data), rate=rate)
                  for rate in GRID["hamuco"]), (), budgets=HALF, first_seed=100, minutes=1)
      for name, data in (("hamuco", "synthetic"), ("hamuco-calm", "synthetic:calm"))))


def calibration(claim: Claim) -> Claim | None:
    """The claim that chooses the rate of a claim's rows; None where they need none."""
    if claim in CALIBRATE or not (claim.tunings or claim.script == "hamuco"):
        return None
    return next(one for one in CALIBRATE if one.name == f"calibrate-{claim.chooser or claim.script}")


CLAIMS = {claim.name: claim for claim in (*CALIBRATE, *CORE, *FURTHER)}
