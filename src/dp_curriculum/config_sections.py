"""Sections of a configuration: frozen dataclasses of public constants, with their defaults, help and limits.

Every field is public information: nothing here may be derived from the pixels or labels of the private images. A field
name is unique over all sections, because it is also the name of the command-line flag. `RuntimeConfig` holds what
cannot change the mechanism; everything else describes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from dp_curriculum.privacy import limits
from dp_curriculum.privacy.limits import Range


ADJACENCIES = ("add-or-remove-one", "replace-one")
# Share of the budget for lessons that a network is pretrained on, and for moments in closed form, which it need not
# learn: measured on the embedded digits, and on MNIST at epsilon 1.
DEFAULT_LESSON_SHARE, DEFAULT_CLOSED_FORM_SHARE = 0.05, 0.2
DEFAULT_LORA_RANK = 4
DIGITS = "digits"  # name of the embedded dataset
LATENT_BOUND = 4.0  # values of latents are clamped to this, in the standard deviations that an autoencoder states
NO_IMAGES = "none"  # in place of the name of a private dataset, where public images are all there is
CHANNELS_NEEDED = "Expected --num_channels to be given: type --num_channels 3 for colour images, or 1 for grey ones."


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises the one form of message for a wrong value: which value it is, and what was expected."""
    if not condition:
        raise ValueError(f"Expected --{name}={value} {expected}.")


