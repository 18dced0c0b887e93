"""Where LM Studio reads models: MODELS/PUBLISHER/NAME/FILE.gguf.

Its home is named by ~/.lmstudio-home-pointer; else it is ~/.cache/lm-studio, where older versions had it, if that
exists; else ~/.lmstudio. MODELS is `downloadsFolder` in the home's settings.json, or else HOME/models.
(https://lmstudio.ai/docs/app/advanced/import-model, and the source of its command `lms`.)
"""

import os
import re
import shutil
from pathlib import Path

from nalora_mlx.core.errors import InputError

_MAX_PART = 100  # characters of a publisher or a name


def home() -> Path:
    """Return LM Studio's home directory, which need not exist."""
    pointer = Path.home() / ".lmstudio-home-pointer"
    if pointer.is_file() and (text := pointer.read_text(encoding="utf-8").strip()):
        return Path(text)
    older = Path.home() / ".cache" / "lm-studio"
    return older if older.exists() else Path.home() / ".lmstudio"


def models_directory() -> Path:
    """Return the directory of LM Studio's models, which need not exist."""
    from nalora_mlx.core.storage import read_json

    settings = home() / "settings.json"
    folder: object = None
    if settings.is_file():
        try:
            folder = read_json(settings).get("downloadsFolder")
        except InputError:  # LM Studio uses its default then, too
            folder = None
    return Path(folder) if isinstance(folder, str) and folder else home() / "models"


def model_path(name: str, type: str) -> Path:
    """Return the file of a model in LM Studio's directory.

    Args:
        name: PUBLISHER/NAME.
        type: type of the weights, which belongs to the file's name.

    Raises:
        InputError: the name does not have this form.
    """
    parts = name.split("/")
    if len(parts) != 2 or not all(map(_is_directory_name, parts)):
        raise InputError(
            f"--lmstudio {name}: give PUBLISHER/NAME, two names of directories, such as me/tuned"
        )
    return models_directory().joinpath(*parts, f"{parts[1]}-{type.upper()}.gguf")


def _is_directory_name(part: str) -> bool:
    return (
        0 < len(part) <= _MAX_PART
        and part == part.strip()
        and part[0] != "."
        and part[-1] != "."
        and not re.search(r'[<>:"\\|?*\x00-\x1f]', part)
    )


def place(source: Path, target: Path) -> None:
    """Make a file appear at a second path: as a hard link, or as a copy if that is on another file system."""
    from nalora_mlx.core.storage import write_file

    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)

    write_file(target, write)
