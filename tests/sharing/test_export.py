"""What is shared of a run: an allow-list of files, nothing that lay about, and nothing at all of a run not private."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from dp_curriculum import pipeline_dp_curriculum
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.hash_chain import HashChain
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.sharing import export
from dp_curriculum.sharing.export import MODEL_FILES, WEIGHTS, ExportRefused, export_release
from dp_curriculum.sharing.scan import UnsafeFile


SECRET = "hf_" + "Q7" * 17


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run-of-patients"))


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    export_release(run, tmp_path / "exported", repo_id="org/faces", license="mit")
    return tmp_path / "exported"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def litter(run: Path) -> None:
    """What may lie about in the folder of a run."""
    (run / "secret.txt").write_text(SECRET)
    (run / ".env").write_text(f"HF_TOKEN={SECRET}")
    Image.new("L", (8, 8), 77).save(run / "thumbnail_private.png")
    Image.new("L", (8, 8), 77).save(run / "unet" / "thumbnail_private.png")
    (run / "unet" / "optimizer.safetensors").write_bytes(b"state")
    (run / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (run / "random_states_0.pkl").write_bytes(b"\x80\x02}q\x00.")
    (run / "logs").mkdir()
    (run / "logs" / "events.out").write_bytes(b"loss")


# --- what is in it -------------------------------------------------------------------------------------------------


def test_the_files_are_those_of_the_allow_list_whatever_lies_about(run: Path, tmp_path: Path) -> None:
    litter(run)
    assert (run / "run" / "checkpoints").is_dir() and (run / "lesson_mean.png").is_file()
    export_release(run, tmp_path / "exported")
    assert files(tmp_path / "exported") == set(MODEL_FILES)
    for path in (tmp_path / "exported").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_what_is_exported_is_the_pipeline_with_its_report_and_card(run: Path, exported: Path) -> None:
    ours, theirs = DPCurriculumPipeline.from_pretrained(run), DPCurriculumPipeline.from_pretrained(exported)
    report = json.loads((exported / "privacy.json").read_text())
    assert report == theirs.privacy == ours.privacy and report["private"]
    block = yaml.safe_load((exported / "README.md").read_text().split("---\n", 2)[1])
    assert block["differential_privacy"] == report and block["license"] == "mit"
    images = [
        pipe(class_labels=[3, 7], generator=torch.Generator().manual_seed(1), output_type="pt").images
        for pipe in (ours, theirs)
    ]
    assert torch.equal(*images)
    source = Path(str(pipeline_dp_curriculum.__file__))
    assert (exported / "pipeline.py").read_bytes() == source.read_bytes()
    assert Image.open(exported / "samples.png").tobytes() == Image.open(run / "samples.png").tobytes()


def test_the_card_names_the_repository_and_nothing_is_kept_of_an_older_card(run: Path, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert text.count('"org/faces"') >= 4 and "dp-curriculum verify org/faces" in text and "your-name" not in text
    (run / "README.md").write_text("an older card")
    export_release(run, exported.parent / "again", repo_id="org/faces", license="mit")
    assert (exported.parent / "again" / "README.md").read_text() == text


def test_two_exports_are_equal_to_the_byte(run: Path, exported: Path, tmp_path: Path) -> None:
    export_release(run, tmp_path / "again", repo_id="org/faces", license="mit")
    for name in MODEL_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes(), name


def test_places_where_a_model_was_loaded_from_are_taken_out(run: Path, tmp_path: Path) -> None:
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        edit_json(run / name, lambda values: values.update(_name_or_path=str(run)))
    export_release(run, tmp_path / "exported")
    for name in MODEL_FILES:
        content = (tmp_path / "exported" / name).read_bytes()
        assert b'"_name_or_path"' not in content and b"run-of-patients" not in content, name


def test_another_place_in_a_file_is_refused(run: Path, tmp_path: Path) -> None:
    edit_json(run / "unet" / "config.json", lambda values: values.update(trained_in=str(run)))
    with pytest.raises(UnsafeFile, match="unet/config.json: it contains a local path"):
        export_release(run, tmp_path / "exported")


def test_the_token_of_this_machine_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "get_token", lambda: "unusual-token")
    edit_json(run / "model_index.json", lambda values: values["id2label"].update({"0": "unusual-token"}))
    with pytest.raises(UnsafeFile, match="it contains a Hub token"):
        export_release(run, tmp_path / "exported")


def test_text_in_the_sample_sheet_is_left_behind(run: Path, tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "patient 7")
    with Image.open(run / "samples.png") as sheet:
        sheet.save(run / "samples.png", pnginfo=text)
    export_release(run, tmp_path / "exported")
    assert b"patient 7" not in (tmp_path / "exported" / "samples.png").read_bytes()


def rerecord(run: Path, *names: str) -> None:
    """Makes the ledger fit what was changed, so that a test meets the check behind that of the hashes."""
    with PrivacyLedger.open(run / "run" / "privacy_ledger.jsonl") as ledger:
        for name in names:
            ledger.record(name, hash_file(run / name))


def reweigh(run: Path, tensors: dict[str, torch.Tensor], *, rehash: bool = True) -> None:
    """Other weights, with a report and a ledger that know them."""
    save_file(tensors, run / WEIGHTS, metadata={"format": "pt"})
    if rehash:
        edit_json(run / "privacy.json", lambda values: values.update(weights=export.hash_weights(run)))
        rerecord(run, WEIGHTS, "privacy.json")


def test_a_tensor_that_is_no_weight_is_refused(run: Path, tmp_path: Path) -> None:
    reweigh(run, {**load_file(run / WEIGHTS), "thumbnails": torch.zeros(4, 8, 8)})
    with pytest.raises(ExportRefused, match="and no other tensor"):
        export_release(run, tmp_path / "exported")


def test_weights_that_are_no_numbers_are_refused(run: Path, tmp_path: Path) -> None:
    tensors = load_file(run / WEIGHTS)
    tensors["conv_in.weight"][0] = torch.nan
    reweigh(run, tensors)
    with pytest.raises(ExportRefused, match="conv_in.weight is not"):
        export_release(run, tmp_path / "exported")


# --- measured numbers ----------------------------------------------------------------------------------------------


def metrics_on_card(
    run: Path, target: Path, *, dataset: str | None, metrics: list[dict[str, Any]], **options: Any
) -> Any:
    def name_dataset(values: Any) -> None:
        values["protected_dataset"]["name"] = dataset

    edit_json(run / "privacy.json", name_dataset)
    rerecord(run, "privacy.json")
    statement = json.loads((run / "privacy.json").read_text())["statement"]
    folder = run / "run" / "evaluation"
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"epsilon": statement, "metrics": metrics, **options}))
    export_release(run, target, repo_id="org/faces")
    return yaml.safe_load((target / "README.md").read_text().split("---\n", 2)[1]).get("model-index")


MEASURED = {
    "name": "accuracy_cnn",
    "value": 0.75,
    "data": "tested on 300 of faces (test)",
    "privacy": "reads no training image",
}


def test_numbers_of_the_dataset_that_the_report_names_are_on_the_card(run: Path, tmp_path: Path) -> None:
    leaky = {**MEASURED, "name": "membership_auc", "privacy": "reads training images: not covered by epsilon"}
    elsewhere = {**MEASURED, "name": "fid", "data": "against 300 of other (test)"}
    (index,) = metrics_on_card(run, tmp_path / "a", dataset="org/faces", metrics=[MEASURED, leaky, elsewhere])
    (result,) = index["results"]
    assert result["dataset"] == {"name": "org/faces", "type": "org/faces"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy_cnn", 0.75)]
    assert "| accuracy_cnn | 0.75 | tested on 300 of faces (test) |" in (tmp_path / "a" / "README.md").read_text()


def test_numbers_of_an_unnamed_dataset_or_of_another_model_are_not(run: Path, tmp_path: Path) -> None:
    assert metrics_on_card(run, tmp_path / "a", dataset=None, metrics=[MEASURED]) is None
    assert metrics_on_card(run, tmp_path / "b", dataset="org/faces", metrics=[MEASURED], epsilon="older") is None


def test_numbers_of_images_that_a_classifier_chose_are_not(run: Path, tmp_path: Path) -> None:
    """Whoever samples from the model gets other images. Numbers of an earlier version, which had no filter, are."""
    for place, options, on_card in (
        ("a", {}, True),
        ("b", {"filter_by_classifier": False}, True),
        ("c", {"filter_by_classifier": True}, False),
    ):
        found = metrics_on_card(run, tmp_path / place, dataset="org/faces", metrics=[MEASURED], **options)
        assert (found is not None) is on_card


# --- what is refused -----------------------------------------------------------------------------------------------


def spend_more(run: Path) -> None:
    with PrivacyLedger.open(run / "run" / "privacy_ledger.jsonl") as ledger:
        ledger.reserve(GaussianEvent(1.0), stage="central-images-mean", clip_norm=1.0)


def fix_noise(run: Path) -> None:
    with PrivacyLedger.open(run / "run" / "privacy_ledger.jsonl") as ledger:
        ledger.mark_not_private("masks and noise do not come from secret randomness")


def take_noise_away(run: Path) -> None:
    with PrivacyLedger.open(run / "run" / "privacy_ledger.jsonl") as ledger:
        ledger.reserve(GaussianEvent(0.0, 0.5), stage="dp-sgd", clip_norm=1.0)


def edit_report(*path: Any, value: Any, record: bool = True) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        def change(place: Any) -> None:
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value

        edit_json(run / "privacy.json", change)
        if record:
            rerecord(run, "privacy.json")

    return edit


def lower_target(run: Path) -> None:
    config = yaml.safe_load((run / "run" / "config.yaml").read_text())
    config["privacy"]["target_epsilon"] = 1.0
    (run / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    edit_report("target_epsilon", value=1.0)(run)


def swap_weights(run: Path) -> None:
    tensors = load_file(run / WEIGHTS)
    tensors["conv_in.weight"] += 1
    reweigh(run, tensors, rehash=False)


def execute_weakly(**fields: Any) -> Callable[[Path], None]:
    """One more step, of which the ledger says this, or nothing."""

    def spend(run: Path) -> None:
        with PrivacyLedger.open(run / "run" / "privacy_ledger.jsonl") as ledger:
            execution = dataclasses.replace(ledger.execution, **fields) if fields else None
            ledger.reserve(GaussianEvent(8.0), stage="dp-sgd", clip_norm=1.0, execution=execution)

    return spend


def cut_ledger(run: Path) -> None:
    path = run / "run" / "privacy_ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


NOT_PRIVATE = {
    "fixed noise": (fix_noise, "masks and noise do not come from secret randomness"),
    "sigma 0": (take_noise_away, "stage 'dp-sgd' adds no noise"),
    "ledger missing": (lambda run: (run / "run" / "privacy_ledger.jsonl").unlink(), "its ledger is missing"),
    "ledger cut": (cut_ledger, "its ledger was changed"),
    "over target": (lower_target, "epsilon within its target does not hold"),
    "more was spent": (spend_more, "its report lists other mechanisms than its ledger"),
    "epsilon lowered": (edit_report("epsilon", value=0.5), "epsilon (add-or-remove-one) does not hold"),
    "delta edited": (edit_report("delta", value=1e-6), "its report has another delta than its configuration"),
    "self-check denied": (
        edit_report("implementation", "verified_per_image_gradients", value=False),
        "another randomness, device, precision or check of gradients than its ledger",
    ),
    "no secret noise": (
        edit_report("randomness", "secret", value=False),
        "another randomness, device, precision or check of gradients than its ledger",
    ),
    "other noise": (
        edit_report("randomness", "generator", value="chacha21"),
        "another randomness, device, precision or check of gradients than its ledger",
    ),
    "self-check failed": (execute_weakly(gradients="unchecked"), "its per-image gradients were not checked"),
    "noise that is no secret": (
        execute_weakly(randomness={"generator": "chacha20", "secret": False}),
        "masks and noise do not come from secret randomness",
    ),
    "unknown noise": (execute_weakly(), "masks and noise do not come from secret randomness"),
    "weights swapped": (swap_weights, "its weights are not those of its report"),
    "report takes its claim back": (edit_report("private", value=False), "its report claims nothing"),
}


@pytest.mark.parametrize(("spoil", "reason"), NOT_PRIVATE.values(), ids=NOT_PRIVATE)
def test_a_run_that_is_not_private_is_refused_or_stamped(
    spoil: Callable[[Path], None], reason: str, run: Path, tmp_path: Path
) -> None:
    spoil(run)
    with pytest.raises(
        ExportRefused, match="Pass --allow_non_private to share it anyway, stamped NOT PRIVATE"
    ) as caught:
        export_release(run, tmp_path / "exported")
    assert reason in str(caught.value) and not (tmp_path / "exported").exists()
    stamped = export_release(run, tmp_path / "exported", repo_id="org/faces", allow_non_private=True)
    text = (tmp_path / "exported" / "README.md").read_text()
    assert "# org/faces (NOT PRIVATE)" in text and "NOT PRIVATE: " in text and reason in stamped.statement()
    assert "differentially private with respect" not in text
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert index["privacy"] == stamped.to_dict() == json.loads((tmp_path / "exported" / "privacy.json").read_text())
    assert index["privacy"]["epsilon"] is None


FOREIGN = "it holds a lesson or a checkpoint that is not of its ledger"
TAKEN = {
    "report": (["privacy.json"], "its report is not the one that was recorded in its ledger"),
    "weights": ([WEIGHTS], "its weights are not those of its report"),
    "weights and report": ([WEIGHTS, "privacy.json"], "its weights are not those that were recorded in its ledger"),
    "what a lesson released": (["run/lessons/01-mean/released.safetensors"], FOREIGN),
    "what a lesson taught": (["run/lessons/01-mean/unet/diffusion_pytorch_model.safetensors"], FOREIGN),
    "a checkpoint": (["run/checkpoints"], FOREIGN),
    "all but the ledger": (["privacy.json", WEIGHTS, "run/lessons", "run/checkpoints"], FOREIGN),
}


@pytest.mark.parametrize(("names", "reason"), TAKEN.values(), ids=TAKEN)
def test_what_is_of_another_run_with_the_same_configuration_is_refused(
    names: list[str], reason: str, run: Path, other_run: Path, tmp_path: Path
) -> None:
    for name in names:
        if (other_run / name).is_dir():
            shutil.rmtree(run / name)
            shutil.copytree(other_run / name, run / name)
        else:
            shutil.copyfile(other_run / name, run / name)
    with pytest.raises(ExportRefused) as caught:
        export_release(run, tmp_path / "exported")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["unprotected_quantities", "not_covered", "public_data"])
def test_a_list_of_the_report_that_nothing_is_computed_from_is_bound_by_its_hash(
    change: str, run: Path, tmp_path: Path
) -> None:
    edit_json(run / "privacy.json", lambda values: values.update({change: []}))
    with pytest.raises(ExportRefused, match="its report is not the one that was recorded in its ledger"):
        export_release(run, tmp_path / "exported")


def as_before_hashes(run: Path) -> None:
    """The ledger and report of an earlier version: no hashes, and no word on how steps were executed."""
    path = run / "run" / "privacy_ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.with_name(path.name + ".head").unlink()
    chain = HashChain(path.with_name("old.jsonl"))
    chain.load(create=True)
    for line in lines:
        if line["type"] != "hash":
            body = {name: value for name, value in line.items() if name not in ("seq", "previous", "sha256")}
            body.pop("execution", None)
            chain.append({**body, **({"schema_version": "1.0"} if line["type"] == "header" else {})})
    chain.close()
    for suffix in ("", ".head"):
        path.with_name(f"old.jsonl{suffix}").rename(path.with_name(path.name + suffix))

    def forget(values: Any) -> None:
        for name in ("device", "precision"):
            del values["implementation"][name]

    edit_json(run / "privacy.json", forget)


def test_a_finished_run_of_an_earlier_version_is_exported_by_the_word_of_its_report(run: Path, tmp_path: Path) -> None:
    as_before_hashes(run)
    report = export_release(run, tmp_path / "exported")
    assert report.fields["private"] and "device" not in report.fields["implementation"]
    edit_report("randomness", "secret", value=False, record=False)(run)
    with pytest.raises(ExportRefused, match="masks and noise do not come from secret randomness"):
        export_release(run, tmp_path / "again")


def test_a_run_without_noise_is_refused(make_config: Any, tmp_path: Path) -> None:
    from dp_curriculum.data import digits_dataset
    from dp_curriculum.training.curriculum import run_curriculum

    config = make_config(non_private=True, num_inference_steps=1, sample_steps=0)
    run_curriculum(config, digits_dataset().select(range(61)), output_dir=tmp_path / "run")
    with pytest.raises(ExportRefused, match="trained without noise, on request"):
        export_release(tmp_path / "run", tmp_path / "exported")
    stamped = export_release(tmp_path / "run", tmp_path / "exported", allow_non_private=True)
    assert "trained without noise, on request" in stamped.statement()


@pytest.mark.parametrize("name", ["run/config.yaml", "model_index.json", WEIGHTS, "samples.png", "privacy.json"])
def test_what_is_no_run_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    (run / name).unlink()
    with pytest.raises(ValueError, match=Path(name).name):
        export_release(run, tmp_path / "exported")


def test_a_folder_that_holds_something_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="to be a new or empty folder"):
        export_release(run, tmp_path / "exported")
    assert files(tmp_path / "exported") == {"mine.txt"}
