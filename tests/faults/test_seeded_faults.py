"""
Forty faults that would break the guarantee, planted one at a time: a check that is named here notices each.

A check is a claim of the audits, or a test of the suite. It holds before the fault is planted, and does not after.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from planning import planned_lesson
from planting import Change, plant

from dp_curriculum.audit.findings import Finding
from dp_curriculum.audit.frozen import WatchedGenerator
from dp_curriculum.audit.laws import audit_masks, audit_noise_of_steps
from dp_curriculum.audit.lesson_replay import audit_lesson
from dp_curriculum.audit.neighbours import neighbours
from dp_curriculum.audit.step_audit import StepAudit
from dp_curriculum.audit.step_replay import audit_charges, audit_one_step, audit_steps
from dp_curriculum.data import digits_dataset, open_rows, read_images
from dp_curriculum.dp_sgd import flat_gradients, gradient_engine, sampling
from dp_curriculum.dp_sgd.dp_optimizer import SecretNoiseOptimizer
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.lessons import central_images
from dp_curriculum.lessons.table import LESSONS
from dp_curriculum.per_image_gradients import PerImageGradients
from dp_curriculum.privacy import accounting, witnesses
from dp_curriculum.privacy.accounting import GaussianEvent
from dp_curriculum.privacy.ledger import PrivacyLedger, PrivacyReport
from dp_curriculum.privacy.randomness import SecretGenerator
from dp_curriculum.privacy.verification import verify_report
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.checkpointing import save_checkpoint
from dp_curriculum.sharing import export
from dp_curriculum.training import stages, teaching
from dp_curriculum.training.plan import plan_budget
from dp_curriculum.training.run import Run


class Tools(NamedTuple):
    """What a check may use."""

    make_config: Any
    folder: Path
    request: pytest.FixtureRequest


Check = Callable[[Tools], bool]


class Fault(NamedTuple):
    """One fault: its number in the list of forty, what it is, where it is planted, and who notices."""

    number: str
    what: str
    owner: Any
    name: str
    changes: Iterable[Change]
    check: Check


# --- checks: claims of the audits ------------------------------------------------------------------------------------


def step_audit(tools: Tools, **fields: Any) -> StepAudit:
    config = tools.make_config(**{"noise_multiplicity": 4, "dp_max_grad_norm": 0.37, **fields})
    return StepAudit(config, GaussianEvent(2.0, 0.25, 10), 3, 16.0)


def holds(findings: Iterable[Finding], words: str) -> bool:
    (finding,) = [finding for finding in findings if words in finding.claim]
    return finding.holds


def replayed(words: str, *names: str) -> Check:
    """A claim of record and replay of DP-SGD steps, on the pairs of neighbours with these names."""

    def check(tools: Tools) -> bool:
        pairs = neighbours(num_channels=1, side=8, num_classes=3, gradients=True)
        return holds(audit_steps(step_audit(tools), [pair for pair in pairs if pair.name in names]), words)

    return check


def one_step(words: str) -> Check:
    return lambda tools: holds(audit_one_step(step_audit(tools)), words)


def charges(tools: Tools) -> bool:
    """The claim that every step is charged before its noise is drawn, and an empty draw is a step."""
    return audit_charges(step_audit(tools)).holds


def noise(words: str) -> Check:
    """A claim on the law of the noise of real steps."""
    return lambda tools: holds(audit_noise_of_steps(step_audit(tools), SecretGenerator(), num_draws=60_000), words)


def masks(words: str) -> Check:
    return lambda tools: holds(audit_masks(step_audit(tools), SecretGenerator(), num_coins=200_000), words)


def lesson(words: str) -> Check:
    """A claim of record and replay of the lesson of means."""

    def check(tools: Tools) -> bool:
        config = tools.make_config(central_images_per_class=2, central_sample_rate=0.5)
        planned = planned_lesson(LESSONS["mean"], config)
        return holds(audit_lesson("mean", planned, config, num_classes=3, dataset_size=20), words)

    return check


# --- checks: others --------------------------------------------------------------------------------------------------


def _test_module(name: str) -> ModuleType:
    """A file of tests, of whichever room."""
    (path,) = Path(__file__).parents[1].rglob(f"{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return importlib.import_module(name)


def passes(test: str, *parameters: Any, **fixtures: Any) -> Check:
    """A test of the suite, as `file::name`; fixtures that are not given are looked up."""

    def check(tools: Tools) -> bool:
        file, name = test.split("::")
        function = getattr(_test_module(file), name)
        signature = list(inspect.signature(function).parameters)
        given = dict(zip(signature, parameters)) | {
            key: make(tools) if callable(make) else make for key, make in fixtures.items()
        }
        for needed in signature:
            if needed not in given:
                given[needed] = tools.request.getfixturevalue(needed)
        try:
            function(**given)
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 - a test that cannot go on has noticed, too
            return False
        return True

    return check


def ledger_path(tools: Tools) -> Path:
    return tools.folder / "ledger" / "privacy_ledger.jsonl"


def new_folder(tools: Tools) -> Path:
    tools.folder.mkdir()
    return tools.folder


def copied_run(tools: Tools) -> Path:
    run: Path = tools.request.getfixturevalue("finished_run")
    return Path(shutil.copytree(run, tools.folder.with_name(f"run-{tools.folder.name}")))


def draws_are_charged(tools: Tools) -> bool:
    """As many noises as charges, in both queries of the lesson of moments, by the code of a run."""
    config = tools.make_config(public_dataset_size=20, stages=["moments"])
    accelerator: Any = SimpleNamespace(
        is_main_process=True, num_processes=1, process_index=0, device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
    )  # fmt: skip
    secret, unused = WatchedGenerator(), SimpleNamespace()
    private = read_images(open_rows(digits_dataset().select(range(20)), config.data), config.data)
    plan = plan_budget(config, dataset_size=20, num_classes=10)
    with PrivacyLedger.open(ledger_path(tools)) as ledger:
        run = Run(
            config, RunFolder(tools.folder), accelerator, private, plan, ledger, secret, unused, unused,  # type: ignore[arg-type]
        )  # fmt: skip
        teaching._released(run, plan.lessons[0])
        return len(secret.stds) == sum(event.num_steps for event in ledger.events) == 2


def report_is_verified(tools: Tools) -> bool:
    with PrivacyLedger.open(ledger_path(tools)) as ledger:
        ledger.reserve(GaussianEvent(5.0, 1.0, 2), stage="easy", clip_norm=1.0)
        report = PrivacyReport.from_ledger(ledger, target_delta=1e-5)
    return all(check.holds for check in verify_report(report.to_dict()))


def renyi_witness_is_the_published_one(tools: Tools) -> bool:
    """V1: the Renyi accountant has 7.329 for these events, in Opacus' tests and in dp_accounting."""
    _, renyi = witnesses.ask_witnesses([GaussianEvent(1.5, 0.04, 2250)], 1e-5, 6.76879)
    return float(renyi.computed) == pytest.approx(7.32911117143, abs=1e-3)