def _require_range(section: Any, allowed: Range, *names: str) -> None:
    """Requires constants of the guarantee to lie in `allowed`; `None` stands for one that follows from others."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value in allowed, name, value, f"in {allowed}, the range in which it was tested")


def _require_positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(value > 0 and math.isfinite(value), name, value, "to be positive and finite")


def _require_at_least(section: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(value >= minimum and math.isfinite(value), name, value, f"to be at least {minimum}")


def _require_finite(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(math.isfinite(value), name, value, "to be finite")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Location of the private images, and the public shape that they are brought to."""

    _argument_group_name = "data"

    dataset_name: str = _option(
        DIGITS, "Hub id, local folder, 'digits' (embedded, real handwritten digits), or 'none' with --stages public, "
        "for a model of public images alone."
    )  # fmt: skip
    dataset_config_name: str | None = _option(None, "Configuration of the dataset, if it has several.")
    train_data_dir: str | None = _option(None, "Folder of images with one sub-folder per class (imagefolder layout).")
    dataset_split: str = _option("train", "Split that holds the private images.")
    image_column: str | None = _option(None, "Column of the images. Found by its feature type if unset.")
    label_column: str | None = _option(
        None, "Column of the classes. Found by its type if unset; 'none' uses no labels."
    )
    resolution: int = _option(28, "Images are resized to this many pixels per side.")
    num_channels: int | None = _option(
        None, "1 for grey, 3 for colour. Images of another mode are converted. Needed for your own images, unless the "
        "type of their column says it."
    )  # fmt: skip
    num_classes: int | None = _option(None, "Number of classes. Taken from the label names if the dataset has them.")
    class_names: list[str] = _option(
        [], "Names of all classes, in the order of their indices. Needed if the labels are text or bare numbers."
    )
    intensity_range: list[float] = _option(
        [], "Values of black and white in images of more than 8 bits, for example 0 4095 for a 12-bit scanner."
    )
    alpha_background: float = _option(1.0, "Grey level behind transparent pixels: 0 is black, 1 is white.")
    background_level: float = _option(
        0.5, "Grey level that lessons subtract before clipping. Use 0 if most pixels are black, as in digits."
    )
    image_root: str | None = _option(
        None, "Folder in which rows of a table or dataset may name image files. Defaults to the dataset's folder."
    )
    holdout: float | None = _option(
        None, "Share of the images (or persons) that training never reads, drawn in secret, for `evaluate`. For "
        "example 0.1."
    )  # fmt: skip
    person_column: str | None = _option(
        None, "Column that says whose image it is, as text or whole numbers. The guarantee is then for a person with "
        "all their images, however many. A row without a value contributes nothing."
    )  # fmt: skip
    person_from: Literal["folder"] | None = _option(
        None, "folder: each person has a folder, class/person/image.png, or person/image.png with --label_column "
        "none. The guarantee is then for a person."
    )  # fmt: skip

    def __post_init__(self) -> None:
        require(self.resolution >= 4, "resolution", self.resolution, "to be at least 4")
        require(self.num_channels in (None, 1, 3), "num_channels", self.num_channels, "to be 1 or 3")
        if self.holdout is not None:
            require(0 < self.holdout < 1, "holdout", self.holdout, "to be between 0 and 1, for example 0.1")
        require(self.person_from in (None, "folder"), "person_from", self.person_from, "to be folder")
        both = self.person_column is not None and self.person_from is not None
        require(not both, "person_column", self.person_column, "to come without --person_from: name persons once")
        if self.num_classes is not None:
            require(self.num_classes >= 1, "num_classes", self.num_classes, "to be at least 1")
        names = self.class_names
        require(len(set(names)) == len(names) and "" not in names, "class_names", names, "to be different names")
        require(
            not names or self.num_classes in (None, len(names)),
            "num_classes",
            self.num_classes,
            f"to match the {len(names)} names of --class_names",
        )
        ends = self.intensity_range
        ordered = len(ends) == 2 and all(map(math.isfinite, ends)) and ends[0] < ends[1]
        require(not ends or ordered, "intensity_range", ends, "to be two numbers, black before white")
        require(0 <= self.alpha_background <= 1, "alpha_background", self.alpha_background, "in [0, 1]")
        require(0 <= self.background_level <= 1, "background_level", self.background_level, "in [0, 1]")

    @property
    def unit(self) -> Literal["image", "person"]:
        """Unit of the guarantee: one of these is added, removed or replaced."""
        return "image" if self.person_column is None and self.person_from is None else "person"

    @property
    def is_embedded(self) -> bool:
        """True if no images are named: the embedded digits are meant."""
        return self.dataset_name == DIGITS and self.train_data_dir is None

    @property
    def has_no_images(self) -> bool:
        """True if there are no private images: public ones are all that is trained on."""
        return self.dataset_name == NO_IMAGES and self.train_data_dir is None

    @property
    def channels(self) -> int:
        """Channels of the images, as declared; the embedded digits are grey."""
        if self.num_channels is None and not self.is_embedded:
            raise ValueError(CHANNELS_NEEDED)
        return self.num_channels or 1

    def training_size(self, num_images: int) -> int:
        """
        Number of images that the accounting assumes, out of `num_images`. It is a constant: those that are held out
        are not counted, because their true number is a draw.
        """
        return num_images if self.holdout is None else max(1, round((1 - self.holdout) * num_images))


