"""Public autoencoders: latents of one image depend on that image alone, are bounded, and decode to it again; what is
no autoencoder is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoders import random_pixels, save_vae, tiny_vae
from diffusers import VQModel

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.config_sections import LATENT_BOUND
from dp_curriculum.diffusion.autoencoder import LatentSpace, check_image_channels, read_autoencoder
from dp_curriculum.pipeline_dp_curriculum import decode_latents
from dp_curriculum.sharing.model_source import AUTOENCODER, open_source


LABEL = "--vae_name_or_path=X"


# --- encoding ------------------------------------------------------------------------------------------------------


def depends_on_others(space: LatentSpace) -> bool:
    """True if the latents of an image are others beside other images: to the last bit."""
    images = random_pixels(6)
    together, _ = space.encode(images)
    alone = torch.cat([space.encode(image[None])[0] for image in images])
    fewer, _ = space.encode(images[1:])
    turned, _ = space.encode(images.flip(0))
    return not (
        torch.equal(together, alone) and torch.equal(together[1:], fewer) and torch.equal(together, turned.flip(0))
    )


class _WholeBatches(LatentSpace):
    """A twin that encodes all images at once, with the mean over them taken away."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.float() / 127.5 - 1
        scaled = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
        scaled = scaled - scaled.mean(0)
        return ((0.5 + scaled / (2 * LATENT_BOUND)).clamp(0, 1) * 255).round().to(torch.uint8), torch.ones(
            len(images)
        ) > 0


def test_the_latents_of_an_image_depend_on_that_image_alone_to_the_last_bit() -> None:
    assert not depends_on_others(LatentSpace(tiny_vae()))
    assert depends_on_others(_WholeBatches(tiny_vae())), "the test sees a mean over a batch"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"shift_factor": 0.3},
        {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0], "scaling_factor": 0.7},
        {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
    ],
    ids=["plain", "shift", "channels", "no convolutions"],
)
def test_latents_are_the_mean_of_the_posterior_on_its_scale(fields: dict[str, Any]) -> None:
    """Beside the formulas of diffusers' pipelines, image by image."""
    vae = tiny_vae(**fields)
    space, images = LatentSpace(vae), random_pixels(3)
    found, is_finite = space.encode(images)
    assert found.dtype == torch.uint8 and found.shape == (3, 4, 8, 8) and bool(is_finite.all())
    for image, latents in zip(images, found):
        mean = vae.encode(image[None] / 127.5 - 1).latent_dist.mean[0]
        if "latents_std" in fields:
            mean = (mean - torch.tensor(fields["latents_mean"]).view(4, 1, 1)) / torch.tensor(
                fields["latents_std"]
            ).view(4, 1, 1)
        scaled = (mean - fields.get("shift_factor", 0.0)) * vae.config.scaling_factor
        known = (latents / 127.5 - 1) * LATENT_BOUND
        assert (known - scaled.clamp(-LATENT_BOUND, LATENT_BOUND)).abs().max() <= LATENT_BOUND / 255 + 1e-5
    assert torch.equal(found, space.encode(images)[0]), "a mean, and no sample"


@pytest.mark.parametrize("fields", [{}, {"shift_factor": 0.3}])
def test_decoding_inverts_the_scale(fields: dict[str, Any]) -> None:
    vae = tiny_vae(**fields)
    space, images = LatentSpace(vae), random_pixels(5)
    latents, _ = space.encode(images)
    made = space.decode(latents / 255)
    assert made.shape == images.shape and made.dtype == torch.float32 and made.min() >= 0 and made.max() <= 1
    for image, kept, decoded in zip(images, latents, made):
        exact = (kept[None] / 127.5 - 1) * LATENT_BOUND / vae.config.scaling_factor + fields.get("shift_factor", 0.0)
        assert torch.allclose(decoded, (vae.decode(exact).sample / 2 + 0.5).clamp(0, 1)[0], atol=1e-5)
        posterior = vae.encode(image[None] / 127.5 - 1).latent_dist.mode()
        expected = (vae.decode(posterior).sample / 2 + 0.5).clamp(0, 1)[0]
        assert (decoded - expected).abs().mean() < 0.004, "bytes lose no more than those of pixels"


