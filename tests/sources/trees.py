"""Trees in the official layouts, typed from the notes, which several tests write."""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import axis_angle_to_matrix, mano_numpy
from sources.cameras import index_cameras
from sources.hands import Hands
from sources.index import Index
from sources.views import Views


GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "datasets.npz")


KEYS = {"image", "crop", "size", "K", "joints", "joints_ok", "verts", "uv", "uv_label", "visible",
        "confidence", "pose", "shape", "trans", "scale", "has", "side", "id", "box_source"}


def save(path: Path, picture: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return path


def noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8)


def one(root: Path, picture: np.ndarray, side: str = "right", **columns) -> Index:
    """An Index of a single picture."""
    save(root / "one.png", picture)
    columns = {key: np.array([value], float) for key, value in columns.items()}
    return Index("one", str(root), {"paths": np.array([b"one.png"]), "side": np.array([side]),
                                    **columns})


def picture(path: Path, w: int = 32, h: int = 32) -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.uint8)).save(path)


def mesh(hand: dict, pose: np.ndarray, shape: np.ndarray, trans: np.ndarray) -> tuple:
    """Vertices (778, 3) m and the chain's 16 joints of one posed hand, by the NumPy model."""
    R = axis_angle_to_matrix(torch.tensor(pose, dtype=torch.float64).view(1, 16, 3)).numpy()
    shape, trans = (np.asarray(x, float)[None] for x in (shape, trans))
    verts, joints = mano_numpy(hand, R, shape, trans)[:2]
    return verts[0], joints[0]


LABEL = {"path": "a.png", "side": "left", "box": [1, 2, 20, 10], "uv": [[5.0, 6.0]] * 21,
         "confidence": [0.5] * 21, "K": [[50, 0, 15.5], [0, 50, 15.5], [0, 0, 1]],
         "joints": [[0.0, 0.1, 0.5]] * 21}


