"""Forgeries of the files beside a card."""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from forgeries.tools import (
    NOT_CHECKED,
    PICKLE,
    STRONGER,
    WEIGHTS,
    edit_json,
    edit_report,
    edit_text,
    forgery,
    read_card,
    write_card,
)


@forgery("files")
def an_empty_configuration_of_a_run(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("")


@forgery("files")
def a_run_with_a_pickle_beside(folder: Path) -> None:
    an_empty_configuration_of_a_run(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(PICKLE)


@forgery("pipeline.py")
def other_code_in_the_pipeline(folder: Path) -> None:
    path = folder / "pipeline.py"
    path.write_text(path.read_text() + "\nimport os\nos.system('id')\n")


@forgery("pipeline.py")
def the_pipeline_missing(folder: Path) -> None:
    (folder / "pipeline.py").unlink()


@forgery("pipeline.py", verdict=NOT_CHECKED)
def other_code_in_the_pipeline_of_a_version_that_nobody_knows(folder: Path) -> None:
    other_code_in_the_pipeline(folder)
    edit_report(folder, lambda report: report["implementation"].update(version="0.0.1"))


@forgery("model_index.json")
def a_pipeline_from_the_code_of_the_repository(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index.update(_class_name=["pipeline", "Evil"]))


@forgery("model_index.json")
def a_network_from_the_code_of_the_repository(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index.update(unet=["pipeline", "Evil"]))


@forgery("model_index.json")
def one_component_more(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index.update(safety_checker=["evil", "Evil"]))


@forgery("model_index.json")
def one_component_more_of_a_version_that_nobody_knows(folder: Path) -> None:
    edit_report(folder, lambda report: report["implementation"].update(version="0.0.1"))
    edit_json(folder / "model_index.json", lambda index: index.update(safety_checker=["evil", "Evil"]))


@forgery("model_index.json")
def a_claim_as_a_version_of_diffusers(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index.update(_diffusers_version=STRONGER))


@forgery("model_index.json")
def fewer_names_of_classes(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index["id2label"].pop("9"))
    edit_text(folder, "8, 9)", "8)")


@forgery("model_index.json")
def sampling_with_text(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index["sampling"].update(s_tmin="evil"))


@forgery("model_index.json")
def a_key_twice_in_the_index(folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(
        path.read_text().replace('"_class_name"', '"_class_name": ["pipeline", "Evil"],\n  "_class_name"', 1)
    )


@forgery("pipe.privacy")
def one_that_is_true_in_the_index(folder: Path) -> None:
    edit_json(folder / "model_index.json", lambda index: index["privacy"].update(private=1))


@forgery("weights")
def a_key_twice_in_the_network(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(path.read_text().replace('"act_fn"', '"act_fn": "gelu",\n  "act_fn"', 1))


@forgery("weights")
def a_network_with_code(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(auto_map={"AutoModel": "pipeline.Evil"}))


@forgery("weights")
def a_network_that_takes_all_day_to_build(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(layers_per_block=10**9))


@forgery("weights", known=True)
def a_network_of_another_kind(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(_class_name="UNet2DConditionModel"))


@forgery("other files (sha256)", careless=True)
def a_network_with_another_activation(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(act_fn="gelu"))


@forgery("other files (sha256)", careless=True)
def a_scheduler_with_another_sigma(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", lambda config: config.update(sigma_data=0.1))


@forgery("other files (sha256)", careless=True)
def another_picture(folder: Path) -> None:
    data = (folder / "samples.png").read_bytes()
    pixels = zlib.compress(bytes(9 * 9))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    (folder / "samples.png").write_bytes(data[:8] + b"".join(map(png_chunk, chunks)))


def png_chunk(chunk: tuple[bytes, bytes]) -> bytes:
    kind, data = chunk
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@forgery("samples.png")
def a_picture_that_is_a_page(folder: Path) -> None:
    (folder / "samples.png").write_bytes(b"<svg onload='alert(1)'/>")


@forgery("samples.png")
def a_picture_with_a_text_in_it(folder: Path) -> None:
    data = (folder / "samples.png").read_bytes()
    (folder / "samples.png").write_bytes(data[:33] + png_chunk((b"tEXt", b"claim\0epsilon 0.1")) + data[33:])


@forgery("samples.png")
def a_picture_with_something_after_its_end(folder: Path) -> None:
    (folder / "samples.png").write_bytes((folder / "samples.png").read_bytes() + b"PK\x03\x04")


@forgery("samples.png")
def a_picture_without_an_end(folder: Path) -> None:
    (folder / "samples.png").write_bytes((folder / "samples.png").read_bytes()[:-12])


@forgery("samples.png")
def no_picture(folder: Path) -> None:
    (folder / "samples.png").unlink()


@forgery("weights (sha256)", known=True)
def other_weights(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.weight"] += 1e-3
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@forgery("weights", known=True)
def a_tensor_more(folder: Path) -> None:
    import torch

    save_file({**load_file(folder / WEIGHTS), "faces": torch.zeros(2, 8, 8)}, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    edit_report(folder, lambda report: report.update(weights={WEIGHTS: digest}))


@forgery("weights")
def a_tensor_twice_in_the_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    row = b'"conv_in.bias":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},'
    header = b"{" + row + data[9 : 8 + length].rstrip(b" ")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    edit_report(folder, lambda report: report.update(weights={WEIGHTS: digest}))


@forgery("weights", known=True)
def weights_under_another_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / "model.safetensors")


@forgery("weights", known=True)
def weights_in_parts(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")


def add_file(name: str, content: bytes = b"") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return edit


for _name, _file in {
    "a_pickle_beside_the_weights": "unet/diffusion_pytorch_model.bin",
    "another_copy_of_the_weights": "unet/diffusion_pytorch_model.fp16.safetensors",
    "a_card_in_small_letters": "readme.md",
    "a_hidden_file": ".hidden",
    "code_beside_the_network": "unet/unet.py",
    "a_module_of_the_repository": "evil.py",
    "a_card_in_another_folder": ".github/README.md",
    "a_file_among_those_of_a_download": ".cache/evil.py",
}.items():
    _edit = add_file(_file, PICKLE)
    _edit.__name__ = _name
    forgery("files", known=_file != ".cache/evil.py")(_edit)


@forgery("files")
def a_card_that_is_a_link(folder: Path) -> None:
    outside = folder.parent / "elsewhere.md"
    shutil.copyfile(folder / "README.md", outside)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(outside)


@forgery("files")
def a_folder_that_is_a_link(folder: Path) -> None:
    outside = folder.parent / "elsewhere"
    shutil.move(folder / "unet", outside)
    (folder / "unet").symlink_to(outside, target_is_directory=True)


@forgery("files")
def a_link_to_nowhere(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").symlink_to(folder.parent / "nowhere")


@forgery("other files (sha256)", verdict=NOT_CHECKED)
def no_list_of_files_on_the_card(folder: Path) -> None:
    front, body = read_card(folder)
    write_card(folder, front, body.partition("\n## Files\n")[0])


@forgery("other files (sha256)")
def a_list_without_one_file(folder: Path) -> None:
    row = re.search(r"- `scheduler/.*\n", read_card(folder)[1])
    assert row is not None
    edit_text(folder, row[0], "")


@forgery("other files (sha256)")
def a_list_with_a_file_that_is_not_there(folder: Path) -> None:
    edit_text(folder, "- `model_index.json`", f"- `audit.json`: `{'0' * 64}`\n- `model_index.json`")
