"""The report folder: JSON, Markdown, plots and a page that needs no other file."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dp_curriculum.data import PrivateImages
from dp_curriculum.evaluation.evaluation import MEANINGS, NO_TRAINING_IMAGE, NOT_COVERED, Evaluation, Metric
from dp_curriculum.evaluation.evaluation_report import StagePoint, format_value, save_nearest_neighbors, save_report


METRICS = (
    Metric("accuracy_cnn", 0.9134, "12 generated images", NO_TRAINING_IMAGE, spread=0.0123),
    Metric("kid", 0.012345, "Inception", NO_TRAINING_IMAGE, spread=0.00123),
    Metric("membership_auc", 0.5321, "training images", NOT_COVERED, interval=(0.4987, 0.5655)),
    Metric("fd_classifier", 12.3456, "a <b> & a", NO_TRAINING_IMAGE),
)
STAGES = (StagePoint("mean", 1.2, 0.7, 30.0), StagePoint("dp_sgd", 9.99, 0.91, 12.3))


def generated(num_classes: int = 3, num_channels: int = 1) -> Evaluation:
    images = torch.rand(12, num_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    confusion = np.diag(np.arange(num_classes))
    return Evaluation(METRICS, images, torch.arange(12) % num_classes, confusion)


def real(num_classes: int = 3, num_channels: int = 1) -> PrivateImages:
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, num_channels, 8, 8)
    return PrivateImages(images, torch.arange(30) % num_classes, tuple(f"class {i}" for i in range(num_classes)))


def report(folder: Path, **options: Any) -> Path:
    given: dict[str, Any] = {
        "title": "Evaluation of <model>",
        "epsilon": "(10, 1e-05)-DP & more",
        "reference_is_public": True,
        **options,
    }
    evaluation, reference = given.pop("evaluation", generated()), given.pop("reference", real())
    save_report(folder / "report", evaluation, reference, **given)
    return folder / "report"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_holds_numbers_text_and_plots_and_a_page_where_asked(tmp_path: Path) -> None:
    least = {"evaluation.json", "evaluation.md", "real_beside_generated.png", "confusion.png"}
    assert names(report(tmp_path)) == least
    full = names(report(tmp_path, stages=STAGES, as_html=True))
    assert full == least | {"stages.png", "evaluation.html"}
    for name in full:
        if name.endswith(".png"):
            with Image.open(tmp_path / "report" / name) as picture:
                picture.load()
                assert min(picture.size) > 100


def test_json_holds_every_number_and_no_infinity(tmp_path: Path) -> None:
    endless = (STAGES[0], StagePoint("dp_sgd", float("inf"), 0.9, 12.3))
    text = (report(tmp_path, stages=endless) / "evaluation.json").read_text()
    numbers = json.loads(text, parse_constant=pytest.fail)
    assert [metric["value"] for metric in numbers["metrics"]] == [metric.value for metric in METRICS]
    assert numbers["metrics"][2]["interval"] == [0.4987, 0.5655] and numbers["metrics"][0]["spread"] == 0.0123
    assert [stage["epsilon"] for stage in numbers["stages"]] == [1.2, None]
    assert numbers["epsilon"] == "(10, 1e-05)-DP & more" and numbers["num_images"] == 12


def test_values_are_shown_with_spread_and_interval() -> None:
    shown = [format_value(metric) for metric in METRICS]
    assert shown == ["91.3 % ± 1.2", "0.01235 ± 0.0012", "0.5321 [0.499, 0.566]", "12.35"]


def test_markdown_has_a_row_a_metric_and_every_picture(tmp_path: Path) -> None:
    folder = report(tmp_path, stages=STAGES)
    text = (folder / "evaluation.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(METRICS) and {row.count("|") for row in rows} == {6}
    for metric in METRICS:
        cells = (metric.name, format_value(metric), metric.meaning, metric.privacy)
        assert any(all(cell in row for cell in cells) for row in rows)
    assert {name for name in names(folder) if name.endswith(".png")} == {
        line.split("(")[-1].rstrip(")") for line in text.splitlines() if line.startswith("![")
    }


class Links(HTMLParser):
    """All that a page names, its text, and whether its tags are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.texts: list[str] = []
        self.open_tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag not in ("img", "meta"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    folder = report(tmp_path, stages=STAGES, as_html=True)
    text = (folder / "evaluation.html").read_text()
    page = Links(text)
    assert page.open_tags == []
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
    inlined = [base64.b64decode(link.removeprefix("data:image/png;base64,"), validate=True) for link in page.links]
    assert sorted(inlined) == sorted(pictures) and len(pictures) == 3
    assert all(Image.open(io.BytesIO(picture)).format == "PNG" for picture in inlined)
    for word in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert word not in text


def test_the_page_shows_names_as_they_are_with_spread_and_interval(tmp_path: Path) -> None:
    page = Links((report(tmp_path, as_html=True) / "evaluation.html").read_text())
    for shown in ("Evaluation of <model>", "(10, 1e-05)-DP & more", "a <b> & a", "91.3 % ± 1.2", NOT_COVERED):
        assert shown in page.texts
    assert "0.5321 [0.499, 0.566]" in page.texts


def test_a_sheet_of_training_images_is_called_private(tmp_path: Path) -> None:
    folder = report(tmp_path, reference_is_private=True, as_html=True)
    assert "PRIVATE_real_beside_generated.png" in names(folder)
    assert "real_beside_generated.png" not in names(folder)
    for name in ("evaluation.md", "PRIVATE_evaluation.html"):
        text = (folder / name).read_text()
        assert "PRIVATE, shows training images" in text and "Do not share it." in text


def test_what_shows_images_that_are_not_known_to_be_public_is_called_private(tmp_path: Path) -> None:
    """In a hospital the test split is private, too."""
    folder = report(tmp_path, reference_is_public=False, as_html=True)
    assert {"PRIVATE_real_beside_generated.png", "PRIVATE_evaluation.html"} <= names(folder)
    assert not {"real_beside_generated.png", "evaluation.html"} & names(folder)
    assert "PRIVATE, shows real images that are not known to be public" in (folder / "evaluation.md").read_text()
    report(tmp_path, as_html=True)
    assert not [name for name in names(folder) if name.startswith("PRIVATE")]


@pytest.mark.parametrize(
    ("marks", "private"),
    [
        ({"reference_is_public": True}, False),
        ({"reference_is_public": False}, True),
        ({"reference_is_public": True, "reference_is_private": True}, True),  # trained on, whoever may see it
    ],
)
def test_json_and_markdown_say_that_they_are_private(marks: dict[str, bool], private: bool, tmp_path: Path) -> None:
    folder = report(tmp_path, **marks)
    numbers = json.loads((folder / "evaluation.json").read_text())
    assert numbers["private"] is private and ("warning" in numbers) is private
    text = (folder / "evaluation.md").read_text()
    assert ("**PRIVATE: " in text) is private
    if private:
        assert numbers["warning"] in text and numbers["warning"].endswith("Do not share it.")


def test_the_report_says_that_images_were_chosen_by_a_classifier(tmp_path: Path) -> None:
    for chosen in (True, False):
        folder = report(tmp_path, filter_by_classifier=chosen, as_html=True)
        assert json.loads((folder / "evaluation.json").read_text())["filter_by_classifier"] is chosen
        for name in ("evaluation.md", "evaluation.html"):
            assert ("were drawn again" in (folder / name).read_text()) is chosen
        assert json.loads((folder / "evaluation.json").read_text())["epsilon"] == "(10, 1e-05)-DP & more"


@pytest.mark.parametrize("name", sorted(MEANINGS))
def test_each_number_says_what_it_means_and_which_way_is_good(name: str) -> None:
    meaning = Metric(name, 1.0, "", NO_TRAINING_IMAGE).meaning
    assert any(words in meaning for words in ("higher is better", "lower is better", "is good")), meaning


def tiles(path: Path, columns: int, rows: int) -> np.ndarray:
    """Middle pixel of each tile of a sheet, `(rows, columns)`."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    return pixels[height // 2 :: height, width // 2 :: width]


def test_real_images_are_on_the_left_of_generated_ones_of_their_class(tmp_path: Path) -> None:
    ones = Evaluation(METRICS, torch.ones(12, 1, 8, 8) * 200 / 255, torch.arange(12) % 3)
    found = tiles(report(tmp_path, evaluation=ones) / "real_beside_generated.png", 17, 3)
    for label in range(3):
        assert found[label, :8].tolist() == [label + 3 * index for index in range(8)]
        assert found[label, 8] == 255
        assert found[label, 9:].tolist() == [200] * 4 + [255] * 4  # four were generated


def test_each_generated_image_is_above_its_nearest_training_image(tmp_path: Path) -> None:
    order = torch.tensor([29, 3, 17, 8])
    images = real().images[order].float() / 255 + 1e-4
    save_nearest_neighbors(tmp_path / "PRIVATE.png", images, real())
    assert tiles(tmp_path / "PRIVATE.png", 4, 2).tolist() == [order.tolist()] * 2


@pytest.mark.parametrize(("num_classes", "num_channels"), [(1, 1), (25, 3)])
def test_one_class_and_many_classes_in_colour(num_classes: int, num_channels: int, tmp_path: Path) -> None:
    evaluation, reference = generated(num_classes, num_channels), real(num_classes, num_channels)
    folder = report(tmp_path, evaluation=evaluation, reference=reference, as_html=True)
    with Image.open(folder / "real_beside_generated.png") as sheet:
        assert sheet.mode == ("RGB" if num_channels == 3 else "L")


def test_a_report_holds_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    """A page, a plot or a sheet that this evaluation did not make would show other numbers."""
    folder = report(tmp_path, stages=STAGES, as_html=True, reference_is_private=True)
    (folder / "PRIVATE_nearest_training_images.png").write_bytes(b"of --leakage")
    (folder / "notes.txt").write_text("mine")
    report(tmp_path)
    assert names(folder) == {
        "evaluation.json", "evaluation.md", "real_beside_generated.png", "confusion.png", "notes.txt",
        "PRIVATE_nearest_training_images.png",
    }  # fmt: skip