def label_folder(root: Path, *labels: dict | str) -> Path:
    save(root / "a.png", noise(32, 32))
    lines = [label if isinstance(label, str) else json.dumps(label) for label in labels]
    (root / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return root


SERIALS = ["836212060125", "839512060362", "840412060917", "841412060263", "932122060857",
           "932122060861", "932122061900", "932122062010"]


def write_dexycb(root: Path, subjects: list[int], frames: int = 1, sequences: int = 100) -> None:
    """The official tree: in each label file joint_3d[0, 0] is (sequence, camera, frame)."""
    import yaml
    K = {"fx": 600.5, "fy": 601.5, "ppx": 310.25, "ppy": 240.75}
    for serial in SERIALS:
        file = root / "calibration" / "intrinsics" / f"{serial}_640x480.yml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"color": K, "depth": dict.fromkeys(K, 1.0)}))
    dates = ["20200709", "20200813", "20200820", "20200903", "20200908", "20200918", "20200928",
             "20201002", "20201015", "20201022"]
    for subject in subjects:
        home = root / f"{dates[subject]}-subject-{subject + 1:02d}"
        calibration = f"{dates[subject]}_{subject}"
        file = root / "calibration" / f"mano_{calibration}" / "mano.yml"
        file.parent.mkdir(parents=True)
        file.write_text(yaml.safe_dump({"betas": [subject + 0.1 * k for k in range(10)]}))
        for sequence in range(sequences):
            folder = home / f"{dates[subject]}_{140000 + sequence}"
            for camera, serial in enumerate(SERIALS):
                (folder / serial).mkdir(parents=True)
                for frame in range(frames):
                    (folder / serial / f"color_{frame:06d}.jpg").touch()
                    write_label(folder / serial, frame, [sequence, camera, frame])
            (folder / "meta.yml").write_text(yaml.safe_dump({
                "serials": SERIALS[::-1], "num_frames": frames, "extrinsics": "x",
                "mano_calib": [calibration], "mano_sides": ["left" if sequence % 2 else "right"]}))


def write_label(folder: Path, frame: int, first: list[float], uv: float = 100, **other) -> None:
    joint_3d = np.tile(np.array([0.1, 0.2, 0.5], np.float32), (1, 21, 1))
    joint_3d[0, 0] = first
    label = {"joint_3d": joint_3d, "joint_2d": np.full((1, 21, 2), uv, np.float32),
             "pose_m": np.arange(51, dtype=np.float32)[None] / 100, "seg": np.zeros((2, 2), "u1")}
    label["joint_2d"][0, 0] = [uv + 30, uv + 40]
    np.savez(folder / f"labels_{frame:06d}.npz", **label | other)


def write_h2o(root: Path, scenes: tuple[str, ...] = ("subject1/h1",), frames: int = 2) -> None:
    """Two hands before three of five cameras, 0, 1 and 4; the frames lie 1 cm apart in world x, the right hand 0.2 m off."""
    places = {0: ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 0, 0]), 1: ([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], [-0.5, 0, 0.5]),
              4: ([[1, 0, 0], [0, 0, -1], [0, 1, 0]], [0, 0.5, 0.6])}                   # rotation and centre, camera to world
    for home, camera in ((f"{scene}/0/cam{c}", c) for scene in scenes for c in places):
        R, centre = np.array(places[camera][0], float), np.array(places[camera][1], float)
        write = lambda name, values: (
            (root / home / name).parent.mkdir(parents=True, exist_ok=True), (root / home / name).write_text("  ".join(map(str, values)) + " \n"))
        write("cam_intrinsics.txt", [640.5, 636.25, 635.5, 366.75, 1280, 720])
        for f in range(frames):
            hands, fits = [], []
            for side in range(2):
                world = np.array([[0.2 * side + 0.01 * f + 0.002 * j, 0.001 * j, 0.5] for j in range(21)])
                hands += [1, *((world - centre - [0, 0, 0.01 * f * (camera == 4)]) @ R).ravel()]
                fits += [1, 0.1, 0.2, 0.3 + side, *[0.01 * k for k in range(48)], *[k - side for k in range(10)]]
            P = np.eye(4)
            P[:3, :3], P[:3, 3] = R, centre + [0, 0, 0.01 * f * (camera == 4)]         # the head moves
            for name, values in (("hand_pose", hands), ("cam_pose", P.ravel()), ("hand_pose_mano", fits)):
                write(f"{name}/{f:06d}.txt", values)
            picture(root / home / "rgb" / f"{f:06d}.png", 32, 18)


def write_doh100(home: Path, frames: dict[str, list] | None = None) -> None:
    """Frames of 40 x 30 px, each with an object beside its hands (handside, xmin, ymin, xmax, ymax)."""
    frames = frames or {"diy_v_AbCdEfGhIjK_frame000123": [("1", 11, 21, 30, 30), ("0", 1, 1, 8, 16)],
                        "vlog_v_0123456789a_frame000001": [("1", 11, 21, 30, 30)]}
    tag = lambda name, *inside: f"<{name}>{' '.join(map(str, inside))}</{name}>"
    for name, hands in frames.items():
        things = []
        for side, *edges in [*hands, ("None", 2, 2, 20, 20)]:
            box = tag("bndbox", *map(tag, ("xmin", "ymin", "xmax", "ymax"), edges))
            kind = "hand" if len(things) < len(hands) else "targetobject"
            things.append(tag("object", tag("name", kind), tag("difficult", 0), box, "" if side is None else tag("handside", side)))
        file = home / "Annotations" / f"{name}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(tag("annotation", tag("filename", f"{name}.jpg"), *things) + "\n")
        picture(home / "JPEGImages" / f"{name}.jpg", 40, 30)
    file = home / "ImageSets" / "Main" / "train.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(frames) + "\n")


