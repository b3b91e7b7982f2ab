"""Folders with predictable names below /tmp: this user's alone, or refused."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, StoreAddress
from esvit_core.storage.private_folders import private_folder
from esvit_core.storage.upload_queue import pending_folder

NAME = f"esvit-things-{os.geteuid()}"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def folder() -> Path:
    return private_folder("things", "ESVIT_THINGS_DIR")


def test_it_is_made_for_the_user_alone_whatever_the_umask(temporary: Path) -> None:
    before = os.umask(0)
    try:
        assert folder() == temporary / NAME
    finally:
        os.umask(before)
    assert folder().stat().st_mode & 0o777 == 0o700


def test_one_that_others_can_read_is_closed_to_them(temporary: Path) -> None:
    (temporary / NAME).mkdir()
    (temporary / NAME).chmod(0o755)
    assert folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["link", "file", "another user's", "open to others"])
def test_what_others_may_have_put_there_is_refused(temporary: Path, what: str) -> None:
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
        "file": "(no folder|cannot be made)",
        "another user's": "another user",
        "open to others": "written to by other",
    }
    with pytest.raises(UserError, match=rf"{NAME}: .*{words[what]}.*ESVIT_THINGS_DIR"):
        folder()


def test_what_waits_for_a_store_elsewhere_waits_in_such_a_folder(
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
