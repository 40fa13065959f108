"""Saving and loading of models with factored layers.

The folder holds ``config.json`` of the unedited model, ``curvfast.json``, which lists the factored
layers, and every parameter and buffer in ``tensors-*.safetensors``: under another name
``from_pretrained`` would load the folder and initialise missing weights at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvfast import storage
from curvfast.errors import InputError, StorageError
from curvfast.export.factored import FactoredLinear, FactorReport, factored_layers
from curvfast.model.identity import whole_model

KIND = "curvfast-factored"
INDEX = "curvfast.json"
_PART_BYTES = 2 << 30


def save_factored(
    model: Any,
    directory: str | PathLike[str],
    tokenizer: Any = None,
    *,
    report: FactorReport | None = None,
) -> None:
    """Write a model with layers factored by :func:`curvfast.factorize`, atomically.

    Args:
        model: A model of transformers; on one process.
        directory: Created if missing.
        tokenizer: Saved as well, if given.
        report: The report of ``factorize``, saved with the model.

    Raises:
        InputError: If the model is not of transformers, wrapped by PEFT, sharded, or has no
            factored layer.
        StorageError: If it cannot be written, or the folder holds a whole model.
    """
    inner = whole_model(model)
    layers = factored_layers(inner)
    if not layers:
        raise InputError("the model has no factored layer: use save_pretrained, or save_edited")
    whole = [path.name for path in Path(directory).glob("model*.safetensors")]
    if whole:
        raise StorageError(
            f"{str(directory)!r} holds {whole[0]!r}, which from_pretrained would read in place of "
            "the factored layers: pass another folder"
        )
    tensors, same = _distinct(inner)
    with storage.FolderWriter(directory, KIND, index=INDEX) as writer:
        for part in _parts(tensors):
            writer.add(part)
        try:
            inner.config.save_pretrained(directory)
            if inner.can_generate():
                inner.generation_config.save_pretrained(directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
        except OSError as error:
            raise StorageError(f"could not write to {str(directory)!r}: {error}") from error
        writer.finish(
            {
                "architecture": type(inner).__name__,
                "factored": {
                    name: {"rank": layer.rank, "bias": layer.bias is not None}
                    for name, layer in layers.items()
                },
                "same": same,
                "report": report and report.to_dict(),
            }
        )


def load_factored(directory: str | PathLike[str]) -> Any:
    """Read a model that :func:`save_factored` wrote; a missing weight is an error.

    Args:
        directory: The folder.

    Returns:
        The model, on the CPU, in eval mode, each weight in the dtype it was written in.

    Raises:
        InputError: If this version of transformers has no such model.
        StorageError: If the folder is missing, foreign, damaged, incomplete or of a newer format.
    """
    folder = Path(directory)
    meta, tensors = storage.open_folder(folder, kind=KIND, index=INDEX)
    model = _empty(folder, meta)
    placed = {name: _put(model, name, tensor) for name, tensor in tensors.items()}
    for name, source in meta["same"].items():
        _put(model, name, placed[source])
    absent = [name for name, tensor in _named(model) if tensor.is_meta]
    if absent:
        raise StorageError(f"{str(folder)!r} lacks {absent[0]!r} and {len(absent) - 1} more")
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def _empty(folder: Path, meta: Mapping[str, Any]) -> Any:
    """Return the model without weights, its factored layers in place."""
    import transformers

    kind = getattr(transformers, meta["architecture"], None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise InputError(
            f"transformers {transformers.__version__} has no model {meta['architecture']!r}: "
            "install the version this one was written with"
        )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = kind(config)
    for name, entry in meta["factored"].items():
        old: Any = model.get_submodule(name)
        weight = old.weight
        rows, columns = weight.shape if isinstance(old, nn.Linear) else weight.shape[::-1]
        new = FactoredLinear(columns, rows, entry["rank"], bias=entry["bias"], dtype=weight.dtype)
        model.set_submodule(name, new)
    return model


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    # Non-persistent buffers too, so that nothing is computed when the model is read.
    yield from model.named_buffers(remove_duplicate=False)


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return every distinct tensor by one name, and the aliases of that name."""
    first: dict[int, str] = {}
    tensors, same = {}, {}
    for name, tensor in _named(model):
        owner = first.setdefault(id(tensor), name)
        if owner == name:
            tensors[name] = tensor
        else:
            same[name] = owner
    return tensors, same


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > _PART_BYTES:
            yield part
            part = {}
        part[name] = tensor
    yield part


def _put(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
        old = getattr(owner, leaf)
    except AttributeError as error:
        raise StorageError(f"the folder has a tensor {name!r} that the model lacks") from error
    if old.shape != tensor.shape:
        raise StorageError(
            f"{name!r} is {list(tensor.shape)}, and {list(old.shape)} in the model: another "
            "config.json, or another version of transformers"
        )
    if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(owner, leaf, tensor)
    return tensor
