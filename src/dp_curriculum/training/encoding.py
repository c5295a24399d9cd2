"""The public autoencoder of a run: found, checked, pinned to a revision; each private image is encoded by it, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import NO_CONTRIBUTION, PrivateImages
from dp_curriculum.diffusion.autoencoder import LatentSpace, PretrainedAutoencoder, check_image_channels
from dp_curriculum.runtime.alive import shown_alive
from dp_curriculum.runtime.processes import from_main, get_logger, jointly
from dp_curriculum.sharing.model_card import LOCAL_FOLDER
from dp_curriculum.sharing.model_source import AUTOENCODER, open_source
from dp_curriculum.sharing.starting_words import NAMES_THE_DATASET, autoencoder_weights
from dp_curriculum.training.run import broadcast_weights
from dp_curriculum.training.starting import names_dataset, warning_of_name


logger = get_logger(__name__)


@dataclass(frozen=True)
class Encoder:
    """
    A public autoencoder that a run encodes its images with.

    Args:
        model ([`PretrainedAutoencoder`]): What its files say.
        facts (`Mapping[str, str]`): What the report says of it, among the public data.
        warnings (`tuple[str, ...]`): What the owner of the images should hear before anything is spent.
    """

    model: PretrainedAutoencoder
    facts: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def check_channels(self, config: CurriculumConfig) -> None:
        """Refuses images of other channels, once they are settled."""
        check_image_channels(config, self.model)

    def describe(self, config: CurriculumConfig) -> str:
        """A line that says what is loaded."""
        shape = "x".join(map(str, config.input_shape))
        return (
            f"autoencoder: {self.model.label}, revision {self.facts['revision']}, licence {self.facts['license']}; "
            f"each image is encoded by itself, to latents of {shape}"
        )

    def blank(self, device: torch.device | str = "cpu") -> LatentSpace:
        """The autoencoder with random weights, which takes the time and the memory of the true one."""
        with torch.random.fork_rng(devices=[]):
            return LatentSpace(self.model.build().to(device))

    def open(self, config: CurriculumConfig, accelerator: Accelerator) -> LatentSpace:
        """
        The autoencoder on the device of each process, tried on a public picture.

        Raises:
            ValueError: If its weights are not there, damaged, or make no numbers.
        """
        space = self.blank()
        from_main(accelerator, lambda: space.vae.load_state_dict(self.model.load().state_dict()))
        space.vae.to(accelerator.device)
        broadcast_weights(space.vae, accelerator)
        jointly(accelerator, lambda: space.check(config.data.resolution, self.model.label))
        return space


def settle_autoencoder(
    config: CurriculumConfig, *, has_weights: bool = True
) -> tuple[CurriculumConfig, Encoder | None]:
    r"""
    Opens the autoencoder that a configuration names, and settles the options that follow from it.

    The configuration that is returned has the shape of its latents, and the commit of the Hub or the sha256 of a
    folder as its `vae_revision`: a resumed run that finds another one is refused, as for any changed option. Lesson
    images are then neither moved nor sharpened, which is for pixels.

    Args:
        config ([`CurriculumConfig`]): The configuration.
        has_weights (`bool`, *optional*, defaults to `True`): Whether the weights are needed; a plan needs none.

    Raises:
        ValueError: If there is no such model, it is no autoencoder to use, or an option contradicts it; nothing is
            spent.
    """
    options = config.autoencoder
    if options.vae_name_or_path is None:
        return config, None
    source = open_source(
        options.vae_name_or_path,
        AUTOENCODER,
        revision=options.vae_revision,
        subfolder=options.vae_subfolder,
        has_weights=has_weights,
    )
    found = {"vae_latent_channels": source.model.latent_channels, "vae_downsampling": source.model.downsampling}
    for name, value in found.items():
        if getattr(options, name) not in (None, value):
            raise ValueError(
                f"Expected --{name}={getattr(options, name)} to be left out: it is {value}, that of "
                f"{source.model.label}."
            )
    settled = config.replace(
        vae_name_or_path=source.name,
        vae_revision=source.revision,
        **found,
        augmentation="none",
        central_post_process=False,
    )
    if config.data.num_channels is not None:
        check_image_channels(settled, source.model)
    facts = autoencoder_weights(
        name=LOCAL_FOLDER if source.is_local else source.name, revision=source.revision, license=source.license
    )
    if not names_dataset(source, config.data):
        return settled, Encoder(source.model, facts)
    label = f"{AUTOENCODER.option}={source.name}"
    return settled, Encoder(source.model, {**facts, "warning": NAMES_THE_DATASET}, (warning_of_name(label),))


def encode_images(private: PrivateImages, space: LatentSpace, accelerator: Accelerator) -> PrivateImages:
    r"""
    Images as latents. Each process encodes a share of the rows, and gets those of the others.

    Args:
        private ([`PrivateImages`]): Images of pixels.
        space ([`LatentSpace`]): The autoencoder, on the device of this process.
        accelerator (`Accelerator`): Connects the processes.

    Privacy:
        A function of each row by itself: see [`LatentSpace`]. A row whose latents are no finite numbers becomes one
        that contributes nothing, without a message. Rows that contribute nothing are encoded like all others, so that
        the time it takes follows from the number of rows alone.
    """
    # Once, with neither a number nor a time: how many rows there are may be private, and terminals are logged.
    logger.info("encoding images")
    count, index = accelerator.num_processes, accelerator.process_index
    ends = [len(private) * process // count for process in range(count + 1)]
    own = private.images[ends[index] : ends[index + 1]]
    with shown_alive("encoding images"):
        latents, is_finite = jointly(accelerator, lambda: space.encode(own))
        if count > 1:
            sizes = [end - start for start, end in zip(ends, ends[1:])]
            latents, is_finite = (_gathered(part, sizes, accelerator) for part in (latents, is_finite.to(torch.uint8)))
    labels = torch.where(is_finite.bool(), private.labels, NO_CONTRIBUTION)
    return dataclasses.replace(private, images=latents, labels=labels)


def _gathered(part: torch.Tensor, sizes: list[int], accelerator: Accelerator) -> torch.Tensor:
    """The parts of all processes, one after the other, on the CPU of each."""
    parts = []
    for process, size in enumerate(sizes):
        mine = process == accelerator.process_index
        tensor = part if mine else torch.empty(size, *part.shape[1:], dtype=part.dtype)
        parts.append(broadcast(tensor.to(accelerator.device), from_process=process).cpu())
    return torch.cat(parts)