@dataclass(frozen=True, kw_only=True)
class PrivacyBudget:
    """The privacy guarantee: (epsilon, delta) for one image, or for one person, all stages together."""

    _argument_group_name = "privacy budget"

    target_epsilon: float = _option(10.0, "Epsilon that all stages together may spend.")
    target_delta: float = _option(
        1e-5,
        "Delta: probability that the epsilon bound does not hold. Choose it below 1 / number of images (or persons).",
    )
    adjacency: Literal["add-or-remove-one", "replace-one"] = _option(
        "add-or-remove-one", "Datasets that count as neighbours. replace-one roughly doubles epsilon."
    )
    group_size: int = _option(
        1, "Number of units that the guarantee is for together: images of one person, or persons of one family. It "
        "takes much more noise; for a person with several images, --person_column takes none."
    )  # fmt: skip
    public_dataset_size: int | None = _option(
        None, "Number of images, or of persons with --person_column, if it is public. If unset, the true number is "
        "used, and disclosed on the card."
    )  # fmt: skip
    lesson_budget_share: float | None = _option(
        None, "Fraction of the privacy budget spent on all lessons together, split equally over their queries. "
        "Defaults to 0.2 with moments in closed form and 0.05 otherwise, and to all of it where no dp_sgd follows."
    )  # fmt: skip
    lesson_noise_multiplier: float | None = _option(
        None, "Noise standard deviation over sensitivity for each lesson query. Replaces --lesson_budget_share."
    )
    non_private: bool = _option(
        False, "Run DP-SGD without noise, as a baseline. Lessons keep their noise. The card is stamped NOT PRIVATE."
    )

    def __post_init__(self) -> None:
        _require_range(self, limits.TARGET_EPSILON, "target_epsilon")
        _require_range(self, limits.DELTA, "target_delta")
        require(self.adjacency in ADJACENCIES, "adjacency", self.adjacency, f"to be one of {ADJACENCIES}")
        _require_range(self, limits.GROUP_SIZE, "group_size")
        _require_range(self, limits.DATASET_SIZE, "public_dataset_size")
        _require_range(self, limits.NOISE_MULTIPLIER, "lesson_noise_multiplier")
        share = self.lesson_budget_share
        require(share is None or 0 < share < 1, "lesson_budget_share", share, "to be between 0 and 1")
        require(
            share is None or self.lesson_noise_multiplier is None,
            "lesson_budget_share",
            share,
            f"to come without --lesson_noise_multiplier={self.lesson_noise_multiplier}: one follows from the other",
        )


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """The curriculum: stages of training, from easy to hard."""

    _argument_group_name = "curriculum"

    stages: list[str] = _option(
        ["moments", "dp_sgd"], "Stages in order: lessons (public, mean, mode, moments, frequency), then dp_sgd."
    )
    mix_lessons: bool = _option(
        False, "Teach all lessons at once, with equal shares of each batch, instead of one after another."
    )
    shortcut: Literal["closed_form", "pretrain"] | None = _option(
        None,
        "How the moments are learned. closed_form: exactly, as a prior under the network, without training; it needs "
        "moments as the first stage and at most 12,288 values per image. pretrain: the network is trained on images "
        "with these moments. Default: closed_form where it can be.",
    )

    def __post_init__(self) -> None:
        require(len(self.stages) > 0, "stages", self.stages, "to name at least one stage: nothing would train")
        require(len(set(self.stages)) == len(self.stages), "stages", self.stages, "to name each stage once")
        late = "dp_sgd" in self.stages[:-1]
        require(not late, "stages", self.stages, "to end with dp_sgd: lessons come before the hard stage")
        ways = ("closed_form", "pretrain")
        require(self.shortcut in (None, *ways), "shortcut", self.shortcut, f"to be one of {ways}")
        first = self.stages[0] == "moments"
        require(
            first or self.shortcut != "closed_form",
            "stages",
            self.stages,
            "to begin with moments: --shortcut=closed_form needs it",
        )

    @property
    def lessons(self) -> list[str]:
        """The stages of the easy part, in order."""
        return [stage for stage in self.stages if stage != "dp_sgd"]


