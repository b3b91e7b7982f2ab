"""Folders with predictable names below /tmp: private, or refused."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from esvit_core.errors import UserError
from esvit_core.private_folders import private_folder
from esvit_core.storage import ObjectStore, StoreAddress
from esvit_core.storage.upload_queue import pending_folder

NAME = f"esvit-things-{os.geteuid()}"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def folder() -> Path:
    return private_folder("things", "ESVIT_THINGS_DIR")


def test_the_folder_is_private_with_any_umask(temporary: Path) -> None:
    before = os.umask(0)
    try:
        assert folder() == temporary / NAME
    finally:
        os.umask(before)
    assert folder().stat().st_mode & 0o777 == 0o700


def test_a_folder_readable_by_others_is_made_private(temporary: Path) -> None:
    (temporary / NAME).mkdir()
    (temporary / NAME).chmod(0o755)
    assert folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["link", "file", "another user's", "open to others"])
def test_folders_that_others_may_have_created_are_refused(temporary: Path, what: str) -> None:
    place = temporary / NAME
    if what == "link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(temporary / "elsewhere")
    elif what == "file":
        place.write_text("x")
    else:
        place.mkdir()
        place.chmod(0o777 if what == "open to others" else 0o700)
        if what == "another user's":
            if os.geteuid():
                pytest.skip("only root can give a folder to another user")
            os.chown(place, 12345, 12345)
    words = {
        "link": "a link",
        "file": "(not a folder|cannot be created)",
        "another user's": "another user",
        "open to others": "writable by other",
    }
    with pytest.raises(UserError, match=rf"{NAME}: .*{words[what]}.*ESVIT_THINGS_DIR"):
        folder()


def test_pending_uploads_to_a_remote_store_are_in_a_private_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ESVIT_PENDING_DIR", raising=False)
    store = ObjectStore(StoreAddress("store.example:80", "key", "secret", secure=False, region="us-east-1"))
    parent = pending_folder(store, "s3://bucket/runs/a").parent
    assert parent == temporary / f"esvit-pending-{os.geteuid()}" and parent.stat().st_mode & 0o777 == 0o700
    parent.rmdir()
    parent.symlink_to(temporary)
    with pytest.raises(UserError, match=r"is a link.*ESVIT_PENDING_DIR"):
        pending_folder(store, "s3://bucket/runs/a")
