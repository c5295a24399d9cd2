"""`dp-curriculum inspect`: the owner is told everything, in places from which nothing is shared."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import CLASSES, bomb, grey, image_folder, photo, png, write_hub_folder
from PIL import Image

from dp_curriculum.cli import main


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def inspect(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, str]:
    """What the terminal shows, and what the file holds."""
    assert main(["inspect", *options, "--resolution", "8"]) == 0
    return capsys.readouterr().out, Path("PRIVATE-inspection/PRIVATE_inspection.txt").read_text()


def test_a_folder_of_images_is_told_file_by_file(capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("scans"), "cat/1.png", "cat/2.png", "dog/3.png", "eel/")
    for number in range(9):
        Path(f"scans/dog/broken-{number}.jpg").write_bytes(b"not an image")
    Path("scans/dog/bomb.png").write_bytes(bomb(8000))
    Path("scans/cat/deep.png").write_bytes(png(np.full((9, 12), 4095, dtype=np.uint16)))
    shown, kept = inspect(capsys, "--train_data_dir", "scans")
    for text in (shown, kept):
        assert (
            "4 of 14 rows contribute" in text
            and "9 contribute nothing: cannot be read: UnidentifiedImageError" in text
        )
        assert "1 contribute nothing: more than 50,000,000 pixels" in text and "scans/dog/bomb.png" in text
        assert "3  cat\n" in text and "1  dog\n" in text and "0  eel\n" in text
        assert "modes: L (3), I;16 (1)" in text and "width: 8 to 12 pixels" in text and "1 are not square" in text
        assert "1 have more than 8 bits: values from 4095 to 4095" in text
        assert "3 rows are in one group of equal images, at most 3 in one" in text
        assert text.count("PRIVATE: this was read from the images without any noise.") == 1
    assert "broken-7.jpg" not in shown and "and 4 more" in shown and "broken-7.jpg" in kept
    sheet = Image.open("PRIVATE-inspection/PRIVATE_contact_sheet.png")
    assert sheet.width > 8 * 8 and {16, 90} <= set(np.asarray(sheet).ravel().tolist())


def test_columns_beside_the_images_are_counted_by_value(capsys: pytest.CaptureFixture[str]) -> None:
    images = [png(photo(8 + row)) for row in range(6)]
    people = (["p1", "p1", "p1", "p2", "p3", None], datasets.Value("string"))
    write_hub_folder(Path("hub"), images, label=([0, 1, 9, None, 1, 0], CLASSES), person=people)
    shown, _ = inspect(capsys, "hub")
    assert "4 of 6 rows contribute" in shown and "2 contribute nothing: its label is no declared class" in shown
    assert "row 2" in shown and "row 3" in shown and "no two images are equal" in shown
    assert "column person: 4 values in 6 rows, 1.5 rows per value on average, at most 3" in shown
    assert "p1 (3)" in shown and "column label: 4 values" in shown


def test_values_that_are_no_declared_class_are_found_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("scans"), "1.png", "2.png")
    Path("scans/metadata.csv").write_text("file_name,kind\n1.png,Cat\n2.png,dog\n", encoding="utf-8")
    options = ("--train_data_dir", "scans", "--label_column", "kind", "--class_names", "cat", "dog")
    shown, _ = inspect(capsys, *options)
    assert "1 of 2 rows contribute" in shown and "column kind of metadata.csv: 2 values" in shown
    assert "Cat (1)" in shown


REFUSED = {
    "undeclared classes": (["1.png"], ["--label_column", "kind"], "--class_names to be given"),
    "folders in classes": (["a/1.png", "b/c/2.png"], [], "to be folders of images: b has sub-folders"),
    "too many classes": (["a/1.png", "b/2.png"], ["--num_classes", "3"], "--num_classes=3 to match the 2"),
}


@pytest.mark.parametrize(("paths", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_training_refuses_is_inspected_and_the_reason_is_told(
    paths: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(Path("scans"), *paths)
    Path("scans/metadata.csv").write_text("file_name,kind\n1.png,cat\n", encoding="utf-8")
    shown, _ = inspect(capsys, "--train_data_dir", "scans", *options)
    assert "training would refuse this: Expected" in shown and message in shown
    assert f"{len(paths)} of {len(paths)} rows contribute" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nobody/has-this"], "--dataset_name=nobody/has-this .* to be a readable dataset"),
        (["--train_data_dir", "nowhere"], "--train_data_dir=nowhere to be a folder"),
        (["zipped"], "to hold no archive"),
        (["digits", "--output_dir", "run/private"], "to lie outside of the run in"),
        (["digits", "--resolution", "2"], "--resolution=2 to be at least 4"),
        (["digits", "--target_epsilon", "3"], "Unrecognized arguments"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(Path("zipped"), "1.png")
    Path("zipped/more.zip").write_bytes(b"PK")
    Path("run/run").mkdir(parents=True)
    Path("run/run/config.yaml").write_text("", encoding="utf-8")
    assert main(["inspect", *options]) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == 1
    assert re.search(message, printed.err)
    assert not Path("PRIVATE-inspection").exists()


def test_an_empty_dataset_and_names_that_are_no_unicode_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert "0 of 0 rows contribute" in inspect(capsys, "--train_data_dir", "empty")[0]
    folder = Path("odd")
    folder.mkdir()
    (folder / "\udcff\n.png").write_bytes(png(grey(1))[:20])
    shown, kept = inspect(capsys, "--train_data_dir", "odd")
    assert "\\udcff\\n.png" in shown and "\\udcff\\n.png" in kept


def test_images_that_are_public_as_well_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("scans", "public"):
        image_folder(Path(name), "a/1.png", "b/2.png")
    for number, path in enumerate(("scans/a/3.png", "public/b/4.png", "public/b/5.png")):
        Path(path).write_bytes(png(photo(8 + number)))
    Path("scans/b/6.jpg").write_bytes(b"broken, as the next one is")
    Path("public/b/6.jpg").write_bytes(b"broken, as the one before is")
    shown, kept = inspect(capsys, "--train_data_dir", "scans", "--compare_with", "public")
    for text in (shown, kept):
        assert (
            "2 rows are in the public dataset too, equal to the pixel\n      scans/a/1.png\n      scans/b/2.png"
            in text
        )
    shown, _ = inspect(capsys, "digits", "--compare_with", "public")
    assert "0 rows are in the public dataset too" in shown


def test_the_configuration_of_a_run_says_how_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("scans"), "a/1.png", "b/2.png")
    Path("run.yaml").write_text("data: {train_data_dir: scans, class_names: [b, a]}\nprivacy: {target_epsilon: 3}\n")
    shown, _ = inspect(capsys, "--config", "run.yaml")
    assert shown.index("1  b") < shown.index("1  a")


def test_persons_are_counted_for_their_owner_beside_a_public_dataset_that_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    image_folder(Path("scans"), "a/ann/1.png", "a/bob/2.png", "b/ann/3.png", "b/4.png")
    image_folder(Path("public"), "a/1.png", "b/2.png")
    options = ("--train_data_dir", "scans", "--person_from", "folder", "--compare_with", "public")
    shown, _ = inspect(capsys, *options)
    assert "2 persons, 2 of them with images that contribute: 1 to 2 each" in shown and "names no person" in shown
    assert "rows are in the public dataset too" in shown
    # A flag takes the place of how a file names persons.
    Path("run.yaml").write_text("data: {train_data_dir: scans, person_column: who}\n")
    assert "2 persons" in inspect(capsys, "--config", "run.yaml", "--person_from", "folder")[0]
