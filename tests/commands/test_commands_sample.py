"""`dp-curriculum sample` and its folder: the images of one call, and of no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from ranks import results_of

from dp_curriculum import cli
from dp_curriculum.commands import sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "samples"


def run(model: Path, folder: Path, count: int, *flags: str) -> int:
    return cli.main(["sample", str(model), "--num_images", str(count), "--output_dir", str(folder), *flags])


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_images_of_an_earlier_call_is_refused_and_left_alone(
    finished_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(finished_run, folder, 8) == 0
    before = contents(folder)
    assert len(before) == 9
    capsys.readouterr()
    assert run(finished_run, folder, 3) == cli.USAGE_ERROR
    told = capsys.readouterr()
    assert (
        f"--output_dir={folder}: it holds images of an earlier call. Add --overwrite_output_dir"
        in told.err.splitlines()[-1]
    )
    assert "3 images" not in told.out and contents(folder) == before


def test_images_of_an_earlier_call_are_replaced_where_that_is_asked(
    finished_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(finished_run, folder, 8)
    assert run(finished_run, folder, 3, "--overwrite_output_dir", "--class_label", "4") == 0
    assert pictures(folder) == [*(f"00000{index}-class4.png" for index in range(3)), "sheet.png"]
    assert f"3 images in {folder}" in capsys.readouterr().out


def test_nothing_is_removed_but_what_a_sample_writes(finished_run: Path, folder: Path) -> None:
    run(finished_run, folder, 4)
    mine = ["notes.txt", "000001.png", "000001-class1.png.bak", "old-000001-class1.png", "00001-class1.png", "x/y.png"]
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"mine")
    assert run(finished_run, folder, 2, "--overwrite_output_dir") == 0
    kept = contents(folder)
    assert all(kept[name] == b"mine" for name in mine)
    assert len(kept) == len(mine) + 3


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize("name", ["notes.txt", "cat.png", "sheet.png", "000000.png"])
def test_a_folder_of_other_files_is_refused_whatever_is_asked(
    name: str, flags: list[str], finished_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    (folder / name).write_bytes(b"mine")
    before = contents(folder)
    assert run(finished_run, folder, 2, *flags) == cli.USAGE_ERROR
    assert "holds other files. Name another folder" in capsys.readouterr().err and contents(folder) == before


@pytest.mark.parametrize(
    "flags",
    [["--class_label", "seven"], ["--num_inference_steps", "0"], ["--num_images", "0"], ["--batch_size", "0"]],
    ids=str,
)
def test_what_is_refused_removes_nothing(flags: list[str], finished_run: Path, folder: Path) -> None:
    run(finished_run, folder, 2)
    before = contents(folder)
    assert run(finished_run, folder, 3, "--overwrite_output_dir", *flags) == cli.USAGE_ERROR
    assert contents(folder) == before


def test_a_file_is_no_folder_and_an_empty_folder_is_taken(
    finished_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write_text("mine")
    assert run(finished_run, folder, 2) == cli.USAGE_ERROR
    assert "to be a folder" in capsys.readouterr().err
    folder.unlink()
    folder.mkdir()
    (folder / ".tmp-sheet.png").write_bytes(b"of a call that was killed")
    assert run(finished_run, folder, 2) == 0
    assert pictures(folder) == ["000000-class0.png", "000001-class1.png", "sheet.png"]


def test_the_names_that_are_removed_are_those_that_are_written() -> None:
    for index, label in ((0, 0), (999_999, 9), (1_000_000, 999)):
        assert sample._PICTURE.fullmatch(sample._picture_name(index, label))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_several_processes_refuse_together_and_replace_together(finished_run: Path, folder: Path) -> None:
    def work(rank: int) -> list[int]:
        flags = ((), (), ("--overwrite_output_dir",))
        return [run(finished_run, folder, 5, "--batch_size", "2", *more) for more in flags]

    assert results_of(2, work) == [[0, cli.USAGE_ERROR, 0]] * 2
    assert len(pictures(folder)) == 6
