"""Small faithful copies of the data sets' layouts, as their archives unpack: names, lists, HDF5 structure."""

import csv
import io

import h5py
import numpy as np
from PIL import Image


def jpeg(seed):
    """A small JPEG, another one for each seed."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_images(folder, names):
    """A JPEG of its own for each name, in an order that is not the sorted one."""
    for name in sorted(names, reverse=True):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(list(f"{folder.name}/{name}".encode())))


def market1501(root):
    """3 training identities (4 images), 1 query, 2 gallery images of which one is background, 1 junk."""
    write_images(root / "bounding_box_train", [
        "0007_c3s1_000001_01.jpg", "0002_c1s1_000451_03.jpg", "0002_c6s2_000001_00.jpg", "1500_c2s1_000001_01.jpg",
    ])  # fmt: skip
    write_images(root / "query", ["0001_c1s1_000001_00.jpg"])
    write_images(
        root / "bounding_box_test", ["0001_c2s1_000001_00.jpg", "0000_c2s1_000002_00.jpg", "-1_c3s1_000003_00.jpg"]
    )
    for folder in ("gt_bbox", "gt_query"):
        (root / folder).mkdir()
    (root / "bounding_box_train" / "Thumbs.db").write_bytes(b"")
    return root


def market1501_500k(root):
    market1501(root)
    write_images(root / "distractors_500k", ["0000_c5s1_000001_00.jpg", "-1_c1s1_000002_00.jpg", "distractor_3.jpg"])
    return root


def dukemtmcreid(root):
    folder = root / "dukemtmc-reid/DukeMTMC-reID"
    write_images(folder / "bounding_box_train", [
        "0001_c2_f0046182.jpg", "0001_c5_f0056182.jpg", "0008_c8_f0000001.jpg",
    ])  # fmt: skip
    write_images(folder / "query", ["0005_c1_f0000002.jpg"])
    write_images(folder / "bounding_box_test", ["0005_c2_f0000003.jpg", "7000_c3_f0000004.jpg"])
    return root


def veri776(root):
    write_images(root / "VeRi/image_train", ["0001_c001_00016450_0.jpg", "0003_c020_00016460_0.jpg"])
    write_images(root / "VeRi/image_query", ["0002_c002_00030600_0.jpg"])
    write_images(root / "VeRi/image_test", ["0002_c003_00030640_0.jpg", "0002_c002_00030605_0.jpg"])
    return root


MSMT17_LISTS = {
    "train": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_000_15_0303morning_0010_1.jpg 1"],
    "val": ["0000/0000_003_07_0303afternoon_0032_2.jpg 0"],
    "query": ["0000/0000_000_04_0302morning_0099_0.jpg 0", "0001/0001_001_02_0303noon_0007_0.jpg 1"],
    "gallery": ["0000/0000_002_05_0302morning_0010_0.jpg 0", "0001/0001_001_14_0303noon_0001_0.jpg 1"],
}


def msmt17(root, folder="MSMT17_V1", train="train", test="test"):
    for name, lines in MSMT17_LISTS.items():
        images = [line.split()[0] for line in lines]
        write_images(root / folder / (train if name in ("train", "val") else test), images)
        (root / folder / f"list_{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    mac = root / folder / train / "0000/._0000_000_01_0303morning_0008_0.jpg"
    mac.write_bytes(b"Mac OS X")
    return root


def msmt17_v2(root):
    return msmt17(root, "MSMT17_V2", "mask_train_v2", "mask_test_v2")


def msmt17_like_market(root):
    folder = root / "MSMT17_V1"
    write_images(folder / "bounding_box_train", ["0000_c1_0000.jpg", "0001_c15_0001.jpg"])
    write_images(folder / "query", ["0000_c4_0000.jpg"])
    write_images(folder / "bounding_box_test", ["0000_c5_0001.jpg", "0001_c2_0002.jpg"])
    return root


# --- CUHK03 -----------------------------------------------------------------------------------------------------------

# {camera pair: {person: images that exist, of 1..10}}
CUHK03 = {1: {1: (1, 2, 6), 2: (1, 6, 7)}, 2: {1: (1, 10), 2: (5, 6)}, 3: {1: (1, 6)}}
CUHK03_TEST = [[(1, 2), (2, 1)], [(3, 1)]]  # two of the classic splits


def cuhk03_pixels(kind, pair, person, number):
    """(height, width, 3) uint8 of one image; sizes differ."""
    rng = np.random.default_rng([kind == "labeled", pair, person, number])
    return rng.integers(0, 256, (20 + number, 8 + person, 3), dtype=np.uint8)


def cuhk03(root, folder="cuhk03", protocol=True):
    """cuhk-03.mat as MATLAB 7.3 writes it: a 512-byte header before the HDF5, cells as references into #refs#, arrays
    with their axes reversed, empty cells as their size; and the new protocol's .mat files, which are MATLAB 5."""
    file = root / folder / "cuhk03_release/cuhk-03.mat"
    file.parent.mkdir(parents=True)
    with h5py.File(file, "w", userblock_size=512) as mat:
        refs = mat.create_group("#refs#")

        def put(array, matlab_class, **attributes):
            data = refs.create_dataset(str(len(refs)), data=array)
            data.attrs["MATLAB_class"] = np.bytes_(matlab_class)
            data.attrs.update(attributes)
            return data.ref

        def cell(name, references):
            data = mat.create_dataset(name, data=np.array(references, dtype=h5py.ref_dtype)[None])
            data.attrs["MATLAB_class"] = np.bytes_("cell")

        for kind in ("labeled", "detected"):
            pairs = []
            for pair, persons in CUHK03.items():
                grid = np.empty((10, len(persons)), dtype=h5py.ref_dtype)  # reversed: persons x 10 in MATLAB
                for person, existing in persons.items():
                    for number in range(1, 11):
                        if number in existing:
                            ref = put(cuhk03_pixels(kind, pair, person, number).T, "uint8")
                        else:
                            ref = put(np.zeros(2, np.uint64), "double", MATLAB_empty=np.uint8(1))
                        grid[number - 1, person - 1] = ref
                pairs.append(put(grid, "cell"))
            cell(kind, pairs)
        cell("testsets", [put(np.array(pairs, dtype=np.float64).T, "double") for pairs in CUHK03_TEST])
    with file.open("r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM")
    if protocol:
        for kind in ("labeled", "detected"):
            cuhk03_protocol(root / folder / f"cuhk03_new_protocol_config_{kind}.mat")
    return root


