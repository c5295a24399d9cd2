"""The curriculum: stages from easy to hard, in order, on one ledger.

A stage is one function of the [`Run`] plus the events that it reserves. `STAGES` is the curriculum.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import EDMEulerScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from dp_curriculum import pipeline_dp_curriculum
from dp_curriculum.central_images import CentralImages, query_central_images
from dp_curriculum.checkpointing import latest_checkpoint, save_checkpoint
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data import DIGITS, PrivateImages, find_columns, open_dataset, read_images
from dp_curriculum.dp_finetuning import DPTrainer, StopRequest, finetune, stop_on_signal
from dp_curriculum.edm import build_unet, edm_loss
from dp_curriculum.ledger import PrivacyLedger, PrivacyReport, ReportFacts
from dp_curriculum.model_card import render_card
from dp_curriculum.per_image_gradients import check_per_image_gradients
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.plan import CENTRAL_IMAGES, DP_SGD, BudgetPlan, PlannedStage, plan_budget
from dp_curriculum.pretraining import pretrain
from dp_curriculum.randomness import SecretGenerator
from dp_curriculum.run_folder import RunFolder
from dp_curriculum.sheets import save_sheet


_SHEET_COLUMNS = 8


@dataclass
class Run:
    """What the stages of one run share."""

    config: CurriculumConfig
    folder: RunFolder
    accelerator: Accelerator
    private: PrivateImages
    plan: BudgetPlan
    ledger: PrivacyLedger | None  # the main process holds it; the others do what it says
    secret: SecretGenerator
    generator: torch.Generator
    unet: UNet2DModel
    stop: StopRequest = field(default_factory=StopRequest)
    lesson: CentralImages | None = None

    @property
    def quiet(self) -> bool:
        return not self.accelerator.is_main_process

    def reserve(self, name: str, num_steps: int) -> None:
        """Writes to the ledger, durably, what the next `num_steps` of a stage release; then all processes go on."""
        stage = self.plan.stage(name)
        assert stage is not None, f"stage {name} is not in the plan"
        if self.ledger is not None:
            self.ledger.reserve(replace(stage.event, num_steps=num_steps), stage=name, clip_norm=stage.clip_norm)
        self.accelerator.wait_for_everyone()

    def give_back(self, name: str, num_steps: int) -> None:
        if self.ledger is not None:
            self.ledger.give_back(stage=name, num_steps=num_steps)

    def charged_steps(self, name: str) -> int:
        """Steps of a stage that are charged already, by this process or one before it."""
        if self.ledger is None:
            return 0
        return sum(row["num_steps"] for row in self.ledger.mechanisms if row["name"] == name)

    def epsilon(self) -> float | None:
        budget = self.config.privacy
        if self.ledger is None or budget.non_private:
            return None
        return self.ledger.epsilon(budget.target_delta, adjacency=budget.adjacency, group_size=budget.group_size)

    def pipeline(self, unet: UNet2DModel, report: PrivacyReport | None = None) -> DPCurriculumPipeline:
        sampler = self.config.sampler
        scheduler = EDMEulerScheduler(
            sigma_min=sampler.sigma_min, sigma_max=sampler.sigma_max, sigma_data=self.config.model.sigma_data
        )
        sampling = {
            name: getattr(sampler, name)
            for name in ("num_inference_steps", "guidance_scale", "s_churn", "s_tmin", "s_tmax", "s_noise")
        }
        return DPCurriculumPipeline(
            unet,
            scheduler,
            id2label=dict(enumerate(self.private.class_names)),
            sampling=sampling,
            privacy=None if report is None else report.to_dict(),
        )

    def save_samples(self, unet: UNet2DModel, path: Path) -> None:
        """A sheet of generated images, one row a class. Noised weights went in, so it is covered."""
        if self.quiet:
            return
        pipeline = self.pipeline(unet)
        pipeline.set_progress_bar_config(disable=True)
        labels = [label for label in range(min(10, self.private.num_classes)) for _ in range(_SHEET_COLUMNS)]
        generator = torch.Generator(self.accelerator.device)
        if self.config.runtime.seed is not None:
            generator.manual_seed(self.config.runtime.seed)
        save_sheet(
            pipeline(class_labels=labels, generator=generator, output_type="pt").images, path, columns=_SHEET_COLUMNS
        )


@dataclass(frozen=True)
class CurriculumResult:
    """
    What a run leaves behind.

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