def write_assembly101(root: Path, changes: dict | None = None, split: str = "val") -> None:
    """Two frames before two headset cameras: joint j of the 42 at (4 j, 2 j, 0) mm in frame 520, 50 mm farther in 522."""
    sequence, cameras = "nusar-2021_action_both_9012-c07c", ["HMC_84346135", "HMC_84355350"]
    places = [[[1, 0, 0, 10], [0, 1, 0, 20], [0, 0, 1, 400]], [[0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 300]]]
    images, notes = [], []
    for i, (frame, camera) in enumerate((frame, camera) for frame in (520, 522) for camera in cameras):
        name = f"ego_images_rectified/{split}/{sequence}/{camera}_mono10bit/{frame:06d}.jpg"
        images.append({"id": 7 + i, "file_name": name, "width": 636, "height": 480, "seq_name": sequence, "camera": camera, "frame_idx": frame})
        notes.append({"id": 30 + i, "image_id": 7 + i, "bbox": {"right": [201.5, 180.0, 290.25, 262.75], "left": [10, 20, 30, 60]},
                      "joint_valid": [1] * 42, "keypoints": [[1.0, 2.0]] * 42} | (changes or {}).get(i, {}))
        picture(root / "images" / name, 32, 24)
    keys = [f"{camera}_mono10bit" for camera in cameras]
    calibration = {"intrinsics": {key: [[134.5, 0, 321], [0, 134.5, 238], [0, 0, 1]] for key in keys},
                   "extrinsics": {f"{frame:06d}": dict(zip(keys, places)) for frame in (520, 522)}}
    joints = {f"{frame:06d}": {"world_coord": [[4.0 * j, 2.0 * j, 25.0 * (frame - 520)] for j in range(42)], "joint_valid": [1] * 41 + [0]}
              for frame in (520, 522)}
    for kind, content in (("ego_data", {"images": images, "annotations": notes}), ("ego_calib", {"calibration": {sequence: calibration}}),
                          ("joint_3d", {"annotations": {sequence: joints}})):
        file = root / "annotations" / split / f"assemblyhands_{split}_{kind}_v1-1.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))


def write_interhand(root: Path, changes: dict | None = None, fits: dict | None = None) -> None:
    """v1.0 with the golden camera: two hands, a right, a left; `changes` to the annotations."""
    kinds = ["interacting", "right", "left"]
    images, notes = [], []
    for i, kind in enumerate(kinds):
        valid = [int(kind != "left")] * 21 + [int(kind != "right")] * 21
        images.append({"id": 10 + i, "file_name": f"Capture3/0390_x/cam400026/image{100 + i}.jpg",
                       "width": 334, "height": 512, "capture": 3, "subject": 3, "camera": "400026",
                       "seq_name": "0390_x", "frame_idx": 100 + i})
        notes.append({"id": 20 + i, "image_id": 10 + i, "bbox": [30, 160, 180, 140],
                      "joint_valid": valid, "hand_type": kind, "hand_type_valid": 1}
                     | (changes or {}).get(i, {}))
        save(root / "images" / "test" / images[-1]["file_name"], noise(512, 334)[..., 0])   # grey
    frames = {str(100 + i): {"world_coord": GOLDEN["ih_world"].tolist(), "joint_valid": [1] * 42,
                             "hand_type": kind, "hand_type_valid": True}
              for i, kind in enumerate(kinds)}
    camera = {"campos": {"400026": GOLDEN["ih_campos"].tolist()},
              "camrot": {"400026": GOLDEN["ih_camrot"].tolist()},
              "focal": {"400026": GOLDEN["ih_focal"].tolist()},
              "princpt": {"400026": GOLDEN["ih_princpt"].tolist()}}
    for name, content in (("data", {"images": images, "annotations": notes}),
                          ("camera", {"3": camera}), ("joint_3d", {"3": frames}),
                          ("MANO_NeuralAnnot", {"3": fits or {}})):
        file = root / "annotations" / "test" / f"InterHand2.6M_test_{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))


def write_freihand(root: Path, home: str = "training", n: int = 3, **changes: list) -> None:
    """n hands as published: hand i lies at (0.01 i, 0, 0.5) m, its joints 5 mm apart in x and y."""
    joints = [[[0.01 * i + 0.005 * j, 0.005 * j, 0.5] for j in range(21)] for i in range(n)]
    content = {
        "K": [[[400.0 + i, 0, 112], [0, 500, 110], [0, 0, 1]] for i in range(n)], "xyz": joints,
        "mano": [[[0.01 * k + i for k in range(61)]] for i in range(n)],          # 1 x 61, as published
        "verts": [[[0.001 * k, i, 0.5] for k in range(778)] for i in range(n)],
        "scale": [0.03 + 0.001 * i for i in range(n)]} | changes
    for kind, values in content.items():
        if values is not None:
            (root / f"{home}_{kind}.json").write_text(json.dumps(values))
    for i in range(n):
        for variant in range(4 if home == "training" else 1):
            picture(root / home / "rgb" / f"{i + 32560 * variant:08d}.jpg")