def test_few_images_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, sizes = tiny_vae(), list[int]()
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda latents: (sizes.append(len(latents)), decode(latents))[1])
    monkeypatch.setattr("dp_curriculum.pipeline_dp_curriculum._DECODED_PIXELS", 2 * 32 * 32)
    made = decode_latents(vae, torch.zeros(5, 4, 8, 8))
    assert sizes == [2, 2, 1] and made.shape == (5, 3, 32, 32)
    decode_latents(vae, torch.zeros(1, 4, 32, 32))
    assert sizes[-1] == 1, "one at least"


def test_latents_are_bounded_whatever_the_scale() -> None:
    found, is_finite = LatentSpace(tiny_vae(scaling_factor=1e4)).encode(random_pixels(2))
    assert bool(is_finite.all()) and float(((found == 0) | (found == 255)).float().mean()) > 0.9


def nan_for(vae: Any, image: torch.Tensor) -> Any:
    """The autoencoder with latents that are no numbers for one image."""
    encode = vae.encode

    def broken(pixels: torch.Tensor) -> Any:
        found = encode(pixels)
        if torch.equal(pixels[0], image / 127.5 - 1):
            found.latent_dist.mean[0, 0, 0, 0] = math.nan
        return found

    vae.encode = broken
    return vae


def test_a_row_without_finite_latents_is_marked_and_no_other_changes() -> None:
    images = random_pixels(4)
    whole, _ = LatentSpace(tiny_vae()).encode(images)
    found, is_finite = LatentSpace(nan_for(tiny_vae(), images[2])).encode(images)
    assert is_finite.tolist() == [True, True, False, True]
    assert torch.equal(found[is_finite], whole[is_finite]) and bool((found[2] == 128).all())


def test_an_autoencoder_that_makes_no_numbers_is_refused_before_it_is_used() -> None:
    LatentSpace(tiny_vae()).check(32, LABEL)
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e30)
        vae.encoder.conv_out.weight.mul_(1e30)
        vae.quant_conv.weight.mul_(1e30)
    with pytest.raises(ValueError, match="random pixels is not finite"):
        LatentSpace(vae).check(32, LABEL)
    vae = tiny_vae()
    vae.decode = lambda latents: type("Out", (), {"sample": torch.zeros(len(latents), 3, 16, 16)})()
    with pytest.raises(ValueError, match="images of 16 pixels of those of 32"):
        LatentSpace(vae).check(32, LABEL)


# --- its files -----------------------------------------------------------------------------------------------------


def test_an_autoencoder_is_found_alone_or_within_a_pipeline(tmp_path: Path) -> None:
    save_vae(tmp_path / "alone")
    save_vae(tmp_path / "pipeline" / "vae")
    for folder in (tmp_path / "alone", tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        found = read_autoencoder(folder, LABEL)
        assert (found.image_channels, found.latent_channels, found.downsampling) == (3, 4, 4)
    loaded = found.load()
    assert torch.equal(loaded.encoder.conv_in.weight, tiny_vae().encoder.conv_in.weight)
    source = open_source(str(tmp_path), AUTOENCODER, subfolder="pipeline/vae")
    assert source.revision == open_source(str(tmp_path / "alone"), AUTOENCODER).revision and len(source.revision) == 64


def edited(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"_class_name": "VQModel"},
            "its class is VQModel, whose latents are entries of a codebook. Name an AutoencoderKL",
        ),
        ({"_class_name": "AutoencoderTiny"}, "its class is AutoencoderTiny, which has no scale"),
        ({"_class_name": "UNet2DModel"}, "its class is UNet2DModel. Name an AutoencoderKL"),
        ({"_class_name": None}, "its class is None"),
        ({"in_channels": 4}, "takes images of 4 channels and makes images of 3"),
        ({"out_channels": 1}, "takes images of 3 channels and makes images of 1"),
        ({"latent_channels": 3}, "latents of 1 or 3 channels would be taken for images"),
        ({"latent_channels": "4"}, "latent_channels=4, and"),
        ({"scaling_factor": 0}, "its scaling_factor is 0,"),
        ({"scaling_factor": math.nan}, "its scaling_factor is nan"),
        ({"scaling_factor": math.inf}, "its scaling_factor is inf"),
        ({"scaling_factor": None}, "its scaling_factor is None"),
        ({"shift_factor": math.inf}, "its shift_factor is inf"),
        ({"latents_mean": [0.0, 1.0]}, r"its latents_mean is \[0.0, 1.0\]"),
        ({"latents_std": [0, 1, 1, 1]}, r"its latents_std is \[0, 1, 1, 1\]"),
        ({"codebook": 7}, "to be of this version of diffusers: its configuration has a codebook"),
        ({"norm_num_groups": 5}, "to be that of a model"),
        ({"block_out_channels": 8}, "to be that of a model"),
    ],
)
def test_what_is_no_autoencoder_is_refused_by_name(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read_autoencoder(edited(save_vae(tmp_path), **values), LABEL)
    assert LABEL in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "it holds no config.json and no vae/config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "to be JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "to hold a JSON object"),
        (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), "to hold diffusion_pytorch_model"),
        (
            lambda folder: (folder / "diffusion_pytorch_model.safetensors").rename(
                folder / "diffusion_pytorch_model.bin"
            ),
            "pickles alone .*AutoencoderKL.from_pretrained",
        ),
        (
            lambda folder: (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
            "its weights are in several files",
        ),
    ],
)
def test_a_folder_that_lacks_something_is_refused(spoil: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    spoil(save_vae(tmp_path))
    with pytest.raises(ValueError, match=said):
        open_source(str(tmp_path), AUTOENCODER)


def test_another_class_of_diffusers_is_refused_as_it_is_saved(tmp_path: Path) -> None:
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its class is VQModel"):
        open_source(str(tmp_path), AUTOENCODER)


def test_weights_that_are_damaged_are_refused_by_name(tmp_path: Path) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = math.nan
    vae.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="to be finite: decoder.conv_out.bias is not"):
        read_autoencoder(tmp_path / "nan", LABEL).load()
    edited(save_vae(tmp_path / "other"), latent_channels=8)
    with pytest.raises(ValueError, match="to hold its weights|is missing, or belongs to another network"):
        read_autoencoder(tmp_path / "other", LABEL).load()


