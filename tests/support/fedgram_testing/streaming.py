"""Small adapter directories for tests of streaming, written without PEFT, and ways to interrupt a run."""

import json

import pytest
import safetensors
import torch
from safetensors import safe_open

from fedgram.bindings.files.tensor_file import spec_of, write_tensors
from fedgram.bindings.streaming import aggregate_directories

PREFIX = "base_model.model."
MODULES = {"layers.0.q": (24, 20), "layers.0.up": (36, 20), "layers.1.q": (24, 20), "layers.1.up": (36, 20)}


def write_adapter(
    path, *, seed=0, r=3, alpha=5, dtype=torch.float32, modules=MODULES, saved=None, changes=None, config=None
):
    """One client's directory; ``saved`` are full tensors by name, ``changes`` replaces tensors by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (m, n) in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, n, generator=generator).to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(m, r, generator=generator).to(dtype)
    tensors |= {PREFIX + name: tensor for name, tensor in (saved or {}).items()}
    tensors |= {PREFIX + name: tensor for name, tensor in (changes or {}).items()}
    path.mkdir(parents=True, exist_ok=True)
    specs = {key: spec_of(tensor, key) for key, tensor in tensors.items()}
    write_tensors(path / "adapter_model.safetensors", specs, tensors.__getitem__)
    document = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": ["q", "up"]}
    document |= {"modules_to_save": sorted({name.split(".")[0] for name in saved or {}}) or None} | (config or {})
    (path / "adapter_config.json").write_text(json.dumps(document))
    return path


def write_clients(root, count=3, **options):
    """Clients ``c0``, ``c1``, .. of different seeds, ranks and scalings; their directories."""
    return [write_adapter(root / f"c{i}", seed=i, r=2 + i, alpha=4 + i, **options) for i in range(count)]


def interrupt_after(count):
    """A progress callback that stops the run with KeyboardInterrupt after so many modules."""

    def progress(done, total, module):
        if done >= count:
            raise KeyboardInterrupt

    return progress


def interrupted(dirs, output, **options):
    """A run that was stopped after two modules: its journal is there, and no output."""
    with pytest.raises(KeyboardInterrupt):
        aggregate_directories(dirs, output, progress=interrupt_after(2), **options)
    assert (output.parent / f".{output.name}.journal").is_dir()
    assert not output.exists()


def files_of(directory):
    """All files of a directory by name; of tensors what the format's own reader finds, wherever it lies in the file."""
    return {
        path.name: tensors_of(path) if path.suffix == ".safetensors" else path.read_bytes()
        for path in directory.iterdir()
    }


def tensors_of(path):
    """Metadata of a file, and dtype, shape and bytes of its tensors."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    found = safetensors.deserialize(path.read_bytes())
    return metadata, {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in found}
