"""`dp-curriculum sample`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers.utils import logging
from tqdm.auto import tqdm

from dp_curriculum.commands.arguments import CommandParser, add_sampling_arguments, model_folder
from dp_curriculum.diffusion.sheets import save_sheet
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.runtime.allocator import keep_freed_memory
from dp_curriculum.runtime.checkpointing import remove_litter
from dp_curriculum.runtime.processes import from_main, jointly, process_state
from dp_curriculum.runtime.storage import LITTER, naming
from dp_curriculum.runtime.threads import use_threads


logging.disable_progress_bar()  # of loading two components


_SHEET = "sheet.png"
_MOST_TRIAL_IMAGES = 128
_PICTURE = re.compile(r"\d{6,}-class\d+\.png")  # the names of `_picture_name`


def main(args: Sequence[str]) -> int:
    """Generates images with a trained pipeline. It spends nothing, for any number of images."""
    parser = CommandParser("sample", main.__doc__)
    parser.add_argument("model", help="Folder of a run, or a Hub id.")
    parser.add_argument("--output_dir", required=True, help="A new or empty folder for the images.")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace the images of an earlier call in --output_dir."
    )
    parser.add_argument("--num_images", type=int, default=64, help="Number of images.")
    parser.add_argument(
        "--class_label", nargs="+", help="Indices or names of classes. By default all classes take turns."
    )
    add_sampling_arguments(parser)
    given = parser.parse_args(args)
    if given.num_images < 1:
        raise ValueError(f"Expected --num_images={given.num_images} to be positive.")
    if given.batch_size < 1:
        raise ValueError(f"Expected --batch_size={given.batch_size} to be positive.")
    state = process_state()
    pipeline = load_pipeline(given.model, state)
    labels = _class_labels(pipeline, given.class_label, given.num_images)
    settle_threads(pipeline, given.cpu_threads, min(given.batch_size, given.num_images))
    if given.num_inference_steps is not None:  # before the images of an earlier sample go
        pipeline.check_inputs(1, None, given.num_inference_steps, "pt", [])
    folder = Path(given.output_dir)
    from_main(state, lambda: _claim_folder(folder, overwrite=given.overwrite_output_dir))
    # Each process takes its share of the batches, and each image has its own generator: how many processes there are
    # changes no image.
    first, stride = given.batch_size * state.process_index, given.batch_size * state.num_processes
    pipeline.set_progress_bar_config(disable=True)  # one bar for all images
    starts = range(first, given.num_images, stride)
    for start in tqdm(starts, desc=f"sampling, {given.batch_size} images per step", disable=not state.is_main_process):
        indices = range(start, min(start + given.batch_size, given.num_images))
        (images,) = pipeline(
            class_labels=[labels[index] for index in indices],
            generator=[torch.Generator().manual_seed(given.seed + index) for index in indices],
            num_inference_steps=given.num_inference_steps,
            guidance_scale=given.guidance_scale,
            s_churn=given.s_churn,
            output_type="pt",
            return_dict=False,
        )
        for index, picture in zip(indices, pipeline.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).numpy())):
            path = folder / _picture_name(index, labels[index])
            with naming(path):
                picture.save(path)
        if start == 0:
            save_sheet(images[:64], folder / _SHEET, columns=8)
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{given.num_images} images in {folder}")
    return 0


def _picture_name(index: int, label: int) -> str:
    return f"{index:06d}-class{label}.png"


def _claim_folder(folder: Path, *, overwrite: bool) -> None:
    """
    Makes the folder; the images of an earlier sample go if `overwrite` is set, and nothing else ever does.

    Raises:
        ValueError: If it holds images of an earlier sample and `overwrite` is not set, or other files alone.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected --output_dir={folder} to be a folder.")
    inside = [path for path in folder.iterdir() if not path.name.startswith(LITTER)] if folder.is_dir() else []
    earlier = [path for path in inside if _PICTURE.fullmatch(path.name)]
    if inside and not earlier:
        raise ValueError(f"Refusing to write to --output_dir={folder}: it holds other files. Name another folder.")
    if earlier and not overwrite:
        raise ValueError(
            f"Refusing to write to --output_dir={folder}: it holds images of an earlier call. Add "
            "--overwrite_output_dir to replace them, or name another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*earlier, folder / _SHEET):
        path.unlink(missing_ok=True)
    remove_litter(folder)


def load_pipeline(model: str, state: PartialState) -> DPCurriculumPipeline:
    """
    Loads a pipeline from a folder or the Hub, on each process, onto its device.

    Raises:
        ValueError: On all processes, if one of them finds none.
    """
    return jointly(state, lambda: _read_pipeline(model).to(state.device))


def settle_threads(pipeline: DPCurriculumPipeline, cpu_threads: int | None, batch_size: int) -> None:
    """Sets on how many threads this process samples, from now on, by a trial in batches of that many images."""
    unet, count = pipeline.unet, min(batch_size, _MOST_TRIAL_IMAGES)
    if unet.device.type == "cpu":
        keep_freed_memory()
    side = unet.config.sample_size
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    inputs = torch.zeros(count, unet.config.in_channels, height, width, device=unet.device)
    labels = torch.zeros(count, dtype=torch.int64, device=unet.device)
    use_threads(unet.device, cpu_threads).settle(torch.no_grad()(lambda: unet(inputs, 1.0, class_labels=labels)))


def _read_pipeline(model: str) -> DPCurriculumPipeline:
    model_folder(model)  # a folder that holds none is refused before the Hub is asked
    try:
        return DPCurriculumPipeline.from_pretrained(model)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"Expected {model} to be a folder or a Hub id of a pipeline: there is no such folder, and the Hub gives "
            f"none: {reason}"
        ) from None


def _class_labels(pipeline: DPCurriculumPipeline, names: list[str] | None, count: int) -> list[int]:
    classes = list(range(pipeline.num_classes))
    if names is not None:
        # A name goes before an index: the classes of digits are named by digits.
        known = pipeline.labels
        classes = [known[name] if name in known else _index(name, pipeline) for name in names]
    return [classes[index % len(classes)] for index in range(count)]


def _index(name: str, pipeline: DPCurriculumPipeline) -> int:
    if not name.isdigit() or int(name) >= pipeline.num_classes:
        raise ValueError(
            f"Expected --class_label={name} to be an index from 0 to {pipeline.num_classes - 1}, or a name: "
            f"{', '.join(pipeline.labels)}."
        )
    return int(name)
