"""`dp-curriculum synthesize`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_curriculum.commands.arguments import (
    CommandParser,
    add_dataset_ledger_argument,
    add_filter_argument,
    add_sampling_arguments,
    model_folder,
)
from dp_curriculum.commands.sample import load_pipeline, settle_threads
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.privacy_report import PrivacyReport
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.checkpointing import save_text
from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.runtime.processes import from_main, process_state
from dp_curriculum.sharing.dataset_card import render_dataset_card
from dp_curriculum.sharing.dataset_notes import note_release
from dp_curriculum.sharing.export import ExportRefused, local_names
from dp_curriculum.sharing.hub import HubError, check_token, commit_folder, make_repository
from dp_curriculum.sharing.published import CARD, RUN, check_folder, check_repository
from dp_curriculum.sharing.report_words import is_hub_id
from dp_curriculum.sharing.scan import scan_files
from dp_curriculum.sharing.synthetic_dataset import Synthesis, SynthesisOptions, synthesize


def main(args: Sequence[str]) -> int:
    """Writes a labelled dataset of generated images, and shares it if asked to. It spends nothing, at any size."""
    given = _parser().parse_args(args)
    options = SynthesisOptions(
        num_images=given.num_images,
        label_prior=None if given.label_prior is None else tuple(given.label_prior),
        num_inference_steps=given.num_inference_steps,
        guidance_scale=given.guidance_scale,
        s_churn=given.s_churn,
        seed=given.seed,
        images_per_shard=given.images_per_shard,
        filter_by_classifier=given.filter_by_classifier,
    )
    state, repo_id = process_state(), given.push_to_hub
    if repo_id is not None:
        repo_id = from_main(state, lambda: check_token(given.push_to_hub))
    pipeline = load_pipeline(given.model, state)
    settle_threads(pipeline, given.cpu_threads, min(given.batch_size, options.num_images))
    # By one process: a ledger can be open once.
    privacy = from_main(state, lambda: _privacy_of(given.model, pipeline, given.allow_non_private or repo_id is None))
    name = Path(given.model).resolve().name if model_folder(given.model) else given.model.rpartition("/")[2]
    folder = Path(given.output_dir or f"synthetic-{name}")
    privacy = from_main(state, lambda: _noted(given, privacy, repo_id or str(folder.resolve())))
    if repo_id is not None:
        from_main(state, lambda: make_repository(repo_id, repo_type="dataset", private=not given.public))
    done = synthesize(pipeline, folder, options, batch_size=given.batch_size)
    if not state.is_main_process:  # it has written its share
        return 0
    files = _write_card(given, folder, pipeline, privacy, options, done, repo_id)
    print(f"{options.num_images} images in {folder}{_rates(done)}")
    if repo_id is not None:
        print(_push(folder, repo_id, files, given))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser("synthesize", main.__doc__)
    parser.add_argument("model", help="Folder of a run, or a Hub id.")
    parser.add_argument("--num_images", type=int, required=True, help="Number of images.")
    parser.add_argument("--output_dir", help="Folder for the dataset. An unfinished dataset in it is continued.")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="Dataset repository to push to, such as org/name.")
    parser.add_argument(
        "--public", action="store_true", help="Make a new repository public. It is private by default."
    )
    parser.add_argument("--license", help="Licence of the images, by its name on the Hub, such as cc0-1.0.")
    parser.add_argument(
        "--allow_non_private", action="store_true", help="Share images of a model without a guarantee, stamped."
    )
    parser.add_argument("--label_prior", nargs="+", type=float, help="PUBLIC weight of each class. Equal by default.")
    add_sampling_arguments(parser)
    add_dataset_ledger_argument(parser)
    parser.add_argument("--images_per_shard", type=int, default=5000, help="Images per file.")
    add_filter_argument(parser)
    return parser


def _privacy_of(model: str, pipeline: DPCurriculumPipeline, allow_non_private: bool) -> dict[str, Any]:
    """
    The report that the dataset will carry; without its claims where they do not hold.

    Raises:
        ValueError: If the model has no report, or its claims do not hold and that is not allowed.
    """
    if pipeline.privacy is None:
        raise ValueError(
            f"Refusing to synthesize from {model}: it has no privacy report, so the dataset would have none."
        )
    fields = json.loads(json.dumps(pipeline.privacy))
    reasons = list(dict.fromkeys([*_failed_claims(model), *fields.get("not_private_reasons", [])]))
    if not reasons:
        return fields
    if not allow_non_private:
        raise ExportRefused(
            f"Refusing to share images of {model}: {'; '.join(reasons)}. Pass --allow_non_private to share them "
            "anyway, stamped NOT PRIVATE."
        )
    return PrivacyReport(float("inf"), float(fields["delta"]), fields).without_guarantee(*reasons).to_dict()


def _noted(given: argparse.Namespace, privacy: dict[str, Any], to: str) -> dict[str, Any]:
    """The report, beside what was spent on the dataset so far, if a ledger of the dataset holds the run."""
    folder = model_folder(given.model)
    if folder is None or not RunFolder(folder).config.is_file():
        return privacy
    config = CurriculumConfig.from_yaml(RunFolder(folder).config, finished=True)
    spending = note_release(RunFolder(folder), config, how="synthesize", to=to, dataset_ledger=given.dataset_ledger)
    return privacy if spending is None or not privacy["private"] else {**privacy, "dataset_spending": spending}


def _failed_claims(model: str) -> list[str]:
    """
    Reasons why a model must not be called private. Files of a run in a downloaded folder only add checks, because the
    pipeline that is loaded is checked in any case. The card of a run is skipped, because sharing writes it anew.
    """
    folder = model_folder(model)
    if folder is None:
        return [f"{check.name} does not hold" for check in check_repository(model) if check.fails]
    is_run = RunFolder(folder).holds_run
    checks = [check for check in check_folder(folder, local_run=is_run) if check.fails]
    if is_run:
        checks = [check for check in checks if check.name != CARD]
    return [check.computed if check.name == RUN else f"{check.name} does not hold" for check in checks]


def _write_card(
    given: argparse.Namespace,
    folder: Path,
    pipeline: DPCurriculumPipeline,
    privacy: Mapping[str, Any],
    options: SynthesisOptions,
    done: Synthesis,
    repo_id: str | None,
) -> list[str]:
    """Writes card and report beside the images; returns the files that make the dataset."""
    saved = pipeline.config.sampling or {}
    making = {
        name.replace("_", " "): str(value if (value := getattr(options, name)) is not None else saved.get(name))
        for name in ("num_inference_steps", "guidance_scale", "s_churn")
    }
    if options.filter_by_classifier:
        making["filter"] = "by a classifier that was trained on other generated images"
    prior = "all classes alike" if options.label_prior is None else " ".join(f"{w:g}" for w in options.label_prior)
    height, width = pipeline.image_size
    text = render_dataset_card(
        privacy,
        repo_id=repo_id or _placeholder(folder.name),
        num_images=options.num_images,
        image_size=f"{height}x{width} pixels, {'grey' if pipeline.num_channels == 1 else 'RGB'}",
        class_names=tuple(sorted(pipeline.labels, key=pipeline.labels.__getitem__)),
        making={"classes, weights": prior, **making},
        model_id=None if model_folder(given.model) else given.model,
        license=given.license,
        files={name: hash_file(folder / name) for name in done.names},
    )
    save_text(folder / "README.md", text)
    save_text(folder / "privacy.json", json.dumps(privacy, indent=2) + "\n")
    return ["README.md", "privacy.json", *done.names]


def _placeholder(name: str) -> str:
    """A repository for the examples of a card that has none, of a name that the Hub would take."""
    repo_id = f"your-name/{name}"
    return repo_id if is_hub_id(repo_id) else "your-name/your-dataset"


def _rates(done: Synthesis) -> str:
    if done.images_per_second is None or done.network_images_per_second is None:
        return ", all there already"
    ours, alone = done.images_per_second, done.network_images_per_second
    return f"; {ours:.1f} images/s, beside {alone:.1f} images/s of UNet2DModel alone ({100 * ours / alone:.0f} %)"


def _push(folder: Path, repo_id: str, files: list[str], given: argparse.Namespace) -> str:
    """Sends card, report and images as one commit; a failure leaves the dataset where it is."""
    places = [folder.resolve(), Path.home(), Path.cwd(), Path(tempfile.gettempdir())]
    scan_files(folder, files, local_names=local_names(places))
    try:
        return commit_folder(folder, repo_id, files, repo_type="dataset").url
    except (HubError, ValueError) as error:
        raise HubError(f"{error} Run the same command again: the images in {folder} are kept.") from None
