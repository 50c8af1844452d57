"""Features that another tool computed, from a file or a folder, by photo id.

In: a finished dataset, and features of all its photos. Out: what features.py enters. It never holds the features of
more than one shard. N samples, F feature width, P patches.
"""

import dataclasses
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffcap_dist.data.shard_format import FeatureInfo, ShardIndex, ShardInfo, file_sha256, open_shard
from shards.features import Registered, alone, check_name, is_registered, register, require_same_files, write_arrays
from shards.sources import npz_names, path_id_of, photo_id_of

Header = tuple[tuple[int, ...], bool, np.dtype]  # of a .npy file: shape, is in Fortran order, type


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The features of another tool by photo id."""

    where: Path
    preprocessing: str
    num_photos: int
    place: dict[str, int] | dict[str, str]  # of a photo id: the row in a file, or the name of a file in a folder
    read: Callable[[Any], np.ndarray]  # (F,) or (P, F)
    notes: tuple[str, ...] = ()


def import_npz(directory: Path, npz: Path, feature_name: str) -> Registered:
    """Features from a file with `names` (photo ids or file names) and one 2-d float array."""
    check_name(feature_name)
    with alone(directory, feature_name):
        return _import(directory, feature_name, _npz_rows(npz, directory))


def import_npy_dir(directory: Path, folder: Path, feature_name: str) -> Registered:
    """Features from a folder with one PHOTO.npy for each photo (its id or file name): (F,), or patches (P, F),
    whose mean becomes the pooled features."""
    check_name(feature_name)
    with alone(directory, feature_name):
        return _import(directory, feature_name, _npy_rows(folder))


def import_array(
    directory: Path, like: FeatureInfo, photo_ids: list[str], pooled_NF: np.ndarray, how: str
) -> Registered:
    """Features that were made of those that ``like`` describes: of the same name and the same encoder."""
    place = {photo_id: row for row, photo_id in enumerate(photo_ids)}
    rows = _Rows(Path(how), f"{like.preprocessing} | {how}", len(photo_ids), place, lambda row: pooled_NF[row])
    with alone(directory, like.name):
        return _import(directory, like.name, rows, like.weights_sha256)


def _import(directory: Path, feature_name: str, rows: _Rows, weights_sha256: str | None = None) -> Registered:
    index = ShardIndex.load(directory)
    first_photo, num_photos = _require_complete(directory, index, rows)
    shape = _read_row(rows, first_photo, None).shape
    info = FeatureInfo(
        name=feature_name,
        source=rows.where.name,
        weights_sha256=weights_sha256,
        pooled_dim=shape[-1],
        patches=(shape[0], shape[1]) if len(shape) == 2 else None,
        preprocessing=rows.preprocessing,
        files={},
    )
    registered = is_registered(index, info)
    files = {}
    for shard in index.shards:
        arrays = _import_shard(directory, shard, rows, shape)
        files[shard.name] = write_arrays(directory, shard.name, feature_name, arrays, dry_run=registered)
    info = dataclasses.replace(info, files=files)
    if registered:
        require_same_files(index.features[feature_name], info)
        return Registered(info, None, already_complete=True, notes=rows.notes)
    extra = rows.num_photos - num_photos
    notes = (f"{rows.where} has features of {extra} photos that are not in the dataset",) if extra > 0 else ()
    return Registered(info, register(directory, info), notes=rows.notes + notes)


def _require_complete(directory: Path, index: ShardIndex, rows: _Rows) -> tuple[str, int]:
    """All of the dataset's photos have features. Returns the first photo's id and how many photos there are."""
    missing, first = 0, None
    known: set[str] = set()  # a photo may be in several splits
    examples: list[str] = []
    for shard in index.shards:
        photo_ids = _photo_ids(directory, shard)
        first = photo_ids[0] if first is None and photo_ids else first
        lacking = [photo_id for photo_id in photo_ids if photo_id not in rows.place]
        missing += len(lacking)
        known.update(photo_ids)
        examples += lacking[: 5 - len(examples)]
    if missing:
        if rows.where.is_dir():
            examples = [f"{photo_id}.npy" for photo_id in examples]
        raise ValueError(
            f"{rows.where} lacks features of {missing} of the dataset's photos, e.g. {', '.join(examples)}. "
            "Features must be complete: make the dataset from the photos that have them"
        )
    if first is None:
        raise ValueError(f"{directory} has no samples, so there is nothing that features belong to")
    return first, len(known)


def _import_shard(directory: Path, shard: ShardInfo, rows: _Rows, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    pooled_NF = np.empty((shard.samples, shape[-1]), np.float16)
    if len(shape) == 1:
        for sample, photo_id in enumerate(_photo_ids(directory, shard)):
            pooled_NF[sample] = _read_row(rows, photo_id, shape)
        return {"pooled": pooled_NF}
    patches_NPF = np.empty((shard.samples, *shape), np.float16)
    for sample, photo_id in enumerate(_photo_ids(directory, shard)):
        patches_PF = _read_row(rows, photo_id, shape)
        patches_NPF[sample] = patches_PF
        pooled_NF[sample] = patches_PF.mean(0, dtype=np.float64)
    return {"pooled": pooled_NF, "patches": patches_NPF}


def _photo_ids(directory: Path, info: ShardInfo) -> list[str]:
    shard = open_shard(directory, info)
    photo_ids = [shard.record(sample)["photo_id"] for sample in range(len(shard))]
    shard.close()
    return photo_ids


def _read_row(rows: _Rows, photo_id: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """The features of one photo, sure to be of that shape (None: any that will do) and finite in fp16."""
    place = rows.place[photo_id]
    array = rows.read(place)
    where = f"{rows.where if isinstance(place, int) else _npy_path(rows.where, place)}: photo {photo_id}"
    if shape is None and (array.ndim not in (1, 2) or array.size == 0):
        raise ValueError(f"{where} has features of shape {array.shape}, expected (F,), or patches (P, F)")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{where} has features of shape {array.shape}, the dataset's first photo of shape {shape}")
    if array.dtype.kind != "f":
        raise ValueError(f"{where} has features of type {array.dtype}, expected floats")
    with np.errstate(over="ignore"):
        if not np.isfinite(array.astype(np.float16)).all():
            raise ValueError(f"{where} has features that are not finite in fp16 (NaN, or beyond 65504)")
    return array


def _by_photo_id(where: Path, names: list[str]) -> dict[str, int]:
    """Number of the name by photo id: the path without ending, and the file name alone if only one has it."""
    number_of = {path_id_of(name): number for number, name in enumerate(names)}
    if len(number_of) != len(names):
        twice, _ = Counter(map(path_id_of, names)).most_common(1)[0]
        raise ValueError(f"{where}: photo {twice} is named more than once")
    same_name = Counter(map(photo_id_of, names))
    alone = {photo_id_of(name): number for number, name in enumerate(names) if same_name[photo_id_of(name)] == 1}
    return {**alone, **number_of}


def _npz_rows(npz: Path, scratch: Path) -> _Rows:
    names = npz_names(npz)
    headers = _npz_headers(npz)
    candidates = [name for name, (shape, _, dtype) in headers.items() if (len(shape), dtype.kind) == (2, "f")]
    if len(candidates) != 1:
        found = ", ".join(candidates) or "none"
        raise ValueError(f"{npz} must hold one 2-d float array beside `names`; found: {found}")
    num_rows = headers[candidates[0]][0][0]
    if num_rows != len(names):
        raise ValueError(f"{npz}: {len(names)} names, but {candidates[0]} has {num_rows} rows")
    array_NF = _mapped_array(npz, candidates[0], scratch)
    preprocessing = f"imported: array {candidates[0]} of a file with sha256 {file_sha256(npz)}"
    return _Rows(npz, preprocessing, len(names), _by_photo_id(npz, names), lambda row: array_NF[row])


def _npz_headers(npz: Path) -> dict[str, Header]:
    with zipfile.ZipFile(npz) as archive:
        headers = {}
        for member in archive.namelist():
            with archive.open(member) as packed:
                headers[member.removesuffix(".npy")] = _read_npy_header(packed)
    return headers


def _read_npy_header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _mapped_array(npz: Path, name: str, scratch: Path) -> np.ndarray:
    """One array of the file, unpacked on disk: it may be larger than memory."""
    with tempfile.TemporaryFile(dir=scratch) as unpacked:  # it has no name: gone however this process ends
        try:
            with zipfile.ZipFile(npz) as archive, archive.open(f"{name}.npy") as packed:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{npz}: its array {name} is damaged ({error}). Copy or make the file again") from error
        unpacked.seek(0)
        shape, is_fortran, dtype = _read_npy_header(unpacked)
        return np.memmap(unpacked, dtype, "r", unpacked.tell(), shape, "F" if is_fortran else "C")


def _npy_rows(folder: Path) -> _Rows:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of .npy files")
    files = [(Path(place) / name).relative_to(folder) for place, _, names in os.walk(folder) for name in names]
    names = sorted(str(file.with_suffix("")) for file in files if _is_npy(file))
    others = sorted(str(file) for file in files if not _is_npy(file))
    if not names:
        raise ValueError(f"{folder} has no .npy files. It holds: {', '.join(others[:3]) or 'nothing'}")
    notes = (f"{len(others)} entries of {folder} are no .npy files: {', '.join(others[:5])}",) if others else ()
    place = {photo_id: names[number] for photo_id, number in _by_photo_id(folder, names).items()}
    read = lambda name: _read_npy(_npy_path(folder, name))  # noqa: E731
    return _Rows(folder, "imported: a folder of one .npy file for each photo", len(names), place, read, notes)


def _is_npy(file: Path) -> bool:
    return file.suffix == ".npy" and not file.name.startswith(".")  # macOS leaves ._1.npy beside 1.npy in archives


def _npy_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} can't be read as a .npy file ({error}). Copy or make it again") from error


def name_from_file(path: Path) -> str:
    """What imported features are called unless they are given a name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_")