@dataclass(frozen=True, kw_only=True)
class LessonsConfig:
    """The queries of the lessons: mean and mode (DP-FETA), moments, and frequency (FETA-Pro, arXiv 2601.06368)."""

    _argument_group_name = "easy stage: lessons"

    lesson_resolution: int | None = _option(
        None, "Side, in pixels, of the small images that lessons query. Defaults to half of --resolution for mean and "
        "mode, and to --resolution but at most 32 for frequency. Moments are taken at --resolution."
    )  # fmt: skip
    lesson_max_image_norm: float | None = _option(
        None, "L2 clipping norm of a centred image (mean, mode, moments). Default: the largest possible norm."
    )
    moment_max_residual_norm: float | None = _option(
        None,
        "L2 clipping norm of an image minus its class mean (moments). Defaults to 0.1 * sqrt(values per image).",
    )
    moment_components: int = _option(
        1, "Gaussians per class that moments in closed form draw from, where sampling starts. More than 1 take a "
        "third query, which pays at a large budget. For images of at most 1,024 values."
    )  # fmt: skip
    central_images_per_class: int = _option(1, "Central images released per class, each from a separate sample.")
    central_sample_rate: float = _option(1.0, "Probability that an image enters such a sample. 1 takes all images.")
    central_post_process: bool = _option(True, "Apply a median filter to central images, and sharpen them.")
    frequency_length_scale: float | None = _option(
        None, "Largest kernel length scale, as an L2 distance between images. Default: 0.37 * sqrt(values per image)."
    )

    def __post_init__(self) -> None:
        _require_range(self, limits.NUM_STEPS, "central_images_per_class")
        _require_range(self, limits.SAMPLE_RATE, "central_sample_rate")
        _require_range(self, limits.CLIP_NORM, "lesson_max_image_norm")
        _require_range(self, limits.RESIDUAL_NORM, "moment_max_residual_norm")
        _require_range(self, limits.MOMENT_COMPONENTS, "moment_components")
        if self.lesson_resolution is not None:
            _require_at_least(self, 1, "lesson_resolution")
        if self.frequency_length_scale is not None:
            _require_positive(self, "frequency_length_scale")


