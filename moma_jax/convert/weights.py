"""Folders of safetensors: every header is checked before anything is read, then one tensor is read at a time.

Weights that are pickles are refused: reading one runs whatever code it holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moma_jax.errors import InputError

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NOT_COPIED = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf")
"""Suffixes of weights; all other files of a folder describe the model."""
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types of weights, by safetensors' names; ml_dtypes has to be imported for the last one to be read."""


class Tensor(NamedTuple):
    """Where a tensor stands, its type by safetensors' name, its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Weights(NamedTuple):
    """The tensors of a folder by name."""

    folder: Path
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own type; nothing stays open, so a file's pages can leave memory."""
        path = self.folder / self.tensors[name].file
        try:
            with library().safe_open(path, framework="np") as file:
                return file.get_tensor(name)
        except (OSError, library().SafetensorError) as error:
            raise InputError(f"{path}: tensor {name} cannot be read ({error}); fetch the file again") from error


def library() -> ModuleType:
    """The package safetensors; InputError where it is not installed."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise InputError('moma convert: needs safetensors; install it with: pip install "moma_jax[convert]"') from error
    return safetensors


# Reading --------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the folder of a Hugging Face checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; fetch the file again")
    return value


def open_weights(folder: Path) -> Weights:
    """Reads the headers of a folder's safetensors, one file or shards with an index.

    Raises:
      InputError: there are none (only pickles, perhaps), or files and index do not agree; names the tensor.
    """
    if (folder / SINGLE).is_file():
        return Weights(folder, _headers(folder, SINGLE, None))
    if not (folder / INDEX).is_file():
        _refuse_pickles(folder, sorted(os.listdir(folder)))
        raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face checkpoint")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise InputError(f"{folder / INDEX}: has no weight_map from tensors to files; fetch the file again")
    shards: dict[str, list[str]] = {}
    for name, file in index.items():
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            _refuse_pickles(folder, [file])
            raise InputError(
                f"{folder / INDEX}: tensor {name} is said to stand in {file!r}, which is no safetensors file of this "
                "folder; fetch the index again"
            )
        shards.setdefault(file, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, names in sorted(shards.items()):
        tensors |= _headers(folder, file, names)
    return Weights(folder, tensors)


def open_file(path: Path) -> Weights:
    """Reads the headers of one safetensors file; InputError where it is damaged."""
    return Weights(path.parent, _headers(path.parent, path.name, None))


def _refuse_pickles(folder: Path, files: list[str]) -> None:
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles:
        raise InputError(
            f"{folder / pickles[0]}: a pickle, which can run code when it is read; save the model as safetensors "
            "(save_pretrained of a current transformers does) and convert that"
        )


def _headers(folder: Path, file: str, expected: list[str] | None) -> dict[str, Tensor]:
    """The tensors of one file, which the index says are `expected`."""
    path, of = folder / file, "" if expected is None else f" (tensor {min(expected)} and {len(expected) - 1} others)"
    try:
        with library().safe_open(path, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: Tensor(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except library().SafetensorError as error:
        cut = _first_cut(path)
        of = of if cut is None else f" (tensor {cut})"
        raise InputError(f"{path}: damaged or cut off{of}: {error}; fetch the file again") from error
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else error.strerror or error
        raise InputError(f"{path}: {reason}{of}; fetch the file again") from error
    for name in sorted(found.keys() ^ set(found if expected is None else expected)):
        wrong = f"has tensor {name}, which {INDEX} does not say" if name in found else f"has no tensor {name}"
        raise InputError(f"{path}: {wrong}; fetch the folder again")
    return found


def _first_cut(path: Path) -> str | None:
    """The first tensor whose bytes the file does not hold, where its header can still be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError), path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        held = os.fstat(file.fileno()).st_size - file.tell()
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        return min((end, name) for name, end in ends.items() if end > held)[1]
    return None


# Writing --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_directory(out: str, room: int = 0) -> Iterator[Path]:
    """A directory beside `out` to write in; it becomes `out` in one step at the end, or is removed.

    Raises:
      InputError: something lies at `out`, nothing can be written there, or fewer than `room` bytes.
    """
    if "://" in out:
        raise InputError(f"--out: {out} is no local directory; convert to a local one, then copy it")
    final = Path(os.path.abspath(os.path.expanduser(out)))
    if os.path.lexists(final):
        raise InputError(f"--out: {out} is there already; choose a new directory")
    begun = final.with_name(f".writing-{final.name}-{os.getpid()}")
    missing = [folder for folder in final.parents if not folder.exists()]
    try:
        begun.mkdir(parents=True)
        if (free := shutil.disk_usage(begun).free) < room:
            raise InputError(f"--out: {out} needs {room / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free; make room")
        yield begun
        if os.path.lexists(final):
            raise InputError(f"--out: {out} has come meanwhile; choose a new directory")
        begun.rename(final)
        missing = []
    except (OSError, library().SafetensorError) as error:
        raise InputError(f"--out: {out} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(begun, ignore_errors=True)
        with contextlib.suppress(OSError):  # a folder that others use meanwhile stays
            for folder in missing:
                folder.rmdir()


def write_weights(
    folder: Path, bytes_of: Mapping[str, int], read: Callable[[str], np.ndarray], shard_bytes: int
) -> None:
    """Writes tensors in the order of `bytes_of` (name -> bytes) as one file, or as shards with their index.

    Memory: one shard, which is `shard_bytes` or a single larger tensor.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in bytes_of.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: np.ascontiguousarray(read(name)) for name in names}
        write_file(folder / file, tensors)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes tensors as one file, in their own types."""
    library().numpy.save_file(tensors, path, metadata={"format": "pt"})


def dtype_named(dtype: str) -> str:
    """safetensors' name of a type of weights, "float32"; InputError where it is none."""
    names = {str(kind): name for name, kind in DTYPES.items()}
    if dtype not in names:
        raise InputError(f"--dtype: {dtype!r} is none of {', '.join(names)}")
    return names[dtype]


def shard_bytes(shard_gb: float) -> int:
    """Bytes of one file; InputError where that is no size."""
    if not 0 < shard_gb < 1e6:
        raise InputError(f"--shard-gb: must be positive, is {shard_gb}")
    return int(shard_gb * 1e9)


def cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 tensor in a type by safetensors' name, rounded to nearest; InputError where a value gets infinite."""
    with np.errstate(over="ignore"):
        result = value.astype(DTYPES[dtype])
    if np.isfinite(value).all() and not np.isfinite(result).all():
        raise InputError(f"--dtype: tensor {name} has values beyond {DTYPES[dtype]}; use float32 or bfloat16")
    return result


def copy_descriptions(source: Path, folder: Path) -> list[str]:
    """Copies the files of a checkpoint that are no weights (config, tokenizer, processor); returns their names."""
    names = [
        entry.name
        for entry in sorted(source.iterdir())
        if entry.is_file() and not entry.name.startswith(".") and not entry.name.endswith(NOT_COPIED)
    ]
    names = [name for name in names if not name.endswith(".index.json")]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names
