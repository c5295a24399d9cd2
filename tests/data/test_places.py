"""Whether a name is a place is asked once, when a run opens its datasets, and the answer is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from dp_curriculum.cli import main
from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data import digits_dataset, load_images
from dp_curriculum.data.places import is_folder_name, settle_places, share_images
from dp_curriculum.lessons.public_images import check_not_private
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.sharing import hub as hub_client
from dp_curriculum.sharing.export import export_release
from dp_curriculum.sharing.hub import canonical_dataset_id
from dp_curriculum.training.curriculum import run_curriculum


PRIVATE, PUBLIC = "oncology/patients-2024", "shapes/coloured"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two folders of images whose relative names look like names on the Hub."""
    for name, shade in ((PRIVATE, 40), (PUBLIC, 90)):
        for label in ("a", "b"):
            (tmp_path / "workplace" / name / label).mkdir(parents=True)
            for index in range(5):
                picture = Image.new("L", (8, 8), shade + 10 * index + (5 if label == "b" else 0))
                picture.save(tmp_path / "workplace" / name / label / f"{index}.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "workplace")
    return tmp_path


def small(make_config: Any, **fields: Any) -> CurriculumConfig:
    quick = {"stages": ["public", "mean"], "num_inference_steps": 1, "pretrain_steps": 1, "sample_steps": 0}
    return make_config(**{**quick, "dataset_name": PRIVATE, "pretrain_dataset_name": PUBLIC, **fields})


@pytest.fixture
def trained(workplace: Path, make_config: Any) -> Path:
    run_curriculum(small(make_config), output_dir=workplace / "out")
    return workplace / "out"


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [False, True])
def test_a_relative_folder_is_named_by_no_card_wherever_it_is_exported(
    gone: bool, trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another directory, or when they are gone, the names look like those of datasets on the Hub."""
    monkeypatch.chdir(workplace / "elsewhere")
    if gone:
        shutil.rmtree(workplace / "workplace")
    export_release(trained, workplace / "exported", repo_id="org/model")
    report = json.loads((workplace / "exported" / "privacy.json").read_text())
    assert report["protected_dataset"]["name"] is None
    assert report["public_data"] == [{"name": "a local folder", "role": "pretraining"}]
    block = yaml.safe_load((workplace / "exported" / "README.md").read_text().split("---\n", 2)[1])
    assert "datasets" not in block
    for path in (workplace / "exported").rglob("*"):
        if path.is_file():
            assert b"oncology" not in path.read_bytes() and b"coloured" not in path.read_bytes(), path.name


def test_a_run_knows_its_folders_in_another_directory(
    trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `evaluate` asks: where the training images are, and whether a reference is of them."""
    monkeypatch.chdir(workplace / "elsewhere")
    data = CurriculumConfig.from_yaml(RunFolder(trained).config).data
    assert data.dataset_name == str(workplace / "workplace" / PRIVATE)
    assert len(load_images(data)) == 10
    assert share_images(data, DataConfig(dataset_name=f"../workplace/{PRIVATE}"))
    assert share_images(data, DataConfig(dataset_name="hospital/patients-2024"))
    shutil.rmtree(workplace / "workplace")
    assert share_images(data, DataConfig(dataset_name=data.dataset_name)) and is_folder_name(data.dataset_name)
    assert not share_images(data, DataConfig(dataset_name="hospital/other"))


def test_the_same_relative_name_goes_on_with_the_run_in_its_directory_alone(
    trained: Path, workplace: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(make_config)
    run_curriculum(config, output_dir=trained, resume_from_checkpoint="latest")
    monkeypatch.chdir(workplace / "elsewhere")
    with pytest.raises(ValueError, match=rf"--dataset_name={PRIVATE} to be \S+workplace/{PRIVATE}, as the run"):
        run_curriculum(config, output_dir=trained, resume_from_checkpoint="latest")
    (workplace / "elsewhere" / PRIVATE).mkdir(parents=True)  # another folder of this name
    with pytest.raises(ValueError, match=rf"--dataset_name=\S+elsewhere/{PRIVATE} to be \S+workplace/{PRIVATE}"):
        run_curriculum(config, output_dir=trained, resume_from_checkpoint="latest")


def test_pushing_from_another_directory_names_no_folder(
    trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace / "elsewhere")
    assert main(["push", str(trained), "--export_dir", str(workplace / "exported")]) == 0
    assert "oncology" not in (workplace / "exported" / "README.md").read_text()


def test_places_are_settled_and_names_stay(workplace: Path, make_config: Any) -> None:
    settled = settle_places(small(make_config))
    assert settled.data.dataset_name == str(workplace / "workplace" / PRIVATE)
    assert settled.public_images.pretrain_dataset_name == str(workplace / "workplace" / PUBLIC)
    assert settle_places(settled) == settled
    (workplace / "workplace" / "mnist").write_text("a file is no dataset")
    named = small(make_config, dataset_name="mnist", pretrain_dataset_name="org/shapes")
    assert settle_places(named) == named
    (workplace / "workplace" / "digits").mkdir()  # the embedded dataset has this name first
    assert settle_places(CurriculumConfig()).data.dataset_name == "digits"
    folder = make_config(train_data_dir=PRIVATE)
    assert settle_places(folder).data.train_data_dir == str(workplace / "workplace" / PRIVATE)


def test_a_dataset_in_memory_has_the_name_that_its_owner_gives(make_config: Any, workplace: Path) -> None:
    """It is the owner's word that it is from there; the name of a folder that is there is none for a card."""
    rows = digits_dataset().select(range(20))
    for name, on_card in (("org/scans", "org/scans"), (PRIVATE, None), ("digits", None)):
        config = small(make_config, stages=["mean"], pretrain_dataset_name=None, dataset_name=name)
        report = run_curriculum(config, rows, output_dir=workplace / name.replace("/", "-")).report.fields
        assert report["protected_dataset"]["name"] == on_card


# --- two names of one dataset ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("private", "public"),
    [
        ("mnist", "ylecun/mnist"),
        ("ylecun/mnist", "mnist"),
        ("org/faces", "ORG/Faces"),
        ("fashion_mnist", "zalando-datasets/fashion-mnist"),
        ("org/faces", "copy/faces"),
        ("org/faces", "hf://datasets/org/faces"),
    ],
)
def test_names_with_the_same_last_part_are_one_dataset(private: str, public: str, make_config: Any) -> None:
    config = small(make_config, dataset_name=private, pretrain_dataset_name=public)
    with pytest.raises(ValueError, match=f"--pretrain_dataset_name={public} .* other images than the private"):
        check_not_private(config)
    check_not_private(config.replace(pretrain_dataset_split="test"))
    check_not_private(config.replace(pretrain_dataset_name="org/letters"))


def test_a_renamed_dataset_is_known_by_the_id_that_the_hub_resolves(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub answers to an old name with the new one; it is asked before anything is opened."""
    monkeypatch.setattr("dp_curriculum.training.validation.canonical_dataset_id", lambda name: f"new/{name[-5:]}")
    config = small(make_config, dataset_name="old/first", pretrain_dataset_name="old/worst")
    check_not_private(config)
    with pytest.raises(ValueError, match="other images than the private ones"):
        run_curriculum(config.replace(pretrain_dataset_name="older/first-first"), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_hub_is_asked_for_names_on_it_and_for_no_folder(make_config: Any, workplace: Path) -> None:
    asked: list[str] = []

    def resolve(name: str) -> str:
        asked.append(name)
        return name

    config = settle_places(small(make_config))
    check_not_private(config, resolve)
    shutil.rmtree(workplace / "workplace" / PRIVATE)
    check_not_private(config.replace(pretrain_dataset_name="org/shapes"), resolve)
    check_not_private(config.replace(dataset_name="digits", pretrain_dataset_name="org/shapes"), resolve)
    check_not_private(config.replace(train_data_dir=PRIVATE, pretrain_dataset_name="org/shapes"), resolve)
    assert asked == ["org/shapes"] * 3


def test_the_name_of_a_dataset_in_memory_is_not_sent_to_the_hub(
    make_config: Any, public_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(name: str) -> str:
        raise AssertionError(f"the Hub is asked for {name}")

    monkeypatch.setattr("dp_curriculum.training.validation.canonical_dataset_id", ask)
    config = small(make_config, dataset_name="hospital/scans", pretrain_dataset_name=str(public_folder))
    run_curriculum(config, digits_dataset().select(range(20)), output_dir=public_folder.parent / "out")


@pytest.fixture
def public_folder(tmp_path: Path) -> Path:
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8), 60)] * 4}, features=features)
    (tmp_path / "public").mkdir()
    rows.to_parquet(tmp_path / "public" / "train.parquet")
    return tmp_path / "public"


def test_the_hub_tells_the_id_that_a_dataset_has_now(hub: Any) -> None:
    hub.put("new-org/faces", {"README.md": b"faces"}, kind="dataset")
    hub.rename("old-org/faces", "new-org/faces", kind="dataset")
    assert canonical_dataset_id("old-org/faces") == "new-org/faces"
    assert canonical_dataset_id("new-org/faces") == "new-org/faces"
    assert canonical_dataset_id("no-org/faces") == "no-org/faces"
    hub.fail("GET /api/datasets", 503, times=9)
    assert canonical_dataset_id("old-org/faces") == "old-org/faces"
    hub.fail("GET /api/datasets", "drop", times=9)
    assert canonical_dataset_id("old-org/faces") == "old-org/faces"


def test_without_a_network_the_name_is_what_it_is() -> None:
    assert canonical_dataset_id("old-org/faces") == "old-org/faces"
    assert hub_client.canonical_dataset_id("not a name") == "not a name"
