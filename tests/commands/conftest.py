"""A Hugging Face Hub that records uploads."""

from typing import ClassVar

import pytest


class FakeApi:
    """Records what would be uploaded."""

    calls: ClassVar[list] = []

    def create_repo(self, repo_id, exist_ok):
        self.calls.append(("create", repo_id, exist_ok))

    def upload_folder(self, folder_path, repo_id, commit_message):
        files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        self.calls.append(("upload", repo_id, files, commit_message))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return FakeApi
