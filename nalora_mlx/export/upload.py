"""Uploads to the Hugging Face Hub: checks before the work, and the upload after it."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, RunError, first_line
from nalora_mlx.core.paths import is_hub_name


def check_upload(repo: str, flag: str = "--push-to-hub") -> None:
    """Check that a repo can be named so and that the user is logged in, before anything slow.

    Raises:
        InputError: names the flag.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{flag} {repo}: {first_line(error)}") from None
    if get_token() is None:
        raise InputError(f"{flag}: you are not logged in to Hugging Face; run hf auth login first")


def upload_directory(directory: Path, repo: str, kept: str, command: str) -> None:
    """Upload all files of a directory.

    Args:
        directory: what to upload.
        repo: name of the repo; it is created if it does not exist.
        kept: for the error message, what stays on this machine and where.
        command: the command that uploads, for the commit message.

    Raises:
        RunError: it failed. The local files stay.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=repo, commit_message=f"Upload with nalora {command}")
    except Exception as error:
        raise RunError(f"uploading to {repo} failed ({first_line(error)}); {kept}") from error
    print(f"uploaded to https://huggingface.co/{repo}")


def upload_adapter(
    directory: Path,
    repo: str,
    command: str,
    *,
    model: str,
    trained: Sequence[Path] = (),
    scaled: bool = False,
) -> None:
    """Upload an adapter with a model card: its weights and config, and nothing else of its directory.

    Args:
        directory: of an mlx-lm or a PEFT adapter.
        repo: name of the repo.
        command: the command that uploads.
        model: the base model, as the user named it.
        trained: directories of the runs that the adapter comes from, for the card.
        scaled: whether the adapter differs from that of the run, so that its losses do not apply.

    Raises:
        RunError: it failed. The adapter stays.
    """
    from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE
    from nalora_mlx.core.storage import copy_writer, read_json
    from nalora_mlx.export.model_card import adapter_card
    from nalora_mlx.export.peft_config import WEIGHTS as PEFT_FILE
    from nalora_mlx.models.hub import card_metadata, original_name
    from nalora_mlx.models.loading import local_directory

    is_peft = (directory / PEFT_FILE).exists()
    source = local_directory(model)
    # A PEFT adapter belongs to the model in full precision, one for mlx-lm to the model it was trained on.
    base = original_name(model, source, read_json(source / "config.json"))
    if is_hub_name(model) and not is_peft:
        base = model
    run = trained[0] if len(trained) == 1 else None
    card = adapter_card(
        repo,
        base=base,
        inherited=card_metadata(source),
        config=read_json(directory / ADAPTER_CONFIG),
        run=run,
        losses=not scaled,
    )
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        for name in (ADAPTER_CONFIG, PEFT_FILE if is_peft else ADAPTER_FILE):
            copy_writer(directory / name)(staging / name)
        (staging / "README.md").write_text(card, encoding="utf-8")
        upload_directory(staging, repo, f"the adapter is in {directory}", command)


@contextmanager
def uploading(config: RunConfig) -> Iterator[None]:
    """Check that the adapter of a run of `nalora lora` can be uploaded, and upload it when the `with` block ends.

    It does neither unless push_to_hub says so, and does not upload after an error or a signal.

    Raises:
        InputError: the repo's name is not valid, or the user is not logged in.
        RunError: the upload failed. The run stays.
    """
    if not config.push_to_hub or not config.train:
        yield
        return
    check_upload(config.push_to_hub)
    yield
    from nalora_mlx.training.distributed import workers

    if not config.plan and not workers().rank:
        directory = Path(config.adapter_path).expanduser()
        upload_adapter(directory, config.push_to_hub, "lora", model=config.model, trained=[directory])