def checkpoint_holds_no_generator_state(tools: Tools) -> bool:
    from byte_scan import generator_states, holds_secret

    audit = step_audit(tools)
    trainer = audit.build(audit.images(2), SecretGenerator())
    trainer.step()
    folder = tools.folder / "checkpoints"
    save_checkpoint(folder, step=1, tensors=trainer.state(), facts={}, total_limit=1)
    return holds_secret(folder, generator_states()) == []


def two_processes_config(tools: Tools) -> Any:
    return tools.make_config(noise_multiplicity=2, dp_max_grad_norm=1.0)


def sums_of_processes(tools: Tools) -> bool:
    return passes(
        "test_processes::test_the_clipped_sum_of_a_draw_is_the_same_on_one_two_and_three_processes",
        range(12),
        config=two_processes_config,
    )(tools)


# --- the forty -------------------------------------------------------------------------------------------------------

OTHER_NOISE = noise("the same configuration and seed twice release other noise")
VARIANCE = noise("noise has the variance that is charged")
ONE_IMAGE = "one image moves the gradient sum by at most C"
STD = "std=self.noise_multiplier * self.max_grad_norm"
TAKE_STEP = "self.optimizer.step()\n"
FACTORS = "torch.where(counts, max_grad_norm / norms.clamp_min(max_grad_norm), 0.0)"