# --- the stages ----------------------------------------------------------------------------------------------------


def central_images_stage(run: Run) -> None:
    """Easy: releases central images once, and keeps them for a resumed run."""
    stage = run.plan.stage(CENTRAL_IMAGES)
    if stage is None:
        return
    if run.folder.lesson.exists():
        saved = load_file(run.folder.lesson)
        run.lesson = CentralImages(saved["images"], saved["labels"], (stage.event,))
        return
    run.reserve(CENTRAL_IMAGES, stage.event.num_steps)
    lesson = None
    if run.accelerator.is_main_process:
        lesson = query_central_images(
            run.private.images,
            run.private.labels,
            run.config.central_images,
            num_classes=run.plan.num_classes,
            public_dataset_size=run.plan.dataset_size,
            resolution=run.config.central_resolution,
            generator=run.secret,
        )
        _save_tensors({"images": lesson.images, "labels": lesson.labels}, run.folder.lesson)
        by_class = lesson.images[lesson.labels.argsort(stable=True)]
        save_sheet(
            by_class, run.folder.central_sheet, columns=max(10, run.config.central_images.central_images_per_class)
        )
    run.accelerator.wait_for_everyone()
    run.lesson = lesson


def pretraining_stage(run: Run) -> None:
    """Easy: pretrains on the central images. It spends nothing."""
    if run.lesson is None:
        return
    if (run.folder.pretrained / "config.json").exists():
        run.unet.load_state_dict(UNet2DModel.from_pretrained(run.folder.pretrained).state_dict())
        return
    device = run.accelerator.device
    pretrain(
        run.unet,
        CentralImages(run.lesson.images.to(device), run.lesson.labels.to(device), run.lesson.events),
        run.config,
        generator=run.generator,
        on_step=lambda step, loss: run.accelerator.log({"pretraining/loss": loss}, step=step),
        should_stop=lambda: run.stop.requested,
        disable_progress_bar=run.quiet,
    )
    if not run.quiet and not run.stop.requested:
        temporary = run.folder.pretrained.with_name(".tmp-pretrained")
        run.unet.save_pretrained(temporary)
        os.replace(temporary, run.folder.pretrained)
    run.save_samples(run.unet.eval(), run.folder.sheets / "after-easy-stage.png")


def dp_sgd_stage(run: Run) -> None:
    """Hard: DP-SGD on the images, from the last checkpoint where there is one."""
    stage = run.plan.stage(DP_SGD)
    if stage is None:
        return
    trainer = DPTrainer(
        run.unet,
        run.private,
        run.config,
        noise_multiplier=stage.event.noise_multiplier,
        sample_rate=stage.event.sample_rate,
        divisor=stage.event.sample_rate * run.plan.dataset_size,
        secret=run.secret,
        generator=run.generator,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    )
    checkpoint, passed_over = latest_checkpoint(run.folder.checkpoints)
    for line in passed_over:
        run.accelerator.print(line)
    if checkpoint is not None:
        trainer.load_state(checkpoint.step, checkpoint.tensors)
    left = stage.event.num_steps - run.charged_steps(DP_SGD)
    lost = run.charged_steps(DP_SGD) - trainer.num_steps_taken
    if lost > 0:
        run.accelerator.print(f"{lost} charged steps were lost to an interruption: training goes on for {left} steps.")
    _run_dp_sgd(run, trainer, left)
    with trainer.averaged_weights() as unet:
        averaged = {name: value.clone() for name, value in unet.state_dict().items()}
    run.unet.load_state_dict(averaged)


