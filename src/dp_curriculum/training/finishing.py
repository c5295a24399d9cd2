"""The end of a run: pipeline, report, card and sample sheet are written into its folder."""

from __future__ import annotations

import hashlib
import shutil

from dp_curriculum import pipeline_dp_curriculum
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.diffusion.sheets import save_note
from dp_curriculum.diffusion.trainable import describe_weights
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.ledger import PrivacyLedger, PrivacyReport
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.checkpointing import appearing_in
from dp_curriculum.sharing.release import hash_weights, privacy_report, release_card, report_text
from dp_curriculum.sharing.starting_words import autoencoder_of, start_of
from dp_curriculum.training.run import Run


# The card shows the sheet, and a release without one is refused.
_NO_SHEET = "No samples were drawn:\nthe run was stopped."


def save_release(run: Run) -> PrivacyReport:
    """
    Writes pipeline, `pipeline.py`, `privacy.json`, card and sample sheet into the run's folder. On the main process.

    The ledger gets the hashes of weights and report. A crash before is no loss: a resumed run writes it all again. A
    stop request leaves the sheet out, which takes the longest; a picture that says so is in its place.
    """
    with appearing_in(run.folder.root) as root:
        report = write_release(run, RunFolder(root))
        if not run.save_samples(run.unet, RunFolder(root).sample_sheet):
            save_note(_NO_SHEET, RunFolder(root).sample_sheet)
    return report


def write_release(run: Run, folder: RunFolder) -> PrivacyReport:
    """Writes what [`save_release`] does, the sample sheet excepted, into `folder`: from weights, ledger, constants."""
    assert run.ledger is not None, "the main process holds the ledger"
    pipeline = run.pipeline(run.unet.eval())
    pipeline.save_pretrained(folder.root)
    weights = hash_weights(folder.root)
    for name, digest in weights.items():
        run.ledger.record(name, digest)
    report = privacy_report(
        run.config,
        run.ledger,
        dataset_size=run.plan.dataset_size,
        num_classes=run.private.num_classes,
        weights=weights,
        start=None if run.start is None else run.start.facts,
        autoencoder=run.autoencoder,
    )
    shutil.copyfile(pipeline_dp_curriculum.__file__, folder.root / "pipeline.py")
    _write_words(folder, run.config, pipeline, report, run.ledger, class_names=run.private.class_names)
    return report


def retell_release(folder: RunFolder, config: CurriculumConfig, ledger: PrivacyLedger) -> PrivacyReport:
    """
    Writes report and card of a finished run anew, from its ledger, which says more than when it ended.

    Args:
        folder ([`RunFolder`]): The run; its weights stay what they are.
        config ([`CurriculumConfig`]): Its configuration.
        ledger ([`PrivacyLedger`]): Its ledger, open.
    """
    before = PrivacyReport.from_file(folder.privacy).fields
    pipeline = DPCurriculumPipeline.from_pretrained(folder.root)
    report = privacy_report(
        config,
        ledger,
        dataset_size=before["protected_dataset"]["num_records"],
        num_classes=before["data_domain"]["num_classes"],
        weights=hash_weights(folder.root),
        start=start_of(before["public_data"]),
        autoencoder=autoencoder_of(before["public_data"]),
    )
    class_names = tuple(sorted(pipeline.labels, key=pipeline.labels.__getitem__))
    _write_words(folder, config, pipeline, report, ledger, class_names=class_names)
    return report


def _write_words(
    folder: RunFolder,
    config: CurriculumConfig,
    pipeline: DPCurriculumPipeline,
    report: PrivacyReport,
    ledger: PrivacyLedger,
    *,
    class_names: tuple[str, ...],
) -> None:
    """Writes a report into the pipeline's configuration, `privacy.json` and the card; its hash into the ledger."""
    pipeline.register_to_config(privacy=report.to_dict())
    pipeline.save_config(folder.root)
    text = report_text(report)
    ledger.record(folder.name(folder.privacy), hashlib.sha256(text.encode()).hexdigest())
    folder.privacy.write_text(text, encoding="utf-8")
    card = release_card(
        config,
        report,
        class_names=class_names,
        num_parameters=sum(parameter.numel() for parameter in pipeline.unet.parameters()),
        num_photos=0 if pipeline.prior is None else pipeline.prior.config.num_photos,
        trained=describe_weights(pipeline.unet, config.dp_sgd),
        repo_id=config.runtime.hub_model_id,
    )
    folder.card.write_text(card, encoding="utf-8")
