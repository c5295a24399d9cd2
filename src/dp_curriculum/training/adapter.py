"""The matrices of LoRA as an adapter of peft, beside the network that they are merged into."""

from __future__ import annotations

from safetensors.torch import save_file

from dp_curriculum.diffusion.trainable import adapter_tensors, lora_config
from dp_curriculum.runtime.checkpointing import appearing
from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.training.run import Run


_WEIGHTS, _PREFIX = "adapter_model.safetensors", "base_model.model."  # names that peft gives


def save_adapter(run: Run) -> None:
    """
    Writes `adapter/`, which `peft.PeftModel.from_pretrained` puts on the network that the stages before left.

    Privacy:
        It is what is merged into the released network, in another form, and covered by the same guarantee. Its hash is
        in the ledger. `push` shares the merged network alone.
    """
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in adapter_tensors(run.unet).items()}
    config = lora_config(run.unet, run.config.dp_sgd)
    config.target_modules = sorted(config.target_modules)  # a set, in another order in each process
    with appearing(run.folder.adapter) as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        run.record(run.folder.adapter / _WEIGHTS, hash_file(folder / _WEIGHTS))