def cuhk03_protocol(file):
    from scipy.io import savemat

    names, labels, cameras = [], [], []
    for pair, persons in CUHK03.items():
        for person, existing in persons.items():
            for number in existing:
                view = 1 if number <= 5 else 2
                names.append(f"{pair}_{person:03d}_{view}_{number:02d}.png")
                labels.append(100 * pair + person)
                cameras.append(view)
    filelist = np.empty((len(names), 1), dtype=object)
    filelist[:, 0] = names
    # Persons 1_001 and 2_001 train; the first images of the others are queries, the rest is gallery. 1-based.
    is_train = np.isin(labels, [101, 201])
    first = np.array([n.endswith(("1_01.png", "1_05.png")) for n in names])
    index = {
        "train_idx": np.flatnonzero(is_train)[:, None] + 1.0,
        "query_idx": np.flatnonzero(~is_train & first)[:, None] + 1.0,
        "gallery_idx": np.flatnonzero(~is_train & ~first)[:, None] + 1.0,
    }
    arrays = {"labels": np.array(labels, float)[:, None], "camId": np.array(cameras, float)[:, None]}
    savemat(file, {**index, **arrays, "filelist": filelist})


# --- their own --------------------------------------------------------------------------------------------------------

MANIFEST = [
    ("a/1.jpg", "zoe", "door", "train"),
    ("a/2.jpg", "zoe", "hall", "train"),
    ("b/3.jpg", "adam", "door", "train"),
    ("b/4.jpg", "10", "door", "query"),
    ("b/5.jpg", "10", "hall", "gallery"),
    ("b/6.jpg", "9", "hall", "gallery"),
]


def manifest(root, rows=MANIFEST, header=("path", "pid", "camid", "split"), name="manifest.csv", images=True):
    root.mkdir(parents=True, exist_ok=True)
    if images:
        write_images(root, [row[0] for row in rows])
    with (root / name).open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return root


def folder(root):
    write_images(root, [
        "train/anna/c1_001.jpg", "train/anna/c2_001.jpg", "train/bert/c1_002.png.jpg",
        "query/carl/c1_1.jpg", "gallery/carl/c2_1.jpg", "gallery/dora/c2_2.jpg",
    ])  # fmt: skip
    return root


LAYOUTS = {
    "market1501": market1501, "market1501_500k": market1501_500k, "dukemtmcreid": dukemtmcreid, "veri776": veri776,
    "msmt17": msmt17, "cuhk03": cuhk03, "csv": manifest, "folder": folder,
}  # fmt: skip
