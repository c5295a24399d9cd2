"""A first look at a shared model: choose a class, see images, read what is protected. Runs as a Space or at home.

    MODEL_ID=org/model python app.py

`MODEL_ID` is a Hub id, or a folder that `dp-curriculum push --export_dir` wrote. Its own code is run, so name a model
that you trust, and pin it with `MODEL_REVISION`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image


MODEL_ID, REVISION = os.environ.get("MODEL_ID", "your-name/your-model"), os.environ.get("MODEL_REVISION")
ALL, MAX_IMAGES, MAX_STEPS, MAX_GUIDANCE, SIDE = "every class in turn", 16, 50, 5.0, 160


def load(model: str) -> Any:
    """Loads the pipeline with the code that lies beside its weights; dp_curriculum need not be installed."""
    code = str(Path(model) / "pipeline.py") if Path(model).is_dir() else model
    pipe = DiffusionPipeline.from_pretrained(
        model, custom_pipeline=code, trust_remote_code=True, revision=REVISION, use_safetensors=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def privacy_text(privacy: dict[str, Any] | None) -> str:
    """What the model's report says, for somebody who has not heard of differential privacy."""
    if privacy is None:
        return "## Privacy\n\nThis model comes **without** a privacy report: assume that nothing is protected."
    lines = ["## Privacy", privacy["statement"]]
    if privacy["private"]:
        epsilon = math.ceil(100 * privacy["epsilon"]) / 100
        lines.append(
            f"**epsilon {epsilon:g}** at delta {privacy['delta']:g}, for {privacy['adjacency']} of "
            f"{privacy['privacy_unit']['description']}. Smaller is more private; 0 would be perfect, and useless."
        )
    if privacy["not_covered"]:
        lines.append(f"Not covered: {'; '.join(privacy['not_covered'])}.")
    lines.append(f"Check it yourself: `dp-curriculum verify {MODEL_ID}`" if not Path(MODEL_ID).is_dir() else "")
    return "\n\n".join(lines)


def build(pipe: Any) -> gr.Blocks:
    """The page."""
    names = list(pipe.labels) or [str(index) for index in range(pipe.num_classes)]
    saved = pipe.config.sampling or {}

    def generate(name: str, count: float, steps: float, guidance: float, seed: float) -> list[Image.Image]:
        # Gradio holds those who call the programming interface to the limits of the sliders.
        classes = list(range(pipe.num_classes)) if name not in names else [dict(zip(names, _indices(pipe)))[name]]
        images = pipe(
            class_labels=[classes[index % len(classes)] for index in range(int(count))],
            num_inference_steps=int(steps),
            guidance_scale=float(guidance),
            generator=[torch.Generator().manual_seed((int(seed) + index) % 2**63) for index in range(int(count))],
        ).images
        factor = max(1, SIDE // max(images[0].size))
        return [image.resize([side * factor for side in image.size], Image.Resampling.NEAREST) for image in images]

    with gr.Blocks(title="Images under differential privacy") as page:
        gr.Markdown("# Generated images\n\nWhat is promised about the images that the model learned from: see below.")
        with gr.Row():
            with gr.Column(scale=1):
                name = gr.Dropdown([ALL, *names], value=ALL, label="Class")
                count = gr.Slider(1, MAX_IMAGES, value=8, step=1, label="Images")
                steps = gr.Slider(1, MAX_STEPS, value=int(saved.get("num_inference_steps", 18)), step=1, label="Steps")
                guidance = gr.Slider(1, MAX_GUIDANCE, value=saved.get("guidance_scale", 1.0), label="Guidance")
                seed = gr.Number(0, precision=0, label="Seed")
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=2):
                gallery = gr.Gallery(show_label=False, columns=4, object_fit="contain", format="png")
        gr.Markdown(privacy_text(pipe.privacy), elem_id="privacy")
        button.click(generate, [name, count, steps, guidance, seed], gallery, api_name="generate")
    return page


def _indices(pipe: Any) -> list[int]:
    return list(pipe.labels.values()) or list(range(pipe.num_classes))


if __name__ == "__main__":
    build(load(MODEL_ID)).launch(theme=gr.themes.Default(font="system-ui", font_mono="monospace"))