@dataclass(frozen=True, kw_only=True)
class PublicImagesConfig:
    """Stage `public`: images that anybody may see. It reads nothing private and spends nothing."""

    _argument_group_name = "easy stage: public images"

    pretrain_dataset_name: str | None = _option(None, "Hub id or local folder of the public images.")
    pretrain_dataset_config_name: str | None = _option(None, "Configuration of that dataset, if it has several.")
    pretrain_dataset_split: str = _option("train", "Split of that dataset.")
    pretrain_dataset_matching: Literal["moments", "none"] | None = _option(
        None, "What becomes of public images of other classes after the lesson moments. moments: each class learns "
        "those that suit it best, moved to its released moments. none: all are learned as they are, without a class. "
        "Default: moments for photos on a prior."
    )  # fmt: skip

    def __post_init__(self) -> None:
        way = self.pretrain_dataset_matching
        require(way in (None, "moments", "none"), "pretrain_dataset_matching", way, "to be moments or none")


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """A public model, which never saw the private images, whose network takes the place of random weights."""

    _argument_group_name = "start: pretrained weights"

    pretrained_model_name_or_path: str | None = _option(
        None, "Hub id or folder of a model of this package, of a DDPM pipeline, or of a UNet2DModel with its "
        "scheduler. Its network takes the place of the options under `model`."
    )  # fmt: skip
    revision: str | None = _option(
        None, "Branch, tag or commit on the Hub; of a folder, the sha256 that it has to have. A run keeps the commit "
        "or sha256 that it began with."
    )  # fmt: skip
    subfolder: str | None = _option(None, "Folder within the model, if it is not at its root.")

    def __post_init__(self) -> None:
        for name in ("revision", "subfolder"):
            value, named = getattr(self, name), self.pretrained_model_name_or_path is not None
            require(value is None or named, name, value, "to come with --pretrained_model_name_or_path")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """A public autoencoder, which never saw the private images: its latents of them are what is trained on."""

    _argument_group_name = "latents: a public autoencoder"

    vae_name_or_path: str | None = _option(
        None, "Hub id or folder of an AutoencoderKL, or of a pipeline with one. Each image is encoded by itself, and "
        "lessons and network work on its latents; for images of 128 to 512 pixels."
    )  # fmt: skip
    vae_revision: str | None = _option(
        None, "Branch, tag or commit on the Hub; of a folder, the sha256 that it has to have. A run keeps the commit "
        "or sha256 that it began with."
    )  # fmt: skip
    vae_subfolder: str | None = _option(None, "Folder within it. Defaults to vae, if there is one, or its root.")
    vae_latent_channels: int | None = _option(
        None, "Channels of its latents. Read from the autoencoder; need not be given."
    )
    vae_downsampling: int | None = _option(
        None, "Pixels of an image per place of its latents and side. Read from the autoencoder; need not be given."
    )

    def __post_init__(self) -> None:
        for name in ("vae_revision", "vae_subfolder", "vae_latent_channels", "vae_downsampling"):
            value, named = getattr(self, name), self.vae_name_or_path is not None
            require(value is None or named, name, value, "to come with --vae_name_or_path")
        for name in ("vae_latent_channels", "vae_downsampling"):
            if getattr(self, name) is not None:
                _require_at_least(self, 1, name)

    @property
    def is_settled(self) -> bool:
        """True if the shape of the latents is known, or there are none."""
        known = self.vae_latent_channels is not None and self.vae_downsampling is not None
        return self.vae_name_or_path is None or known


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stock diffusers `UNet2DModel` under EDM preconditioning (Karras et al. 2022, arXiv 2206.00364)."""

    _argument_group_name = "model"

    block_out_channels: list[int] = _option([32, 64], "Channels of each resolution, from fine to coarse.")
    layers_per_block: int = _option(1, "Residual blocks at each resolution.")
    patch_size: int = _option(
        1, "Side of the patches of pixels that are one place of the network: 1, 2 or 4. 2 is about twice as fast."
    )
    attention_resolutions: list[int] = _option(
        [], "Feature map sizes with self-attention. The middle block always has it."
    )
    resnet_time_scale_shift: Literal["default", "scale_shift"] = _option(
        "scale_shift",
        "How noise level and class enter a block. scale_shift scales and shifts the features; default adds to them.",
    )
    label_dropout: float = _option(
        0.1, "Probability that a label is withheld in training, so that images can be sampled with guidance."
    )

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "layers_per_block")
        require(self.patch_size in (1, 2, 4), "patch_size", self.patch_size, "to be 1, 2 or 4")
        ways = ("default", "scale_shift")
        shift = self.resnet_time_scale_shift
        require(shift in ways, "resnet_time_scale_shift", shift, f"to be one of {ways}")
        require(len(self.block_out_channels) > 0, "block_out_channels", self.block_out_channels, "to be non-empty")
        positive = all(channels > 0 for channels in self.block_out_channels)
        require(positive, "block_out_channels", self.block_out_channels, "to be positive numbers of channels")
        require(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "in [0, 1)")

    @property
    def norm_num_groups(self) -> int:
        """Groups of each GroupNorm: as many as divide all channels, at most 16, with two channels or more in each."""
        common = math.gcd(*self.block_out_channels)
        return max(groups for groups in range(1, 17) if groups == 1 or common % groups == 0 and 2 * groups <= common)

    @property
    def attention_head_dim(self) -> int:
        """Channels per attention head: 32, or the smallest number of attending channels if that is less."""
        attending = self.block_out_channels if self.attention_resolutions else self.block_out_channels[-1:]
        return min(32, *attending)

    @property
    def total_downsampling(self) -> int:
        """Factor by which the coarsest features are smaller than the image; it must divide the resolution."""
        return int(self.patch_size * 2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Training on the images of the lessons. It is post-processing of a released value, and spends nothing."""

    _argument_group_name = "easy stage: pretraining"

    pretrain_steps: int = _option(
        1000, "Optimizer steps per lesson. 0 trains nothing: a prior then draws its own images."
    )  # fmt: skip
    pretrain_patience: int | None = _option(
        None, "Stop a lesson after this many checks (one every 50 steps) without a lower loss. Off by default."
    )
    pretrain_batch_size: int = _option(64, "Images per step.")
    pretrain_learning_rate: float = _option(3e-4, "Learning rate of Adam.")
    pretrain_p_mean: float = _option(-1.2, "Mean of ln(sigma), EDM Table 1.")
    augmentation: Literal["none", "shift", "affine"] = _option(
        "affine",
        "Random changes to each image. affine: rotations up to 10 degrees, shifts up to 0.08 of a side, scaling up to "
        "0.1, shear up to 0.1. shift: shifts up to 0.03 of a side, scaling up to 0.05.",
    )
    augment_flip: bool = _option(False, "Mirror images left to right. Wrong for digits and letters.")

    def __post_init__(self) -> None:
        _require_at_least(self, 0, "pretrain_steps")
        _require_at_least(self, 1, "pretrain_batch_size")
        patience = self.pretrain_patience
        require(patience is None or patience > 0, "pretrain_patience", patience, "to be at least 1")
        _require_positive(self, "pretrain_learning_rate")
        _require_finite(self, "pretrain_p_mean")
        ways = ("none", "shift", "affine")
        require(self.augmentation in ways, "augmentation", self.augmentation, f"to be one of {ways}")


