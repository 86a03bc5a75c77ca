"""Pictures as hub sets keep them: Parquet with splits, subsets and folders, all read locally."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps
from task_bases import SEEING, run_and_prove, save_pictures, save_seeing_base

from adaptive_lora.config import DataConfig, StudyConfig, study_from
from adaptive_lora.data import split_set
from adaptive_lora.data.example_columns import StoredExamples
from adaptive_lora.data.examples import Example, MediaFile
from adaptive_lora.data.images import load_captions, load_classes
from adaptive_lora.errors import DataError
from adaptive_lora.serving import open_image

COLOURS = ("blue", "green", "red")
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """Thirty pictures of three colours in turn."""
    folder = tmp_path_factory.mktemp("pictures")
    return folder, save_pictures(folder, 30)


def hub_set(folder: Path, parts: dict[str, Rows], images: Path) -> Path:
    """Write what `push_to_hub` writes: Parquet files with the pictures and their features."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    (folder / "data").mkdir(parents=True)
    for split, rows in parts.items():
        columns = {
            "image": [{"bytes": (images / row["image"]).read_bytes()} for row in rows],
            "label": [COLOURS.index(row["label"]) for row in rows],
        }
        file = folder / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    return folder


def config_of(data: Path, **changes: Any) -> DataConfig:
    return DataConfig(data=str(data), **changes)


def test_a_hub_set_with_a_test_split(images: tuple[Path, Rows], own_store: str, tmp_path: Path) -> None:
    home, rows = images
    data = hub_set(tmp_path / "set", {"train": rows[:21], "test": rows[21:]}, home)
    found = load_classes(config_of(data, test_split="test"))
    assert found.labels == COLOURS
    assert [example.response for example in found.examples] == [r["label"] for r in rows[:21]]
    assert found.test is not None
    assert [e.image for e in found.test] == [(home / r["image"]).read_bytes() for r in rows[21:]]
    kind, settings, head = SEEING["vit"]
    proven = run_and_prove(study(save_seeing_base(tmp_path / "vit", kind, settings, head), data, own_store))
    assert proven.records[0].tags["task"] == "image_classification"
    assert proven.records[0].test is not None
    assert len(proven.records[0].test.nll_E) == 9


def study(model: Path, data: Path, store: str) -> StudyConfig:
    return study_from(
        {
            "model": str(model), "data": str(data), "test_split": "test", "tracking_uri": store,
            "methods": "uniform:rank=2", "seeds": "0", "lr": "1e-2", "max_steps": 3,
            "batch_size": 4, "validations": 1, "precision": "fp32",
        }
    )  # fmt: skip


def test_a_picture_of_the_test_split_leaves_the_others(images: tuple[Path, Rows], tmp_path: Path) -> None:
    home, rows = images
    data = hub_set(tmp_path / "set", {"train": rows[:24], "test": rows[20:]}, home)
    found = load_classes(config_of(data, test_split="test"))
    assert found.test is not None
    same = {example.prompt for example in found.examples} & {e.prompt for e in found.test}
    assert len(same) == 4
    parts = split_set(found, config_of(data, test_split="test"), 0)
    assert not same & {example.prompt for example in (*parts.train, *parts.validation)}
    assert len(parts.train) + len(parts.validation) == 20