def write_yt3d(home: Path, frames: dict[str, tuple] | None = None, **changes: object) -> np.ndarray:
    """Four hands in three frames of 40 x 30 px; -> their vertices (4, 778, 3) px as annotated."""
    names = ["youtube/abc/video/frames/7.png", "youtube/abc/video/frames/12.png",
             "youtube/glued/video/frames/3.png"]
    verts = np.random.default_rng(0).uniform(7, 25, (4, 778, 3)).astype(np.float32)
    verts[:, 0, :2], verts[:, 1, :2] = [4, 6], [28, 26]           # the corners of every box
    notes = [{"vertices": verts[i].tolist(), "is_left": left, "image_id": image, "id": 900 + i}
             for i, (left, image) in enumerate([(0, 55), (1, 55), (1, 53), (0, 54)])]
    images = [{"name": name, "width": 40, "height": 30, "id": 55 - i} for i, name in enumerate(names)]
    home.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": notes} | changes
    (home / "youtube_train.json").write_text(json.dumps(content))
    for name, size in (frames or dict.fromkeys(names, (40, 30))).items():
        picture(home / name, *size)
    return verts


def python2(value: object) -> bytes:
    """A value as Python 2's cPickle wrote it, opcode by opcode: strings and arrays are raw bytes."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"I01\n", False: b"I00\n"}[value]
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    if isinstance(value, (bytes, str)):
        raw = value.encode("latin1") if isinstance(value, str) else value
        return b"T" + len(raw).to_bytes(4, "little") + raw                     # BINSTRING
    if isinstance(value, (list, tuple)):
        return b"(" + b"".join(map(python2, value)) + (b"t" if isinstance(value, tuple) else b"l")
    if isinstance(value, dict):
        return b"(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"d"
    kind = b"cnumpy\ndtype\n" + python2((f"f{value.itemsize}", 0, 1)) + b"R"
    kind += python2((3, "<", None, None, None, -1, -1, 0)) + b"b"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,)) + python2("b")
    state = b"(" + python2(1) + python2(value.shape) + kind + python2(False) + python2(value.tobytes())
    return empty + b"tR" + state + b"tb"


def meta(i: int, **changes: object) -> dict:
    """A training label: joint j of frame i at (0.01 j, 0.002 j, -0.5 - 0.01 i) m, OpenGL axes."""
    joints = np.array([[0.01 * j, 0.002 * j, -0.5 - 0.01 * i] for j in range(21)])
    return {"handJoints3D": joints, "handPose": np.arange(48) / 100 + i, "objName": "003_cracker_box",
            "handTrans": np.array([0.1, 0.2, -0.6 - i]), "handBeta": np.arange(10.0) - i, "objLabel": 2,
            "camMat": np.array([[600.0, 0, 320], [0, 610, 240], [0, 0, 1]], "f4"),
            "camIDList": ["0", "1"], "objCorners3D": None} | changes


def write_ho3d(root: Path, split: str, labels: list, names: list[str], suffix: str = ".png") -> None:
    (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    for name, label in zip(names, labels):
        sequence, frame = name.split("/")
        picture(root / split / sequence / "rgb" / (frame + suffix), 64, 48)
        file = root / split / sequence / "meta" / f"{frame}.pkl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(label if isinstance(label, bytes) else python2(label) + b".")


def evaluation_label(i: int) -> dict:
    return {"handJoints3D": np.array([0.01 * i, 0.02, -0.5]), "handBoundingBox": [10, 5 + i, 40, 37],
            "camMat": np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]]), "objName": "a", "objLabel": 1}


def person(i: int, **changes: object) -> dict:
    """Both hands in picture i: left key point j at (10 + j, 20), right at (50, 30.5 + j)."""
    return {"id": 70 + i, "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 90, 60],
            "lefthand_valid": True, "lefthand_box": [9.5, 15, 22.25, 12],
            "lefthand_kpts": [x for j in range(21) for x in (10 + j, 20.0, 2)],
            "righthand_valid": True, "righthand_box": [45.0, 28, 10, 25],
            "righthand_kpts": [x for j in range(21) for x in (50, 30.5 + j, 1)]} | changes


def write_coco(root: Path, people: list[dict], **changes: object) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    ids = {one["image_id"] for one in people if "image_id" in one}
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 96, "height": 64} for i in sorted(ids)]
    content = {"images": images, "annotations": people} | changes
    (root / "annotations" / "coco_wholebody_val_v1.0.json").write_text(json.dumps(content))
    for i in ids:
        picture(root / "val2017" / f"{i:012d}.jpg", 96, 64)


def hanco_tree(root, g, sequence="0003", missing=(), folder="rgb"):
    """One frame in the official layout, from eight cameras' arrays; labels as HaMuCo released them."""
    write = lambda path, content: (path.parent.mkdir(parents=True, exist_ok=True), path.write_text(json.dumps(content)))
    write(root / "calib" / sequence / "00000000.json", {"K": g("tri/K").tolist(), "M": g("tri/M_w2c").tolist()})
    write(root / "xyz" / sequence / "00000000.json", g("tri/X_true").tolist())
    write(root / "shape" / sequence / "00000000.json", {"poses": [[0.1] * 48], "shapes": [[0.2] * 10],
                                                        "global_t": [[[0.01, 0.02, 0.5]]]})
    for c in range(8):
        if c not in missing:
            file = root / folder / sequence / f"cam{c}" / "00000000.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (224, 224), (30 * c, 80, 80)).save(file)
            write(root / "rgb_2d_keypoints" / sequence / f"cam{c}" / "00000000.json",
                  [g("tri/uv_noisy")[c].flatten().tolist(), g("tri/conf_VJ")[c][:, None].tolist()])
    return root