def _run_dp_sgd(run: Run, trainer: DPTrainer, num_steps: int) -> None:
    runtime = run.config.runtime
    bar = tqdm(
        total=trainer.num_steps_taken + num_steps,
        initial=trainer.num_steps_taken,
        desc="hard stage",
        disable=run.quiet,
    )

    def on_step(trainer: DPTrainer) -> None:
        bar.update()
        if runtime.sample_steps and trainer.num_steps_taken % runtime.sample_steps == 0:
            with trainer.averaged_weights() as unet:
                run.save_samples(unet, run.folder.sheets / f"dp-step-{trainer.num_steps_taken:06d}.png")

    def on_block(trainer: DPTrainer) -> None:
        epsilon = run.epsilon()
        values: dict[str, float] = {"dp_sgd/learning_rate": trainer.lr_scheduler.get_last_lr()[0]}
        if epsilon is not None:
            bar.set_postfix(epsilon=f"{epsilon:.3f}")
            values["privacy/epsilon"] = epsilon
        run.accelerator.log(values, step=run.config.pretraining.pretrain_steps + trainer.num_steps_taken)
        if run.ledger is not None:
            save_checkpoint(
                run.folder.checkpoints,
                step=trainer.num_steps_taken,
                tensors=trainer.state(),
                facts={"ledger_head": list(run.ledger.head)},
                total_limit=runtime.checkpoints_total_limit,
            )

    finetune(
        trainer,
        num_steps=num_steps,
        block=runtime.checkpointing_steps,
        reserve=lambda steps: run.reserve(DP_SGD, steps),
        give_back=lambda steps: run.give_back(DP_SGD, steps),
        on_step=on_step,
        on_block=on_block,
        stop=run.stop,
    )
    bar.close()


STAGES: tuple[Callable[[Run], None], ...] = (central_images_stage, pretraining_stage, dp_sgd_stage)


# --- the run -------------------------------------------------------------------------------------------------------


def run_curriculum(
    config: CurriculumConfig,
    dataset: datasets.Dataset | None = None,
    *,
    output_dir: str | Path,
    resume: bool = False,
    overwrite_output_dir: bool = False,
) -> CurriculumResult:
    r"""
    Trains from easy to hard under one privacy budget and saves pipeline, report, card and sample sheet.

    Args:
        config ([`CurriculumConfig`]): Public constants of the run.
        dataset (`datasets.Dataset`, *optional*): The private images; opened as `config.data` says if unset.
        output_dir (`str` or `Path`): A new or empty folder.
        resume (`bool`, *optional*, defaults to `False`): Go on with the run that is in `output_dir`.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`): Replace the run that is in `output_dir`. What it
            released stays released: its epsilon adds to that of the new run if both are shared.

    Returns:
        [`CurriculumResult`]

    Privacy:
        The weights after each noisy step, their averages, the central images and everything made from them are
        released together at the epsilon of the report, for one image under the configured adjacency.

    Raises:
        ValueError: If the configuration, the dataset or the folder does not fit; nothing is spent.
        PrivacyBudgetExceeded: If the easy stage alone spends the budget; nothing is spent.
    """
    folder = RunFolder(Path(output_dir))
    accelerator = _make_accelerator(config, folder)
    private, plan = _validate(config, dataset)
    unet = _initial_unet(config, plan.num_classes).to(accelerator.device)
    if accelerator.is_main_process:
        folder.prepare(resume=resume, overwrite=overwrite_output_dir)
        _check_same_config(config, folder) if resume else config.to_yaml(folder.config)
    accelerator.wait_for_everyone()
    gradient_check = check_gradients(unet, config, plan.num_classes)
    if config.runtime.report_to != "none":
        accelerator.init_trackers(config.runtime.tracker_project_name)
    ledger = _open_ledger(config, folder) if accelerator.is_main_process else None
    try:
        run = Run(
            config=config,
            folder=folder,
            accelerator=accelerator,
            private=private,
            plan=_plan_of_resumed(config, plan, ledger),
            ledger=ledger,
            secret=_secret_generator(config, accelerator.device),
            generator=_public_generator(config, accelerator),
            unet=unet,
        )
        if ledger is not None and config.privacy.non_private and not ledger.not_private_reasons:
            ledger.mark_not_private("trained without noise, on request")
        with stop_on_signal() as run.stop:
            for stage in STAGES:
                if not run.stop.requested:
                    stage(run)
        return _finish(run, gradient_check)
    finally:
        if ledger is not None:
            ledger.close()
        if config.runtime.report_to != "none":
            accelerator.end_training()


def _make_accelerator(config: CurriculumConfig, folder: RunFolder) -> Accelerator:
    report_to = config.runtime.report_to
    return Accelerator(
        # Autocast is ours: `prepare` never sees the private loader or optimizer (design rule 8).
        mixed_precision="no",
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(project_dir=str(folder.root / "run"), logging_dir=str(folder.logs)),
    )