def test_images_of_other_channels_are_told_what_to_do(tmp_path: Path) -> None:
    model = read_autoencoder(save_vae(tmp_path), LABEL)
    check_image_channels(CurriculumConfig().replace(num_channels=3), model)
    with pytest.raises(ValueError, match="--num_channels=1 to be 3, .*add --num_channels 3, to which your images"):
        check_image_channels(CurriculumConfig().replace(num_channels=1), model)


# --- the configuration ---------------------------------------------------------------------------------------------


SETTLED = {"vae_name_or_path": "org/vae", "vae_latent_channels": 4, "vae_downsampling": 8}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vae_revision": "main"}, "--vae_revision=main to come with --vae_name_or_path"),
        ({"vae_subfolder": "vae"}, "--vae_subfolder=vae to come with --vae_name_or_path"),
        ({**SETTLED, "resolution": 132}, "--resolution=132 to be a multiple of 16: .* makes images 8 times smaller"),
        ({**SETTLED, "lesson_resolution": 17}, "--lesson_resolution=17 to be at most 16, the side of the latents"),
        (
            {**SETTLED, "background_level": 0.0},
            "--background_level=0.0 to be left out with --vae_name_or_path=org/vae",
        ),
        ({**SETTLED, "augment_flip": True}, "--augment_flip=True to be left out"),
        ({**SETTLED, "augmentation": "shift"}, "--augmentation=shift to be left out"),
        ({**SETTLED, "stages": ["mode", "dp_sgd"]}, "without mode, to be left out with --vae"),
        ({**SETTLED, "vae_latent_channels": 16, "resolution": 256, "shortcut": "closed_form"}, "there are 16,384"),
    ],
)
def test_options_that_do_not_go_with_latents_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CurriculumConfig().replace(**{"num_channels": 3, "resolution": 128, **fields})


def test_the_shape_that_is_trained_on_is_that_of_the_latents() -> None:
    config = CurriculumConfig().replace(resolution=128, num_channels=3, **SETTLED)
    assert config.input_shape == (4, 16, 16) and config.has_prior and not config.has_photos
    assert CurriculumConfig().replace(resolution=128, num_channels=3).input_shape == (3, 128, 128)
    asked = CurriculumConfig().replace(resolution=130, num_channels=3, vae_name_or_path="org/vae")
    with pytest.raises(ValueError, match="the shape of its latents is not known"):
        asked.input_shape  # noqa: B018
