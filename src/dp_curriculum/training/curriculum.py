"""The curriculum: stages from easy to hard, in order, on one ledger."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.holdout import KEY_BYTES
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.places import settle_places
from dp_curriculum.diffusion.autoencoder import LatentSpace
from dp_curriculum.diffusion.precision import has_bf16, launched_precision
from dp_curriculum.diffusion.trainable import num_trained
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.accounting import PrivacyBudgetExceeded
from dp_curriculum.privacy.ledger import PrivacyReport
from dp_curriculum.privacy.mechanism import PlannedMechanism
from dp_curriculum.privacy.randomness import draw_key
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.allocator import keep_freed_memory
from dp_curriculum.runtime.checkpointing import appearing
from dp_curriculum.runtime.processes import (
    all_alive,
    check_agreement,
    check_connected,
    check_launch,
    describe_processes,
    from_main,
    get_logger,
    ignored_requests,
    jointly,
    missing_processes,
)
from dp_curriculum.runtime.stopping import NOTHING_SPENT, StopRequest, stop_on_signal
from dp_curriculum.runtime.threads import Threads, computing_threads
from dp_curriculum.runtime.trackers import TRACKER_PROJECT, check_tracker
from dp_curriculum.training.dataset_account import DatasetAccount, reserve_or_end
from dp_curriculum.training.encoding import Encoder, encode_images, settle_autoencoder
from dp_curriculum.training.finishing import save_release
from dp_curriculum.training.outlook import warn_of_noise
from dp_curriculum.training.random_pass import random_pass
from dp_curriculum.training.rehearsal import rehearse_release
from dp_curriculum.training.resuming import open_ledger, plan_to_go_on_with
from dp_curriculum.training.run import (
    Run,
    blank_prior,
    broadcast_weights,
    initial_unet,
    make_accelerator,
    public_generator,
    secret_generator,
)
from dp_curriculum.training.stages import run_stages
from dp_curriculum.training.starting import Start, settle_start
from dp_curriculum.training.validation import (
    Rows,
    check_folder,
    check_gradients,
    data_sha256,
    flat_options,
    validate_data,
)


logger = get_logger(__name__)


@dataclass(frozen=True)
class CurriculumResult:
    """
    Result of a run. As the last line of a notebook's cell it shows its samples and its privacy statement.

    Args:
        pipeline ([`DPCurriculumPipeline`]): The generator, as saved.
        ledger (`Path`): The ledger's file.
        report ([`PrivacyReport`]): What was spent.
        finished (`bool`): Whether all steps were taken; `False` after Ctrl-C.
    """

    pipeline: DPCurriculumPipeline
    ledger: Path
    report: PrivacyReport
    finished: bool

    @property
    def folder(self) -> Path:
        """The folder of the run, which is also that of the pipeline."""
        return self.ledger.parent.parent

    @property
    def sample_sheet(self) -> Path:
        """Picture of generated images, one row per class."""
        return RunFolder(self.folder).sample_sheet

    def _repr_html_(self) -> str:
        """The sample sheet above the privacy statement, for a notebook."""
        picture = ""
        if self.sample_sheet.exists():  # it is on the machine of the main process
            data = base64.b64encode(self.sample_sheet.read_bytes()).decode("ascii")
            picture = f'<img alt="generated images, one row per class" src="data:image/png;base64,{data}">'
        ending = "" if self.finished else "<p>The run was stopped before its end.</p>"
        return f"<div>{picture}{ending}<p>{html.escape(self.report.statement())}</p></div>"


def run_curriculum(
    config: CurriculumConfig,
    dataset: Rows = None,
    *,
    output_dir: str | Path,
    resume_from_checkpoint: str | Path | None = None,
    overwrite_output_dir: bool = False,
) -> CurriculumResult:
    r"""
    Trains from easy to hard under one privacy budget and saves pipeline, report, card and sample sheet.

    Args:
        config ([`CurriculumConfig`]): Public constants of the run.
        dataset (`datasets.Dataset` or `datasets.DatasetDict`, *optional*): The private images, or splits of which
            `dataset_split` holds them; opened as `config.data` says if unset. Name where they are from in
            `config.data` anyway, because `public` and `evaluate` recognise training images by it.
        output_dir (`str` or `Path`): A new or empty folder.
        resume_from_checkpoint (`str` or `Path`, *optional*): `"latest"` resumes the run that is in `output_dir` from
            its latest checkpoint, and starts one where there is none. A path resumes it from that checkpoint: later
            ones are removed, and what they cost stays charged.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`): Replace the run that is in `output_dir`. What
            it released stays released: its epsilon adds to that of the new run if both are shared.

    Returns:
        [`CurriculumResult`]

    Privacy:
        The weights after each noisy step, their averages, the lessons and everything made from them are released
        together at the epsilon of the report, for one image, or one person, under the configured adjacency.

    Raises:
        ValueError: If the configuration, the dataset, the folder, the checkpoint, the tracker or the launch does not
            fit, what the run will write cannot be written, or the processes differ; nothing is spent.
        ProcessLostError: If another process of the run ended.
        PrivacyBudgetExceeded: If the lessons alone spend the budget, or the budget of the dataset has no room for the
            run; nothing is spent. A run that is resumed writes what it has before.
    """
    check_launch()
    check_tracker(config.runtime.report_to)
    config = config.replace(mixed_precision=launched_precision(config.runtime.mixed_precision))
    folder = RunFolder(Path(output_dir))
    accelerator = make_accelerator(config, folder)
    check_connected(accelerator.num_processes)
    logger.info(f"running on {describe_processes(accelerator)}")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if missing := missing_processes(accelerator.num_processes):
        logger.warning(missing)
    for ignored in ignored_requests(config.runtime.mixed_precision):
        logger.warning(ignored)
    if config.runtime.mixed_precision == "bf16" and not has_bf16(accelerator.device):
        logger.warning(
            f"--mixed_precision=bf16: this {accelerator.device.type} has no instructions for bfloat16, and would be "
            "slower with it; float32 is used."
        )
    with (
        all_alive(accelerator),
        computing_threads(accelerator.device, config.runtime.cpu_threads) as threads,
        stop_on_signal(StopRequest(nothing_spent=True)) as stop,
    ):
        check_agreement(accelerator, {"--output_dir": str(output_dir), **flat_options(config)})
        path = None if resume_from_checkpoint in (None, "latest") else Path(resume_from_checkpoint)
        resume = path is not None
        if resume_from_checkpoint == "latest":  # which also starts a run
            resume = from_main(accelerator, lambda: folder.holds_run)
        config = settle_places(config)  # on each process: the same folder may be elsewhere on another machine
        if config.runtime.dataset_ledger is not None:
            config = config.replace(dataset_ledger=str(Path(config.runtime.dataset_ledger).resolve()))
        config, encoder = _settled_autoencoder(config, accelerator)
        config, start = _settled_start(config, accelerator)
        from_main(accelerator, lambda: check_folder(config, folder, resume=resume, overwrite=overwrite_output_dir))
        return _run(
            config,
            start,
            encoder,
            dataset,
            folder,
            accelerator,
            threads,
            stop,
            overwrite=overwrite_output_dir and not resume,
            checkpoint_path=path,
        )


def _settled_start(config: CurriculumConfig, accelerator: Accelerator) -> tuple[CurriculumConfig, Start | None]:
    """The model to start from, opened by the main process, with what has to be heard about it."""
    config, start = from_main(accelerator, lambda: settle_start(config))
    if start is not None:
        logger.info(start.describe())
        for warning in start.warnings:
            logger.warning(warning)
    return config, start


def _settled_autoencoder(
    config: CurriculumConfig, accelerator: Accelerator
) -> tuple[CurriculumConfig, Encoder | None]:
    """The autoencoder to encode with, opened by the main process, with what has to be heard about it."""
    config, encoder = from_main(accelerator, lambda: settle_autoencoder(config))
    if encoder is not None:
        logger.info(encoder.describe(config))
        for warning in encoder.warnings:
            logger.warning(warning)
    return config, encoder


def _encoded(
    private: PrivateImages, encoder: Encoder | None, config: CurriculumConfig, accelerator: Accelerator
) -> tuple[PrivateImages, LatentSpace | None]:
    """The images, or their latents, with the autoencoder that decodes them."""
    if encoder is None:
        return private, None
    space = encoder.open(config, accelerator)
    return encode_images(private, space, accelerator), space


def _run(
    config: CurriculumConfig,
    start: Start | None,
    encoder: Encoder | None,
    dataset: Rows,
    folder: RunFolder,
    accelerator: Accelerator,
    threads: Threads,
    stop: StopRequest,
    *,
    overwrite: bool,
    checkpoint_path: Path | None,
) -> CurriculumResult:
    given, key = config, from_main(accelerator, lambda: _holdout_key(config, folder, overwrite=overwrite))
    account = jointly(accelerator, lambda: DatasetAccount.open(given) if accelerator.is_main_process else None)
    fingerprint = None if account is None else account.fingerprint
    config, private, plan = jointly(
        accelerator, lambda: validate_data(given, dataset, key, fingerprint, start, encoder)
    )
    begins = overwrite or not folder.ledger.exists()
    from_main(accelerator, lambda: account.check(plan) if account is not None and begins else None)
    if accelerator.num_processes > 1:
        check_agreement(accelerator, {"data": data_sha256(private)})
    private, latents = _encoded(private, encoder, config, accelerator)
    run = Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        private=private,
        plan=plan,
        ledger=None,
        secret=secret_generator(config, accelerator.device),
        generator=public_generator(config, accelerator),
        unet=initial_unet(config, plan.num_classes, accelerator, start, private.class_names),
        prior=blank_prior(config, plan.num_classes),
        threads=threads,
        stop=stop,
        account=account,
        start=start,
        latents=latents,
        autoencoder=None if encoder is None else encoder.facts,
    )
    _try_before_spending(run)
    return _train(run, key, overwrite=overwrite, checkpoint_path=checkpoint_path)


def _try_before_spending(run: Run) -> None:
    """The threads, the gradients of this very network, and what the run will write at its end."""
    config, plan, unet, accelerator = run.config, run.plan, run.unet, run.accelerator
    run.threads.settle(functools.partial(random_pass, unet, config.pretraining.pretrain_batch_size, config))
    logger.info(run.threads.describe())
    for warning in warn_of_noise(config, plan, num_trained(unet, config.dp_sgd)):
        logger.warning(warning)
    if plan.dp_sgd is not None:
        run.gradient_check = jointly(
            accelerator, lambda: check_gradients(unet, config, plan.num_classes, run.schedule)
        )
    began = time.perf_counter()
    from_main(accelerator, lambda: rehearse_release(run))
    run.stop.saving_seconds = time.perf_counter() - began


def _train(run: Run, key: bytes | None, *, overwrite: bool, checkpoint_path: Path | None) -> CurriculumResult:
    """The run on its ledger, new or resumed."""
    config, folder, accelerator = run.config, run.folder, run.accelerator
    run.stop.nothing_spent = False  # from here on, a stop request lets the run end normally
    from_main(accelerator, lambda: folder.prepare(overwrite=overwrite))
    if config.runtime.report_to != "none":
        accelerator.init_trackers(TRACKER_PROJECT)
    run.ledger, run.checkpoint = jointly(
        accelerator, lambda: open_ledger(config, folder, checkpoint_path) if run.is_main else (None, None)
    )
    try:
        # Lessons follow from the configuration on every process; what the ledger says, the main one knows.
        hard = from_main(accelerator, lambda: plan_to_go_on_with(run).dp_sgd)
        run.plan = replace(run.plan, dp_sgd=hard)
        from_main(accelerator, lambda: _save_holdout_key(run, key))
        from_main(accelerator, lambda: _save_config(config, folder))
        _mark_what_is_not_private(run)
        return _carry_out(run)
    finally:
        if run.ledger is not None:
            run.ledger.close()
        if config.runtime.report_to != "none":
            accelerator.end_training()


def _mark_what_is_not_private(run: Run) -> None:
    if run.ledger is None:
        return
    if run.config.privacy.non_private and not run.ledger.not_private_reasons:
        run.ledger.mark_not_private("trained without noise, on request")
    if not run.secret.is_private:
        run.ledger.mark_not_private("masks and noise do not come from secret randomness")


def _carry_out(run: Run) -> CurriculumResult:
    """Reserves, trains, writes the release and settles."""
    account, ledger = run.account, run.ledger
    refused = _reserve(run)
    run_stages(run)
    has_spent = run.ask_ledger(lambda ledger: bool(ledger.mechanisms))
    result = _finish(run) if has_spent or not run.stop.agreed() else None
    if refused is not None:
        raise PrivacyBudgetExceeded(refused, spent_epsilon=math.inf, smallest_target_epsilon=math.inf)
    from_main(run.accelerator, lambda: account.settle(ledger) if account is not None and ledger is not None else None)
    if result is None:
        raise KeyboardInterrupt(NOTHING_SPENT)
    return result


def _reserve(run: Run) -> str | None:
    """
    Reserves in the ledger of the dataset, if there is one. Where that has no room for a run that has begun, the plan
    is cut to what it has, on all processes.

    Returns why, or `None`.
    """

    def reserve() -> tuple[int, PlannedMechanism | None, str | None]:
        assert run.ledger is not None, "the main process holds the ledger"
        plan, refused = reserve_or_end(run.account, run.plan, run.ledger, run.folder)
        return len(plan.groups), plan.dp_sgd, refused

    count, hard, refused = from_main(run.accelerator, reserve)
    run.plan = replace(run.plan, groups=run.plan.groups[:count], dp_sgd=hard)
    return refused


def _save_config(config: CurriculumConfig, folder: RunFolder) -> None:
    """While the ledger is held: a run that is under way keeps its own."""
    with appearing(folder.config) as temporary:
        config.to_yaml(temporary)


def _holdout_key(config: CurriculumConfig, folder: RunFolder, *, overwrite: bool) -> bytes | None:
    """The key by which images are held out: that of the run to resume, or a new one; `None` if none are."""
    if config.data.holdout is None:
        return None
    if not overwrite and folder.holdout_key.exists():
        return folder.holdout_key.read_bytes()
    if not overwrite and folder.config.exists():
        raise ValueError(
            f"Refusing to resume the run in --output_dir={folder.root}: {folder.holdout_key} is missing, so the "
            "images that were held out are not known. Restore it, or start another run."
        )
    return draw_key(KEY_BYTES)


def _save_holdout_key(run: Run, key: bytes | None) -> None:
    """Before the first charge. Its hash is in the ledger before the file is there."""
    path = run.folder.holdout_key
    if key is not None and not path.exists():
        run.record(path, hashlib.sha256(key).hexdigest())
        with appearing(path) as temporary:
            temporary.touch(mode=0o600)  # for its owner alone
            temporary.write_bytes(key)


def _finish(run: Run) -> CurriculumResult:
    """Saves the release, and reads the pipeline back as a user will."""
    run.stop.work = ""
    broadcast_weights(run.unet, run.accelerator)
    report = from_main(run.accelerator, lambda: save_release(run))
    finished = not run.stop.agreed()  # a request while the sheet was drawn left it out
    if run.accelerator.is_main_process:
        pipeline = DPCurriculumPipeline.from_pretrained(run.folder.root)
    else:  # the folder may be on another machine
        pipeline = run.pipeline(run.unet.eval(), privacy=report.to_dict())
    return CurriculumResult(pipeline, run.folder.ledger, report, finished)
