"""Folders that several files make up, such as a saved model: never mistaken for whole when half written."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from enerverse.files import AnyPath, disk_full, is_full

INDEX = "model_index.json"


@contextmanager
def staged_folder(path: AnyPath) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well, its files are moved into `path`.

    Each move is atomic and the descriptions (JSON, the index of a pipeline last of all) come after the weights, so a
    folder with an index is a whole one. Other files in `path` stay. When the block raises, `path` is as it was.
    Raises OSError (errno ENOSPC) with one plain sentence when the disk is full.
    """
    path = Path(path)
    stage = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        stage.mkdir(parents=True)
        yield stage
        for source in sorted((file for file in stage.rglob("*") if file.is_file()), key=_order):
            target = path / source.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    except BaseException as error:
        if is_full(error):
            raise disk_full(path, "nothing was changed") from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _order(file: Path) -> tuple[bool, bool, str]:
    return file.name == INDEX, file.suffix == ".json", str(file)