def _validate(config: CurriculumConfig, dataset: datasets.Dataset | None) -> tuple[PrivateImages, BudgetPlan]:
    """Everything that can be refused is refused here, before a folder is made or a draw is taken."""
    opened = open_dataset(config.data) if dataset is None else dataset
    if opened.features is not None:
        find_columns(opened.features, config.data)
    if config.privacy.public_dataset_size is not None and opened.features is not None:
        names = find_columns(opened.features, config.data)[2]
        plan_budget(config, dataset_size=config.privacy.public_dataset_size, num_classes=len(names))
    private = read_images(opened, config.data, streamed=dataset is None)
    return private, plan_budget(config, dataset_size=len(private), num_classes=private.num_classes)


def _initial_unet(config: CurriculumConfig, num_classes: int) -> UNet2DModel:
    # diffusers draws initial weights from the global generator; fork_rng leaves the caller's as it was.
    with torch.random.fork_rng(devices=[]):
        if config.runtime.seed is not None:
            torch.random.default_generator.manual_seed(config.runtime.seed)
        return build_unet(
            config.model,
            resolution=config.data.resolution,
            num_channels=config.data.num_channels,
            num_classes=num_classes,
        )


def _public_generator(config: CurriculumConfig, accelerator: Accelerator) -> torch.Generator:
    generator = torch.Generator(accelerator.device)
    if config.runtime.seed is None:
        generator.seed()
        return generator
    # One stream a process: two processes must not add the same diffusion noise to their shares of a draw.
    return generator.manual_seed(config.runtime.seed + 1_000_003 * accelerator.process_index)


def _secret_generator(config: CurriculumConfig, device: torch.device) -> SecretGenerator:
    mode = config.runtime.secret_randomness
    if mode == "auto":
        mode = "fast" if device.type == "cuda" else "secure"
    return SecretGenerator(mode, device=device if mode == "fast" else "cpu")


def _open_ledger(config: CurriculumConfig, folder: RunFolder) -> PrivacyLedger:
    checkpoint, _ = latest_checkpoint(folder.checkpoints)
    head = (
        None if checkpoint is None else (int(checkpoint.facts["ledger_head"][0]), checkpoint.facts["ledger_head"][1])
    )
    return PrivacyLedger.open(folder.ledger, expected_at_least=head)


def _plan_of_resumed(config: CurriculumConfig, plan: BudgetPlan, ledger: PrivacyLedger | None) -> BudgetPlan:
    """The plan a run started with; its hard stage is calibrated anew only where that has not begun."""
    if ledger is None or not ledger.events:
        return plan
    easy = tuple(event for event, row in zip(ledger.events, ledger.mechanisms) if row["name"] != DP_SGD)
    hard = [row["noise_multiplier"] for row in ledger.mechanisms if row["name"] == DP_SGD]
    if hard:
        # Noise of the steps to come equals that of the steps taken, which an earlier crash may have raised.
        stages = [
            PlannedStage(s.name, s.clip_norm, replace(s.event, noise_multiplier=hard[0])) if s.name == DP_SGD else s
            for s in plan.stages
        ]
        return replace(plan, stages=tuple(stages))
    # An easy stage that crashed between charge and save is paid twice; the hard stage makes room for it.
    if not _lesson_saved(ledger) and plan.stage(CENTRAL_IMAGES) is not None:
        easy = (*easy, plan.stages[0].event)
    return plan_budget(config, dataset_size=plan.dataset_size, num_classes=plan.num_classes, spent=easy)


def _lesson_saved(ledger: PrivacyLedger) -> bool:
    return RunFolder(ledger.path.parent.parent).lesson.exists()


def _check_same_config(config: CurriculumConfig, folder: RunFolder) -> None:
    before, now = CurriculumConfig.from_yaml(folder.config).to_dict(), config.to_dict()
    for section in before:
        for name, value in before[section].items():
            if section != "runtime" and now[section][name] != value:
                raise ValueError(
                    f"Expected --{name}={now[section][name]} to be {value}, as the run in --output_dir={folder.root} has it: "
                    "--resume cannot change the mechanism."
                )


