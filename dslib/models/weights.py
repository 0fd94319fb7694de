"""Saving and loading tensors: whole or not at all, checksummed, and without running anybody's code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadConfig, BadModel, BadRecord, first_line
from ..records import whole_file


def save_tensors(path: Path | str, tensors: dict[str, Tensor], meta: dict[str, Any] | None = None) -> Path:
    """Write tensors (and a JSON-able `meta`) as safetensors under `path`, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(meta or {})
    header = {"dslib": text, "sha256": digest(plain), "meta_sha256": hashlib.sha256(text.encode()).hexdigest()}
    with whole_file(path) as partial:
        try:
            save_file(plain, str(partial), metadata=header)
        except SafetensorError as error:  # what a full disk raises here
            raise OSError(str(error)) from error
    return Path(path)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the meta of a file that `save_tensors` wrote.

    Raises:
        BadRecord: if the file is missing, truncated, or does not match its checksum.
        BadConfig: if it cannot be read just now.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            header = file.metadata() or {}
    except FileNotFoundError as error:
        raise BadRecord(f"no file {path}: expected a safetensors file") from error
    except SafetensorError as error:
        raise BadRecord(f"{path} is corrupt or truncated ({error}): get it again") from error
    except OSError as error:  # of the disk or the system: the file may be whole
        raise BadConfig(f"{path} cannot be read ({error.strerror or error}): mend that and try again") from error
    if ("sha256" in header or "dslib" in header) and header.get("sha256") != digest(tensors):
        raise BadRecord(f"{path} does not match its checksum: it was changed or damaged; get it again")
    return tensors, _meta(path, header)


def _meta(path: Path | str, header: dict[str, str]) -> dict[str, Any]:
    """What `save_tensors` was given beside the tensors; {} for a file that somebody else wrote."""
    text = header.get("dslib", "{}")
    whole = text == "{}" or header.get("meta_sha256") == hashlib.sha256(text.encode()).hexdigest()
    found: Any = json.loads(text) if whole else None
    if not isinstance(found, dict):
        raise BadRecord(f"{path} does not match its checksum: it was changed or damaged; get it again")
    return found


def load_state_dict(path: Path | str) -> dict[str, Tensor]:
    """A network's weights from a .safetensors file, or from a .pt / .pth state dict (`weights_only=True`).

    Raises:
        BadModel: if the file holds no state dict.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for what is not a checkpoint
        raise BadModel(f"{path} is no readable checkpoint of plain tensors: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise BadModel(f"{path}: expected a state dict (name -> tensor), found {type(found).__name__}")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def digest(tensors: dict[str, Tensor]) -> str:
    """A SHA-256 of names, shapes and values."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if tensor.numel()
            else b""
        )
    return whole.hexdigest()