DIST = [-0.2, 0.1, 0.002, -0.001, 0.02]


def rig_tree(root, unit=None, side="right", labels=True, moving=False, frames=10):
    """Two cameras 90 degrees apart, a point cloud as labels, distorted as OpenCV's formula says."""
    R = [np.eye(3), np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])]
    K = np.array([[300.0, 0, 150], [0, 310, 120], [0, 0, 1]])
    X = 0.4 * np.random.default_rng(0).uniform(-1, 1, (frames, 21, 3))
    rig = {} if unit is None else {"unit_m": unit}
    rig |= {} if side == "right" else {"side": side}
    for c in range(2):
        rig[f"cam{c}"] = {"K": K.tolist(), "dist": DIST, "R": R[c].tolist(), "t": [0, 0, 3.0]}
        if moving and c:
            rig["cam1"]["frames"] = {"0002": {"R": R[c].tolist(), "t": [0, 0, 4.0]}}
        for f in range(frames):
            x = X[f] @ R[c].T + [0, 0, 3.0]
            a, b = x[:, 0] / x[:, 2], x[:, 1] / x[:, 2]
            r = a * a + b * b
            k = 1 - 0.2 * r + 0.1 * r * r + 0.02 * r ** 3
            u = 300 * (a * k + 2 * 0.002 * a * b - 0.001 * (r + 2 * a * a)) + 150
            v = 310 * (b * k + 0.002 * (r + 2 * b * b) - 2 * 0.001 * a * b) + 120
            if f == 4 and c == 1:
                continue
            for folder, name in (("frames", "jpg"), ("labels", "json")):
                (root / folder / f"cam{c}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (300, 240), (9, 9, 9)).save(root / "frames" / f"cam{c}" / f"{f:04d}.jpg")
            if labels:
                text = json.dumps([np.stack([u, v], 1).tolist(), [0.9] * 21])
                (root / "labels" / f"cam{c}" / f"{f:04d}.json").write_text(text)
    (root / "cameras.json").write_text(json.dumps(rig))
    return X


def open_tree(root, split="all", views=2):
    index = index_cameras(root, split)
    return Views(Hands(index, 64, 2.2), views)