@dataclass(frozen=True, kw_only=True)
class DPSGDConfig:
    """The hard stage: DP-SGD on the images. Its noise multiplier follows from the budget and the other stages."""

    _argument_group_name = "hard stage: DP-SGD"

    num_dp_steps: int = _option(200, "Noisy optimizer steps.")
    expected_batch_size: int = _option(
        1024, "Mean number of images, or of persons, per step. Each enters by its own coin toss."
    )
    noise_multiplicity: int = _option(
        2, "K: noised copies of an image, or of images of a person, averaged into one gradient before clipping."
    )
    dp_max_grad_norm: float = _option(
        0.001, "C: L2 clipping norm of one image's gradient. Small, because with Adam only the direction counts."
    )
    dp_learning_rate: float = _option(1e-3, "Learning rate of Adam.")
    dp_warmup_steps: int = _option(
        0, "Steps over which the learning rate rises to its value. It is constant afterwards."
    )
    dp_ema_decay: float = _option(0.95, "Decay per noisy step of the average of the weights, with a warm-up.")
    dp_p_mean: float = _option(-1.2, "Mean of ln(sigma), EDM Table 1.")
    trainable: Literal["all", "lora", "attention", "bias_norm"] = _option(
        "all",
        "Weights that noisy steps train; lessons train all. lora: matrices of low rank beside frozen weights (peft). "
        "attention: the attention blocks. bias_norm: biases and normalization. Each with the class embedding.",
    )
    lora_rank: int | None = _option(None, "Rank of the matrices of --trainable lora. Defaults to 4.")
    lora_alpha: float | None = _option(
        None, "The matrices are scaled by lora_alpha over lora_rank. Defaults to the rank, a scale of 1."
    )
    lora_target_modules: list[str] = _option(
        [], "Ends of the names of the layers that get such matrices. Defaults to to_q, to_k, to_v and to_out.0 of the "
        "attention blocks, or to conv1 and conv2 in a network without attention."
    )  # fmt: skip

    def __post_init__(self) -> None:
        _require_at_least(self, 0, "dp_warmup_steps")
        _require_range(self, limits.NUM_STEPS, "num_dp_steps")
        _require_range(self, limits.DATASET_SIZE, "expected_batch_size")
        _require_range(self, limits.NOISE_MULTIPLICITY, "noise_multiplicity")
        _require_range(self, limits.CLIP_NORM, "dp_max_grad_norm")
        _require_positive(self, "dp_learning_rate")
        _require_finite(self, "dp_p_mean")
        require(0 <= self.dp_ema_decay < 1, "dp_ema_decay", self.dp_ema_decay, "in [0, 1)")
        ways = ("all", "lora", "attention", "bias_norm")
        require(self.trainable in ways, "trainable", self.trainable, f"to be one of {ways}")
        for name in ("lora_rank", "lora_alpha", "lora_target_modules"):
            value = getattr(self, name)
            used = self.trainable == "lora" or value in (None, [])
            require(used, name, value, f"to come with --trainable lora, not with --trainable {self.trainable}")
        if self.lora_rank is not None:
            _require_at_least(self, 1, "lora_rank")
        if self.lora_alpha is not None:
            _require_positive(self, "lora_alpha")

    @property
    def rank(self) -> int:
        """Rank of the matrices of LoRA."""
        return DEFAULT_LORA_RANK if self.lora_rank is None else self.lora_rank

    @property
    def lora_scale(self) -> float:
        """Factor of the product of the two matrices of a layer."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Defaults of the pipeline: EDM's stochastic Heun sampler (Karras et al. 2022, Algorithm 2)."""

    _argument_group_name = "sampler"

    num_inference_steps: int = _option(18, "Denoising steps. Each but the last calls the network twice.")
    guidance_scale: float = _option(1.0, "Scale of classifier-free guidance. 1 turns it off.")
    s_churn: float = _option(0.0, "Noise added back while sampling (S_churn of EDM).")

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "num_inference_steps")
        _require_at_least(self, 0, "guidance_scale", "s_churn")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Settings that cannot change the mechanism: memory, speed, logging, sharing."""

    _argument_group_name = "runtime"

    seed: int | None = _option(None, "Seed of initial weights, augmentation and samples. Never of DP noise or masks.")
    max_physical_batch_size: int | None = _option(
        None,
        "Network inputs (images x K) computed at once. A smaller number needs less memory. If unset: what fits on a "
        "GPU, 128 on a CPU.",
    )
    per_image_gradients: Literal["auto", "materialize", "norms_first"] = _option(
        "auto",
        "materialize: hold one gradient per image. norms_first: less memory, more time. auto: choose by memory.",
    )
    gradient_memory_limit: int | None = _option(
        None,
        "MiB of per-image gradients above which auto switches to norms_first. If unset: a quarter of a GPU, 2048 on a "
        "CPU.",
    )
    cpu_threads: int | None = _option(
        None,
        "Threads per process on a CPU. If unset: the cores that it may use, shared among the processes of a launch, "
        "or fewer if those are faster.",
    )
    mixed_precision: Literal["no", "bf16"] | None = _option(
        None,
        "no or bf16. bf16 is faster on recent hardware; float32 is used where it would be slower. Defaults to the "
        "setting of accelerate launch.",
    )
    secret_randomness: Literal["auto", "secure", "fast"] = _option(
        "auto", "secure: ChaCha20 noise in float64. fast: the device's generator. auto: fast on a GPU, else secure."
    )
    dataset_ledger: str | None = _option(
        None,
        "Ledger of the dataset, made with `dp-curriculum budget create`. The run reserves in it before it spends, and "
        "is refused where all runs together would exceed its budget.",
    )
    checkpointing_steps: int = _option(
        50, "Noisy steps between checkpoints. Privacy is reserved in blocks of the same size."
    )
    checkpoints_total_limit: int = _option(2, "Number of checkpoints to keep.")
    sample_steps: int = _option(50, "Noisy steps between sample sheets. 0 turns them off.")
    report_to: str = _option(
        "none", "Tracker to log to: tensorboard, wandb, trackio, ..., all (every installed one) or none."
    )
    push_to_hub: bool = _option(False, "Push the finished pipeline to the Hub.")
    hub_model_id: str | None = _option(None, "Repository to push to. Defaults to the name of --output_dir.")
    public: bool = _option(False, "Make a new repository public. It is private by default.")

    def __post_init__(self) -> None:
        require(
            self.mixed_precision in (None, "no", "bf16"),
            "mixed_precision",
            self.mixed_precision,
            "to be no or bf16: the loss scaling of fp16 breaks the clipping bound",
        )
        require(
            self.per_image_gradients in ("auto", "materialize", "norms_first"),
            "per_image_gradients",
            self.per_image_gradients,
            "to be auto, materialize or norms_first",
        )
        modes = ("auto", "secure", "fast")
        require(self.secret_randomness in modes, "secret_randomness", self.secret_randomness, f"to be one of {modes}")
        _require_at_least(self, 1, "checkpointing_steps", "checkpoints_total_limit")
        _require_at_least(self, 0, "sample_steps")
        if self.cpu_threads is not None:
            _require_at_least(self, 1, "cpu_threads")
        if self.max_physical_batch_size is not None:
            _require_at_least(self, 1, "max_physical_batch_size")
        if self.gradient_memory_limit is not None:
            _require_at_least(self, 0, "gradient_memory_limit")