def check_gradients(unet: UNet2DModel, config: CurriculumConfig, num_classes: int) -> dict[str, Any]:
    """
    Compares the per-image gradients of this very model with autograd's, image by image, on random inputs.

    Raises:
        PerImageGradientError: If a gradient is wrong; the message names the parameter. Nothing is spent.
    """
    copies, images = min(2, config.dp_sgd.noise_multiplicity), 2
    generator = torch.Generator().manual_seed(0)
    shape = (copies * images, config.data.num_channels, config.data.resolution, config.data.resolution)
    inputs = [torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)]
    sigma = torch.rand(shape[0], generator=generator) + 0.1
    labels = torch.tensor([0, num_classes] * copies)

    def losses(images: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return edm_loss(unet, images, noise, sigma, labels, sigma_data=config.model.sigma_data)

    rows = [tensor.to(unet.device) for tensor in (*inputs, sigma, labels)]
    return check_per_image_gradients(unet, losses, rows, noise_multiplicity=copies)


def _finish(run: Run, gradient_check: dict[str, Any]) -> CurriculumResult:
    """Saves pipeline, report, card and sample sheet, and reads the pipeline back as a user will."""
    finished = not run.stop.requested
    if run.ledger is not None:
        report = _report(run, run.ledger, gradient_check)
        pipeline = run.pipeline(run.unet.eval(), report)
        pipeline.save_pretrained(run.folder.root)
        shutil.copyfile(pipeline_dp_curriculum.__file__, run.folder.root / "pipeline.py")
        run.save_samples(run.unet, run.folder.sample_sheet)
        run.folder.privacy.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        run.folder.card.write_text(_card(run, report, num_dp_steps=run.charged_steps(DP_SGD)), encoding="utf-8")
    run.accelerator.wait_for_everyone()
    if run.ledger is None:
        report = PrivacyReport.from_file(run.folder.privacy)
    pipeline = DPCurriculumPipeline.from_pretrained(run.folder.root)
    return CurriculumResult(pipeline, run.folder.ledger, report, finished)


def _report(run: Run, ledger: PrivacyLedger, gradient_check: dict[str, Any]) -> PrivacyReport:
    budget, size = run.config.privacy, run.config.privacy.public_dataset_size
    unprotected = ["number of classes", "class names", "image resolution", "number of channels"]
    not_covered = ["choices made by looking at the private images", "side channels of the machine that trained"]
    if budget.group_size == 1:
        not_covered.append("several images of the same person")
    facts = ReportFacts(
        group_size=budget.group_size,
        dataset_id=_hub_id(run.config),
        num_records=run.plan.dataset_size,
        unprotected_quantities=tuple(unprotected if size is not None else ["number of images", *unprotected]),
        not_covered=tuple(not_covered),
        randomness=run.secret.describe(),
        implementation={
            "verified_per_image_gradients": True,
            "max_relative_error": gradient_check["max_relative_error"],
        },
    )
    return PrivacyReport.from_ledger(
        ledger,
        target_delta=budget.target_delta,
        target_epsilon=budget.target_epsilon,
        adjacency=budget.adjacency,
        facts=facts,
    )


def _hub_id(config: CurriculumConfig) -> str | None:
    """The dataset's Hub id; a local folder has no public name."""
    name = config.data.dataset_name
    is_local = config.data.train_data_dir is not None or name == DIGITS or Path(name).exists()
    return None if is_local else name


def _card(run: Run, report: PrivacyReport, *, num_dp_steps: int) -> str:
    config = run.config
    training = {
        "model": f"UNet2DModel, {sum(p.numel() for p in run.unet.parameters()):,} parameters, "
        f"{config.data.num_channels}x{config.data.resolution}x{config.data.resolution}",
        "central images": f"{config.central_images.central_statistic}, "
        f"{config.central_images.central_images_per_class} a class, at {run.config.central_resolution} pixels a side",
        "pretraining": f"{config.pretraining.pretrain_steps} steps of {config.pretraining.pretrain_batch_size} images",
        "DP-SGD": f"{num_dp_steps} steps of {config.dp_sgd.expected_batch_size} images on average, "
        f"{config.dp_sgd.noise_multiplicity} noise draws an image, Adam with learning rate {config.dp_sgd.dp_learning_rate:g}",
        "sampler": f"EDM stochastic Heun, {config.sampler.num_inference_steps} steps, S_churn {config.sampler.s_churn:g}",
    }
    return render_card(
        report.to_dict(),
        statement=report.statement(),
        repo_id=config.runtime.hub_model_id or "your-name/your-model",
        title=config.runtime.hub_model_id or "A differentially private image generator",
        class_names=run.private.class_names,
        training=training,
        dataset_id=_hub_id(config),
    )


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)
