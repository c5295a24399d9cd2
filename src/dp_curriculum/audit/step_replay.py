"""Record and replay of the hard stage: real steps of a real UNet on neighbours, with all chance standing still."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dp_curriculum.audit.findings import Finding
from dp_curriculum.audit.frozen import FrozenGenerator
from dp_curriculum.audit.neighbours import Neighbours, neighbours
from dp_curriculum.audit.step_audit import StepAudit, watch_gradients
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.ledger import PrivacyLedger
from dp_curriculum.privacy.mechanism import DP_SGD, PlannedMechanism
from dp_curriculum.runs.run_contents import charged_steps
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.training import stages
from dp_curriculum.training.plan import BudgetPlan
from dp_curriculum.training.run import Run, make_accelerator


TOLERANCE = 1e-4  # float32 sums of a few images, each added in another order
_RECORDED_STEPS = 2
_CHARGED_STEPS, _BLOCK = 5, 2


def audit_steps(audit: StepAudit, pairs: Sequence[Neighbours] | None = None) -> list[Finding]:
    """
    Replays steps on neighbours, and looks at what a step does beside its sum.

    Args:
        audit ([`StepAudit`]): The hard stage.
        pairs (`Sequence[Neighbours]`, *optional*): Pairs to replay; all if unset.
    """
    if pairs is None:
        channels, side, _ = audit.config.input_shape
        shape = {"num_channels": channels, "side": side, "num_classes": audit.num_classes}
        pairs = list(neighbours(**shape, gradients=True, unit=audit.unit))
    # By single units; and by up to four at once, in batches that are filled up to one size.
    replays = [_StepReplay(audit.with_physical_batches_of(size), pair) for size in (1, 4) for pair in pairs]
    return [
        _sensitivity(audit, replays),
        _sameness(replays),
        _requests(audit, replays),
        *audit_one_step(audit),
        audit_charges(audit),
    ]


class _StepReplay:
    """Some steps on two neighbours: recorded on the first, replayed on the second."""

    def __init__(self, audit: StepAudit, pair: Neighbours) -> None:
        self.pair = pair
        self.first = FrozenGenerator(always=pair.changed)
        self.second = FrozenGenerator(always=pair.changed, recorded=self.first)
        self.states = [
            _run(audit, private, secret, pair)
            for private, secret in ((pair.first, self.first), (pair.second, self.second))
        ]

    def distances(self) -> list[float]:
        """Distance between the sums of each step; infinite where they are no numbers."""
        if len(self.first.sums) != len(self.second.sums) or not self.first.sums:
            return [math.inf]
        distances = [(a - b).norm().item() for a, b in zip(self.first.sums, self.second.sums)]
        return [distance if math.isfinite(distance) else math.inf for distance in distances]


def _run(audit: StepAudit, private: PrivateImages, secret: FrozenGenerator, pair: Neighbours) -> list[Tensor]:
    """Everything that the trainer holds after its steps, as tensors."""
    scale = torch.ones(len(private))
    scale[pair.num_others :] = pair.loss_scale
    trainer = audit.build(private, secret, loss_scale=scale)
    gradients = watch_gradients(trainer)
    for _ in range(_RECORDED_STEPS):
        trainer.step()
    return [*gradients, *_tensors(trainer), torch.tensor(trainer.lr_scheduler.get_last_lr())]


def _tensors(trainer: DPTrainer) -> list[Tensor]:
    named = [tensor for group in trainer.state().values() for tensor in group.values()]
    return [tensor.detach().clone() for tensor in (*named, *trainer.unet.buffers())]


def _sensitivity(audit: StepAudit, replays: Sequence[_StepReplay]) -> Finding:
    def excess(replay: _StepReplay) -> float:
        return max(replay.distances()) / (replay.pair.distance * audit.bound)

    worst = max(replays, key=excess)
    return Finding(
        f"DP-SGD: one {audit.unit} moves the gradient sum by at most C, twice that where it is replaced",
        holds=excess(worst) <= 1 + TOLERANCE,
        measured=f"{excess(worst):.6f} of it ({worst.pair.name})",
        allowed=f"at most 1 + {TOLERANCE:g}",
        power=f"{len(replays)} replays of {_RECORDED_STEPS} steps on neighbours; catches any excess, with certainty",
    )


def _sameness(replays: Sequence[_StepReplay]) -> Finding:
    different = [replay.pair.name for replay in replays if not _are_equal(*replay.states)]
    seen = f" (not: {different[0]})" if different else ""
    return Finding(
        "DP-SGD: with equal noised sums, gradients, weights, averages and moments are equal",
        holds=not different,
        measured=f"{len(replays) - len(different)} of {len(replays)} pairs{seen}",
        allowed="all, to the last bit",
        power="catches a divisor, a skipped step or a buffer that depends on the images, with certainty",
    )


def _are_equal(state: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    if len(state) != len(other) or not all(tensor.isfinite().all() for tensor in state):
        return False
    return all(torch.equal(tensor, twin) for tensor, twin in zip(state, other))


def _requests(audit: StepAudit, replays: Sequence[_StepReplay]) -> Finding:
    """One mask at the charged rate and one noise of the charged size in each step, on every dataset."""
    std, rate = audit.event.noise_multiplier * audit.bound, audit.event.sample_rate
    generators = [generator for replay in replays for generator in (replay.first, replay.second)]
    good = [
        generator.stds == [std] * _RECORDED_STEPS and generator.rates == [rate] * _RECORDED_STEPS
        for generator in generators
    ]
    return Finding(
        "DP-SGD: each step draws one mask and one noise, with the sample rate and the size that are charged",
        holds=all(good),
        measured=f"{sum(good)} of {len(good)} runs",
        allowed="all, to the last digit",
        power="catches any difference, with certainty",
    )


def audit_one_step(audit: StepAudit) -> Iterator[Finding]:
    """Tests what happens around the sum: physical batches, the divisor, the weights and their average."""
    split, whole = (_one_step(audit.with_physical_batches_of(size)) for size in (1, 100))
    same = len(split.secret.sums) == len(whole.secret.sums) == 1
    error = (split.secret.sums[0] - whole.secret.sums[0]).norm().item() / audit.bound if same else math.inf
    yield Finding(
        "DP-SGD: physical batches change nothing: noise comes once, after the last of them",
        holds=error <= TOLERANCE,
        measured=f"sums differ by {error:.1e} C",
        allowed=f"at most {TOLERANCE:g} C",
        power="batches of one image against all at once; catches noise or a division per batch, with certainty",
    )
    error, output = math.inf, torch.cat([o.double().flatten() for o in whole.secret.outputs[:1]] or [torch.zeros(0)])
    if output.shape == whole.gradients[0].shape:
        error = ((whole.gradients[0].double() * audit.divisor - output).norm() / output.norm()).item()
    yield Finding(
        "DP-SGD: the weights are updated with the noised sum over the public divisor",
        holds=error <= 1e-6,
        measured=f"relative difference {error:.1e}",
        allowed="at most 1e-06",
        power="catches a division by the number of images that were drawn, with certainty",
    )
    still = _one_step(audit, apply=False)
    moved = [tensor for tensor, before in zip(still.after, still.before) if not torch.equal(tensor, before)]
    yield Finding(
        "DP-SGD: nothing but the noised sum moves weights, buffers or averages",
        holds=not moved,
        measured=f"{len(moved)} of {len(still.after)} tensors moved in a step whose noised sum was taken away",
        allowed="none",
        power="catches a parameter outside of the optimizer and a buffer that sees images, with certainty",
    )
    if audit.config.dp_sgd.trainable != "all":
        yield _frozen(split)
    error = max(_average_error(split), _average_error(whole))
    yield Finding(
        "DP-SGD: the average is one of noised weights, updated once per step",
        holds=error <= 1e-6 and split.trainer.ema.optimization_step == 1,
        measured=f"difference {error:.1e} after {split.trainer.ema.optimization_step} update",
        allowed="at most 1e-06 after 1 update",
        power="catches an average that is taken before the noise or once per physical batch, with certainty",
    )


@dataclass
class _OneStep:
    trainer: DPTrainer
    secret: FrozenGenerator
    gradients: list[Tensor]
    before: list[Tensor]
    after: list[Tensor]
    named_before: dict[str, Tensor]


def _one_step(audit: StepAudit, *, apply: bool = True) -> _OneStep:
    secret = FrozenGenerator()
    trainer = audit.build(audit.images(6), secret)
    gradients, before = watch_gradients(trainer, apply=apply), _weights(trainer)
    named = {name: parameter.detach().clone() for name, parameter in trainer.unet.named_parameters()}
    trainer.step()
    return _OneStep(trainer, secret, gradients, before, _weights(trainer), named)


def _weights(trainer: DPTrainer) -> list[Tensor]:
    """Weights that are trained, then those that are frozen, the buffers and the averages."""
    frozen = [parameter for parameter in trainer.unet.parameters() if not parameter.requires_grad]
    tensors = (*trainer.trained, *frozen, *trainer.unet.buffers(), *trainer.ema.shadow_params)
    return [tensor.detach().clone() for tensor in tensors]


def _frozen(step: _OneStep) -> Finding:
    """Looks at the weights that are to stay: by rules of its own, not by what the trainer says it freezes."""
    kind = step.trainer.config.dp_sgd.trainable
    after = dict(step.trainer.unet.named_parameters())
    stay = [name for name, value in step.named_before.items() if not _may_move(name, value, kind)]
    moved = [name for name in stay if not torch.equal(after[name], step.named_before[name])]
    return Finding(
        "DP-SGD: weights that are not trained stay what they were, to the last bit",
        holds=bool(stay) and not moved,
        measured=f"{len(moved)} of {len(stay)} tensors moved" + (f" ({moved[0]})" if moved else ""),
        allowed="none",
        power="catches a frozen weight that learns or gets noise, with certainty",
    )


def _may_move(name: str, value: Tensor, kind: str) -> bool:
    if name.startswith("class_embedding."):
        return True
    if kind == "lora":
        return ".lora_A." in name or ".lora_B." in name
    return ".attentions." in name if kind == "attention" else value.ndim == 1


def _average_error(step: _OneStep) -> float:
    """Deviation of the averages after one step from decay times the earlier ones, the rest the noised weights."""
    count, decay = len(step.trainer.ema.shadow_params), step.trainer.ema.cur_decay_value
    weights, averages, before = step.after[:count], step.after[-count:], step.before[-count:]
    if decay is None:
        return math.inf
    expected = [decay * old + (1 - decay) * weight for old, weight in zip(before, weights)]
    return max((average - value).abs().max().item() for average, value in zip(averages, expected))


class _PaidGenerator(FrozenGenerator):
    """Notes at each release how many steps are charged that have not been taken."""

    def __init__(self, ledger: PrivacyLedger) -> None:
        super().__init__()
        self.ledger = ledger
        self.ahead: list[int] = []

    @property
    def charged(self) -> int:
        return charged_steps(self.ledger, DP_SGD)

    def release(self, number: int, before: Tensor, result: Tensor) -> Tensor:
        self.ahead.append(self.charged - len(self.outputs))
        return super().release(number, before, result)


def audit_charges(audit: StepAudit) -> Finding:
    """Takes some steps as a run does, all of them on empty draws, and compares them with what was charged before."""
    options = {"num_dp_steps": _CHARGED_STEPS, "checkpointing_steps": _BLOCK, "sample_steps": 0}
    config, nobody = audit.config.replace(**options), audit.images(0)
    mechanism = PlannedMechanism(DP_SGD, audit.bound, replace(audit.event, num_steps=_CHARGED_STEPS))
    with tempfile.TemporaryDirectory() as scratch, PrivacyLedger.open(Path(scratch) / "ledger.jsonl") as ledger:
        folder, secret = RunFolder(Path(scratch)), _PaidGenerator(ledger)
        trainer = replace(audit, config=config).build(nobody, secret)
        gradients = watch_gradients(trainer)
        run = Run(
            config=config,
            folder=folder,
            accelerator=make_accelerator(config, folder),
            private=nobody,
            plan=BudgetPlan((), mechanism, round(audit.divisor / audit.event.sample_rate), audit.num_classes),
            ledger=ledger,
            secret=secret,
            generator=torch.Generator(),
            unet=trainer.unet,
        )
        stages.take_noisy_steps(run, trainer, mechanism, _CHARGED_STEPS)
        charged = secret.charged
    numbers = {
        "taken": trainer.num_steps_taken,
        "charged": charged,
        "released": len(secret.outputs),
        "noises": len(secret.stds),
        "masks": len(secret.rates),
        "updates": len(gradients),
    }
    is_paid = bool(secret.ahead) and min(secret.ahead) >= 1
    is_noise = set(secret.stds) == {audit.event.noise_multiplier * audit.bound}
    is_whole = set(numbers.values()) == {_CHARGED_STEPS}
    measured = ", ".join(f"{count} {name}" for name, count in numbers.items())
    return Finding(
        "DP-SGD: every step is charged before its noise is drawn; an empty draw is a step",
        holds=is_whole and is_paid and is_noise,
        measured=measured if is_paid else f"{measured}; released before it was charged",
        allowed=f"{_CHARGED_STEPS} of each",
        power="no image is ever drawn; catches a skipped, free or late charged step, with certainty",
    )