def test_one_subset_of_several(images: tuple[Path, Rows], tmp_path: Path) -> None:
    home, rows = images
    hub_set(tmp_path / "set" / "warm", {"train": rows[:9]}, home)
    hub_set(tmp_path / "set" / "all", {"train": rows}, home)
    card = "".join(f"- config_name: {name}\n  data_files: {name}/data/*.parquet\n" for name in ("warm", "all"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{card}---\n", encoding="utf-8")
    with pytest.raises(DataError, match="warm"):  # which subsets there are
        load_classes(config_of(tmp_path / "set"))
    for name, count in (("warm", 9), ("all", 30)):
        assert len(load_classes(config_of(tmp_path / "set", data_subset=name)).examples) == count
    hub_set(tmp_path / "other", {"train": rows[:6]}, home)  # it has no subsets
    found = load_classes(config_of(tmp_path / "set", data_subset="warm", test_data=str(tmp_path / "other")))
    assert found.test is not None
    assert (len(found.examples), len(found.test)) == (9, 6)


@pytest.mark.parametrize("held", ["bytes", "path"])
def test_parquet_without_features(images: tuple[Path, Rows], tmp_path: Path, held: str) -> None:
    """Other writers leave {bytes, path} as a struct; a path is relative to the table."""
    home, rows = images
    shutil.copytree(home, tmp_path / "set" / "images")
    images = [
        {"bytes": (home / row["image"]).read_bytes() if held == "bytes" else None, "path": f"images/{row['image']}"}
        for row in rows
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(images, type=kind), "label": [row["label"] for row in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "set" / "rows.parquet")
    found = load_classes(config_of(tmp_path / "set" / "rows.parquet"))
    assert found.labels == COLOURS
    assert [e.image for e in found.examples] == [(home / r["image"]).read_bytes() for r in rows]


def test_folders_of_classes_in_folders_of_splits(images: tuple[Path, Rows], tmp_path: Path) -> None:
    home, rows = images
    for number, row in enumerate(rows):
        part = tmp_path / ("train" if number < 20 else "test") / row["label"]
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(home / row["image"], part)
    found = load_classes(config_of(tmp_path, test_split="test"))
    assert found.test is not None
    assert (len(found.examples), len(found.test)) == (20, 10)
    for example in (*found.examples, *found.test):
        source = next(r for r in rows if (home / r["image"]).read_bytes() == example.image)
        assert example.response == found.labels[int(example.target or 0)] == source["label"]


def test_a_folder_with_captions(images: tuple[Path, Rows], tmp_path: Path) -> None:
    home, rows = images
    for split, chosen in (("train", rows[:20]), ("test", rows[20:])):
        (tmp_path / split).mkdir()
        for row in chosen:
            shutil.copy(home / row["image"], tmp_path / split)
        lines = [json.dumps({"file_name": r["image"], "caption": r["caption"]}) for r in chosen]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = load_captions(config_of(tmp_path, test_split="test"))
    assert found.test is not None
    told = {(e.image, e.response) for e in (*found.examples, *found.test)}
    assert told == {((home / row["image"]).read_bytes(), row["caption"]) for row in rows}
    assert len(found.test) == 10


def test_files_are_named_relative_to_the_table_that_names_them(images: tuple[Path, Rows], tmp_path: Path) -> None:
    home, rows = images
    for part, chosen in (("one", rows[:20]), ("other", rows[20:])):
        (tmp_path / part).mkdir()
        for row in chosen:
            shutil.copy(home / row["image"], tmp_path / part)
        (tmp_path / part / "rows.json").write_text(json.dumps(chosen), encoding="utf-8")
    found = load_classes(config_of(tmp_path / "one" / "rows.json", test_data=str(tmp_path / "other" / "rows.json")))
    assert found.test is not None
    assert [e.image for e in found.test] == [(home / r["image"]).read_bytes() for r in rows[20:]]


def test_a_file_that_changes_after_the_data_were_read_is_refused_by_name(
    images: tuple[Path, Rows], tmp_path: Path
) -> None:
    home, rows = images
    for row in rows:
        shutil.copy(home / row["image"], tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    changed, gone, kept = load_classes(config_of(tmp_path / "rows.json")).examples[:3]
    content = (tmp_path / rows[2]["image"]).read_bytes()
    (tmp_path / rows[0]["image"]).write_bytes(content)
    (tmp_path / rows[1]["image"]).unlink()
    with pytest.raises(DataError, match=rf"{rows[0]['image']} changed since the data were read; put it back"):
        assert changed.image
    with pytest.raises(DataError, match=rf"{rows[1]['image']} cannot be read any more: No such file"):
        assert gone.image
    assert kept.image == content


@pytest.mark.parametrize("cache", ["", "cache"], ids=["in memory", "in a file"])
def test_examples_are_what_was_stored(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_LORA_CACHE", cache and str(tmp_path / cache))
    plain = Example(id="a", prompt="say ü\0", response="", where="rows.json line 1")
    full = Example(
        id="b", prompt="", response="x", where=os.fsdecode(b"\xff.json"), second="s", target=-0.5, question="?",
        messages=(("user", "hi"), ("assistant", "x")), full_messages="[]", unlearned=(0, 2), tools="[1]",
        media=MediaFile(b"d" * 32, b"content"),
    )  # fmt: skip
    many = [plain, full] * 600
    stored = StoredExamples(iter(many))
    assert list(stored) == many
    assert (stored[1199], stored[-2], stored[999:1001]) == (full, plain, [full, plain])
    assert stored[1].media is not None
    assert stored[1].media.content() == b"content"


# --- what a picture's file may hold


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gigantic() -> bytes:
    """Return a PNG of 60,000 by 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_picture_is_turned_as_its_camera_noted() -> None:
    picture = Image.linear_gradient("L").resize((16, 8)).convert("RGB")
    noted = Image.Exif()
    noted[0x0112] = 6
    file = saved(picture, "JPEG", exif=noted)
    assert open_image(file).size == (8, 16)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    assert open_image(file).tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray(numpy.full((4, 4), 30_000, "uint16"))),
        saved(Image.fromarray(numpy.full((4, 4), 70_000, "int32")), "TIFF"),
        saved(Image.fromarray(numpy.full((4, 4), 0.5, "float32")), "TIFF"),
        saved(Image.effect_noise((64, 64), 50))[:900],
        gigantic(), b"", b"<svg/>",
    ],
    ids=["16 bits", "32 bits", "floats", "truncated", "gigantic", "empty", "svg"],
)  # fmt: skip
def test_pictures_that_would_be_changed_or_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    """Of more than 8 bits a channel, all above 255 would become white."""
    (tmp_path / "bad.png").write_bytes(content)
    for n, colour in enumerate(COLOURS):
        (tmp_path / f"{n}.png").write_bytes(saved(Image.new("RGB", (4, 4), colour)))
    table = [{"image": f"{n}.png", "label": colour} for n, colour in enumerate(COLOURS)]
    table += [{"image": "bad.png", "label": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(DataError, match=r"item 3 .*column 'image' must be an image: "):
        load_classes(config_of(tmp_path / "rows.json"))
    left = load_classes(config_of(tmp_path / "rows.json", on_bad_row="skip"))
    assert len(left.examples) == 3


def test_what_is_not_used_of_pictures_is_counted(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in COLOURS]
    palette = frames[1].convert("P")
    files = {
        "a.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "b.png": saved(palette, transparency=bytes(range(200))),
        "c.png": saved(frames[2]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    table = [{"image": name, "label": name} for name in files]
    (tmp_path / "rows.json").write_text(json.dumps(table), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (reading,) = load_classes(config_of(tmp_path / "rows.json")).readings
    assert reading.notes == (
        "1 images have several frames or pages: the first is used",
        "1 images have transparent pixels: their colours are used",
    )