FAULTS = [
    Fault("M1", "noise from the seed of the configuration", SecretGenerator, "_open_keystream",
          [("self._fresh_key(_KEY_BYTES)", 'torch.initial_seed().to_bytes(32, "little")')], OTHER_NOISE),
    Fault("M2", "noise from an unseeded torch generator", SecretGenerator, "gaussian",
          [("torch.from_numpy(self._chacha_normals(count))",
            "torch.randn(count, dtype=torch.float64, generator=torch.Generator())")], OTHER_NOISE),
    Fault("M3", "the noise of the first step in every step", SecretNoiseOptimizer, "add_noise",
          [("flat = (flat.to(noise) + noise)",
            'noise = self.__dict__.setdefault("kept", noise)\n        flat = (flat.to(noise) + noise)')],
          noise("noise of successive draws is independent")),
    Fault("M4", "one noise for all parameters of a shape", SecretNoiseOptimizer, "add_noise",
          [("flat = (flat.to(noise) + noise)",
            "kept, parts = {}, noise.split([p.numel() for p in self.params])\n"
            "        noise = torch.cat([kept.setdefault(p.shape, part) for p, part in zip(self.params, parts)])\n"
            "        flat = (flat.to(noise) + noise)")],
          noise("every parameter has its own noise")),
    Fault("M5", "sigma instead of sigma times C", SecretNoiseOptimizer, "add_noise",
          [(STD, "std=self.noise_multiplier")], VARIANCE),
    Fault("M6", "the variance instead of the standard deviation", SecretNoiseOptimizer, "add_noise",
          [(STD, "std=(self.noise_multiplier * self.max_grad_norm) ** 2")], VARIANCE),
    Fault("M7", "a fifth less noise", SecretNoiseOptimizer, "add_noise",
          [(STD, "std=0.8 * self.noise_multiplier * self.max_grad_norm")], VARIANCE),
    Fault("M8", "noise in every physical batch", DPTrainer, "_add_batch",
          [("return True",
            "for p in self.optimizer.params:\n"
            "        p.summed_grad = p.summed_grad + self.secret.gaussian(p.shape, std=0.74)\n"
            "    return True")],
          one_step("physical batches change nothing")),
    Fault("M9", "no noise where no image was drawn", SecretNoiseOptimizer, "add_noise",
          [(STD, f"{STD} * any(p.summed_grad is not None for p in self.params)")], charges),
    Fault("M10", "no noise in the last step", DPTrainer, "step",
          [(TAKE_STEP, "self.optimizer.noise_multiplier *= self.num_steps_taken + 1 < "
            f"self.config.dp_sgd.num_dp_steps\n    {TAKE_STEP}")], charges),
    Fault("M11", "noise on every process, then the mean", SecretNoiseOptimizer, "add_noise",
          [("torch.distributed.reduce(flat, dst=0)", "torch.distributed.all_reduce(flat)"),
           ("if not distributed or torch.distributed.get_rank() == 0:", "if True:"),
           ("broadcast(flat, from_process=0) if", '__import__("accelerate").utils.reduce(flat, "mean") if')],
          passes("test_processes::test_noise_is_drawn_once_whatever_the_number_of_processes", 2,
                 config=two_processes_config)),
    Fault("M12", "the mean over processes instead of the sum", SecretNoiseOptimizer, "add_noise",
          [("torch.distributed.reduce(flat, dst=0)",
            "torch.distributed.reduce(flat, dst=0)\n        flat /= torch.distributed.get_world_size()")],
          sums_of_processes),
    Fault("M13", "each noised copy is clipped by itself", DPTrainer, "_add_clipped",
          [("self.gradients.backward(", "self.gradients.noise_multiplicity = 1\n    self.gradients.backward("),
           ("counted=first != FILLER", "counted=(batch != FILLER).repeat(self.config.dp_sgd.noise_multiplicity)")],
          replayed(ONE_IMAGE, "huge gradient, add")),
    Fault("M14", "each parameter is clipped by itself", PerImageGradients, "accumulate_clipped",
          [("self._weighted_sum(factors)",
            "torch.cat([clip_factors(norm_per_image(part.flatten(1)), max_grad_norm) @ part.flatten(1)\n"
            "            for part in (*self._flat.views.values(), self._flat.rows[:, self._flat.num_columns:])])")],
          replayed(ONE_IMAGE, "huge gradient, add")),
    Fault("M15", "one factor for the whole batch", flat_gradients, "clip_factors",
          [(FACTORS, "torch.full_like(norms, max_grad_norm).div(norms.mean()).clamp_max(1.0)")],
          replayed(ONE_IMAGE, "huge gradient, add")),
    Fault("M16", "factors of at least 1", flat_gradients, "clip_factors",
          [("norms.clamp_min(max_grad_norm)", "norms.clamp_max(max_grad_norm)")],
          replayed(ONE_IMAGE, "huge gradient, add")),
    Fault("M17", "a gradient of zero is divided by its norm", flat_gradients, "clip_factors",
          [("max_grad_norm / norms.clamp_min(max_grad_norm)", "norms.clamp_max(max_grad_norm) / norms")],
          replayed(ONE_IMAGE, "gradient zero, add")),
    *(Fault(f"M18, {mode}", "a gradient that is no number is kept", flat_gradients, "make_finite",
            [("torch.nan_to_num(gradient, nan=largest, posinf=largest, neginf=-largest, out=out)",
              "gradient if out is None else out.copy_(gradient)")],
            passes("test_dp_optimizer::test_one_image_moves_the_sum_by_at_most_max_grad_norm", "nan", 1, mode))
      for mode in ("auto", "norms_first")),
    Fault("M18, fillers", "what fills up a batch counts", DPTrainer, "_add_clipped",
          [("counted=first != FILLER", "counted=None")], replayed(ONE_IMAGE, "ordinary, add")),
    Fault("M19", "division by the number of images drawn", DPTrainer, "step",
          [(TAKE_STEP, f"self.optimizer.expected_batch_size = max(1, len(share))\n    {TAKE_STEP}")],
          one_step("the noised sum over the public divisor")),
    Fault("M20", "the sample rate that whole batches give", DPTrainer, "_draw_share",
          [("sample_rate=self.sample_rate",
            "sample_rate=int(len(self.private) * self.sample_rate) / max(1, len(self.private))")],
          replayed("each step draws one mask and one noise", "ordinary, add")),
    Fault("M21", "shuffled batches", SecretGenerator, "poisson_sample",
          [("threshold = ", "return torch.randperm(num_rows)[: round(num_rows * sample_rate)]\n    threshold = ")],
          masks("the size of a draw varies as that of a Poisson sample")),
    Fault("M22", "the same rows in every step", DPTrainer, "_draw_share",
          [("drawn = draw_indices(self.secret, num_rows=len(units), sample_rate=self.sample_rate)",
            'drawn = self.__dict__.setdefault("kept", draw_indices(self.secret, num_rows=len(units), '
            "sample_rate=self.sample_rate))")],
          masks("successive draws are independent")),
    Fault("M23", "every process works on the whole draw", sampling, "share_of_process",
          [("indices[process_index::num_processes]", "indices")], sums_of_processes),
    Fault("M24", "an empty draw is no step", DPTrainer, "step",
          [("with self.gradients,", "if not len(share):\n        return\n    with self.gradients,")], charges),
    Fault("M25", "central means over the realised count", central_images, "query_central_images",
          [("sums / expected_class_count",
            "sums / torch.bincount(labels.clamp(0, num_classes - 1), minlength=num_classes)[:, None, None, None]")],
          lesson("with equal noised sums, all that is released is equal")),
    Fault("M26", "noise of a lesson scaled by its divisor", central_images, "query_central_images",
          [("mechanism=mechanism,",
            "mechanism=PlannedMechanism(mechanism.name, mechanism.clip_norm, GaussianEvent("
            "event.noise_multiplier / expected_class_count, event.sample_rate, event.num_steps)),")],
          lesson("noise, sample rates and number of draws are those that are charged")),
    Fault("M27", "one of two queries is not in the ledger", teaching, "_released",
          [("for mechanism in planned.mechanisms:", "for mechanism in planned.mechanisms[1:]:")], draws_are_charged),
    Fault("M28", "epsilon of the hard stage alone", PrivacyLedger, "epsilon",
          [("Charge(self.events)", "Charge(self.events[-1:])")],
          passes("test_ledger::test_epsilon_is_that_of_all_stages_together", path=ledger_path)),
    Fault("M29", "the largest event instead of their composition", accounting, "_shift",
          [("math.hypot(*mus)", "max(mus, default=0.0)")],
          passes("test_accounting::test_delta_of_full_batches_is_that_of_one_gaussian")),
    Fault("M30", "one step fewer than accounted", stages, "take_noisy_steps",
          [("while left > 0 and", "while left > 1 and")], charges),
    Fault("M31", "delta is always 1e-5", accounting, "compute_epsilon",
          [("float(delta)", "1e-5")],
          passes("test_accounting::test_epsilon_is_that_of_dp_accounting", (1.0, 0.001, 30000), 1e-7, 1.0982, 1e-3)),
    Fault("M32", "a sign in the conversion to epsilon", accounting, "_gaussian_delta",
          [("special.log_ndtr(mu / 2 - epsilons / mu)", "special.log_ndtr(mu / 2 + epsilons / mu)")],
          passes("test_accounting::test_delta_of_full_batches_is_that_of_one_gaussian")),
    Fault("M32, the witness", "the old conversion from Renyi divergences", witnesses, "_epsilon_of",
          [("return float(accountant.get_epsilon(delta, **options))",
            "import math\n            from opacus.accountants.analysis import rdp\n"
            "            orders = [1.01 + i / 10 for i in range(630)]\n"
            "            (sigma, rate, steps), = accountant.history\n"
            "            found = rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=orders)\n"
            "            return min(r + math.log(1 / delta) / (a - 1) for a, r in zip(orders, found))")],
          renyi_witness_is_the_published_one),
    Fault("M33", "replace-one has the numbers of add-or-remove-one", PrivacyReport, "from_ledger",
          [("adjacency=relation,", 'adjacency="add-or-remove-one",')], report_is_verified),
    Fault("M34", "a resumed run begins its ledger anew", PrivacyLedger, "open",
          [("path = Path(path)\n", "path = Path(path)\n    for old in path.parent.glob(path.name + '*'):\n"
            "        old.unlink()\n    expected_at_least = None\n")],
          passes("test_ledger::test_the_ledger_can_be_opened_again_and_goes_on_where_it_was", path=ledger_path)),
    Fault("M35", "the ledger is written after the steps", stages, "take_noisy_steps",
          [("            run.reserve(mechanism, block)\n", ""),
           ("            if taken < block:\n", "            run.reserve(mechanism, block)\n"
            "            if taken < block:\n")], charges),
    Fault("M36", "generator state in the checkpoint", DPTrainer, "state",
          [('return {"unet"', 'return {"random": {"state": torch.get_rng_state()}, "unet"')],
          checkpoint_holds_no_generator_state),
    Fault("M37", "a private number in the tracker", stages, "_log",
          [('values: dict[str, float] = {"dp_sgd/learning_rate"',
            'values: dict[str, float] = {"dp_sgd/rows": float(len(run.private)), "dp_sgd/learning_rate"')],
          passes("test_curriculum::test_trackers_get_values_that_are_safe_to_release_only", tmp_path=new_folder,
                 config=lambda tools: tools.make_config(
                     checkpointing_steps=2, sample_steps=0, num_inference_steps=2, expected_batch_size=64),
                 few_digits=lambda tools: digits_dataset().select(range(64)))),
    Fault("M38", "everything in the folder is uploaded", export, "_write",
          [('(target / "unet").mkdir(parents=True)', "shutil.copytree(source.root, target, dirs_exist_ok=True)"),
           ('(target / "scheduler").mkdir()', "pass")],
          passes("test_export::test_the_files_are_those_of_the_allow_list_whatever_lies_about", run=copied_run,
                 tmp_path=new_folder)),
    Fault("M39", "the average is taken before the noise", DPTrainer, "step",
          [(TAKE_STEP, f"self.ema.step(self.trained)\n    {TAKE_STEP}"),
           ("    self.ema.step(self.trained)\n    self.num_steps_taken", "    self.num_steps_taken")],
          one_step("the average is one of noised weights")),
    Fault("M40", "batch normalization is let in", gradient_engine, "plan_layers",
          [("if mixes:", "if False:")],
          passes("test_per_image_gradients::test_layers_that_mix_images_are_refused_by_name",
                 lambda: torch.nn.BatchNorm2d(4), r"Module 1 \(BatchNorm2d\) mixes the images")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Any:
    """Epsilons are cached: those of a fault must not outlive it."""
    caches = accounting._epsilon, accounting._compose
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.number}: {fault.what}" for fault in FAULTS])
def test_a_planted_fault_is_noticed(
    fault: Fault, make_config: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    honest, broken = tmp_path / "honest", tmp_path / "broken"
    assert fault.check(Tools(make_config, honest, request))
    accounting._epsilon.cache_clear()
    accounting._compose.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, fault.owner, fault.name, *fault.changes)
        assert not fault.check(Tools(make_config, broken, request))


def test_all_forty_are_planted() -> None:
    assert {fault.number.split(",")[0] for fault in FAULTS} == {f"M{number}" for number in range(1, 41)}
