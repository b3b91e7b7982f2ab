"""Folders, archives and prefixes as sources, and their problems."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.data.ingest.archives import FileReadError
from esvit_core.data.ingest.entry_names import bytes_of_name, name_of_bytes
from esvit_core.data.ingest.sources import check_source, open_source, source_fingerprint
from esvit_core.errors import InfrastructureError, UserError

FILES = {"cat/1.png": b"one", "cat/sub/2.png": b"two", "dög/ü 3.png": b"three"}
TARS = {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz", "tgz": "w:gz"}


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for member, data in members:
            entry = tarfile.TarInfo(member) if isinstance(member, str) else member
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def zip_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            with (
                pytest.warns(UserWarning, match="Duplicate") if name in archive.namelist() else contextlib.nullcontext()
            ):
                archive.writestr(name, data)
    return path


def contents(source: object, store=None) -> dict[str, bytes]:
    with open_source(str(source), store) as opened:
        return {entry.name: opened.read(entry) for entry in opened.entries if entry.problem is None}


def problems(source: object) -> dict[str, str]:
    """Return the problem of each unusable file, from the listing or from reading it."""
    found = {}
    with open_source(str(source)) as opened:
        for entry in opened.entries:
            try:
                if entry.problem is None:
                    opened.read(entry)
                else:
                    found[entry.name] = entry.problem
            except FileReadError as error:
                found[entry.name] = str(error)
    return found


@pytest.fixture(params=["folder", *TARS, "zip"])
def source(request, tmp_path, make) -> Path:
    """The same files as each type of source."""
    if request.param == "folder":
        return make.folder(tmp_path / "folder", FILES)
    path = tmp_path / f"files.{request.param}"
    return (
        zip_of(path, [*FILES.items()])
        if request.param == "zip"
        else tar_of(path, [*FILES.items()], TARS[request.param])
    )


def test_all_types_of_sources_contain_the_same_images(source):
    assert contents(source) == FILES
    check_source(str(source))


def test_a_prefix_contains_the_same_images(store):
    for name, data in FILES.items():
        store.put_bytes(store.uri(f"in/{name}"), data)
    store.put_bytes(store.uri("inside/9.png"), b"of another prefix")
    assert contents(store.uri("in"), store) == contents(store.uri("in/"), store) == FILES


def test_an_archive_in_the_store_is_opened(store, tmp_path):
    store.put_file(store.uri("a/files.tar.gz"), tar_of(tmp_path / "x", [*FILES.items()], "w:gz"))
    assert contents(store.uri("a/files.tar.gz"), store) == FILES


def test_check_and_fingerprint_of_a_prefix_use_the_store_of_the_environment(store_env):
    uri = store_env.uri("in")
    with pytest.raises(UserError, match="no images in it"):
        check_source(uri)
    store_env.put_bytes(f"{uri}/1.png", b"one")
    check_source(uri)
    first = source_fingerprint(uri)
    assert first == source_fingerprint(uri, store_env) and len(first) == 64
    store_env.put_bytes(f"{uri}/1.png", b"two")
    assert source_fingerprint(uri) != first


def test_the_last_of_several_entries_with_one_name_is_used(tmp_path):
    members = [("a/1.png", b"old"), ("a/2.png", b"x"), ("./a/1.png", b"new")]
    for path in (
        tar_of(tmp_path / "a.tar", members),
        zip_of(tmp_path / "a.zip", [members[0], members[1], ("a/1.png", b"new")]),
    ):
        assert contents(path) == {"a/1.png": b"new", "a/2.png": b"x"}
        with open_source(str(path)) as opened:
            assert opened.duplicates == 1


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png"])
def test_paths_outside_the_archive_are_refused_and_nothing_is_written(tmp_path, name):
    for path in (tar_of(tmp_path / "a.tar", [(name, b"x")]), zip_of(tmp_path / "a.zip", [(name, b"x")])):
        assert list(problems(path).values()) == ["path outside the archive"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.zip"]


class RawName(zipfile.ZipInfo):
    """An entry of a zip whose name is written as the given bytes, without the flag for UTF-8."""

    def __init__(self, raw: bytes, system: int = 0, extra: bytes = b"") -> None:
        super().__init__(raw.decode("cp437").replace("\\", "?"))
        self.raw, self.create_system, self.extra = raw, system, extra

    def _encodeFilenameFlags(self):  # noqa: N802 (zipfile's name)
        return self.raw, self.flag_bits & ~0x800


def raw_zip(path: Path, names: Iterable[bytes], system: int = 0, extra: bytes = b"") -> Path:
    """Write a zip with the names as given; the content of each entry is its name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(RawName(name, system, extra), b"" if name.endswith((b"/", b"\\")) else name)
    return path


def test_a_backslash_separates_folders_only_where_the_archive_was_made_on_windows(tmp_path):
    names = [b"cat\\", b"cat\\1.png", b"dog/2.png"]
    assert contents(raw_zip(tmp_path / "a.zip", names)) == {"cat/1.png": names[1], "dog/2.png": names[2]}
    found = contents(raw_zip(tmp_path / "b.zip", names, system=3))  # made on Unix, where it is a character like others
    assert found == {"cat\\1.png": names[1], "dog/2.png": names[2]}


@pytest.mark.parametrize(
    ("encoding", "folders"),
    [
        ("utf-8", ["grün", "été"]),
        ("cp437", ["grün", "été", "Möwe"]),
        ("cp932", ["写真表", "能登半島", "ソ"]),  # two of them contain the byte of a backslash
        ("gb18030", ["照片", "新建文件夹", "风景"]),
        ("cp949", ["고양이", "강아지"]),
        ("cp866", ["кошка", "собака"]),
    ],
)
def test_the_encoding_of_names_in_a_zip_is_detected_and_named(tmp_path, encoding, folders):
    names = [f"{folder}/{i}.png" for folder in folders for i in range(4)]
    path = raw_zip(tmp_path / "a.zip", [name.encode(encoding) for name in names])
    assert contents(path) == {name: name.encode(encoding) for name in names}
    with open_source(str(path)) as opened:
        assert (f"read as {encoding} " in " ".join(opened.notes)) == (encoding != "utf-8")


def test_a_stated_name_needs_no_detection(tmp_path):
    raw = "grün.png".encode("cp437")
    field = b"\x01" + struct.pack("<I", zlib.crc32(raw)) + "写真.png".encode()
    extra = struct.pack("<HH", 0x7075, len(field)) + field
    assert list(contents(raw_zip(tmp_path / "a.zip", [raw], extra=extra))) == ["写真.png"]
    assert list(contents(raw_zip(tmp_path / "b.zip", [b"other" + raw], extra=extra))) == ["othergrün.png"]


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_names_that_are_not_utf_8_stay_different(tmp_path, kind):
    """Bytes of two characters each: replaced by one mark each, they would be the same name."""
    names = [f"{c}.png".encode("gbk") for c in "猫狗鸟鱼马牛羊猪鸡鸭"]
    if kind == "tar":
        path = tar_of(tmp_path / "a.tar", [(name.decode("utf-8", "surrogateescape"), name) for name in names])
    else:
        path = tmp_path / "folder"
        path.mkdir()
        for name in names:
            (path / os.fsdecode(name)).write_bytes(name)
    found = contents(path)
    assert len(found) == 10 and found["%B9%B7.png"] == "狗.png".encode("gbk")
    assert {bytes_of_name(name): content for name, content in found.items()} == {name: name for name in names}


@given(
    st.lists(
        st.one_of(
            st.binary(),
            st.sampled_from(
                [b"%E4", b"%25E4", b"\xe4", b"%", b"%E4%B8%AD", b"\xe4%E4", b"\n", b"%0A", "\u202eä".encode()]
            ),
        )
    )
)
def test_the_escape_of_names_is_reversible_and_can_be_printed(parts):
    raw = b"".join(parts)
    name = name_of_bytes(raw)
    assert bytes_of_name(name) == raw and name.encode().decode() == name
    assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") or c == "\u202e" for c in name)


@pytest.mark.parametrize("kind", ["tar", "zip", "folder"])
def test_names_that_would_end_a_line_or_steer_the_terminal_are_escaped(tmp_path, kind):
    files = {"a\nb/ü\x1b[2J.png": b"1", "a\nb/%0A.png": b"2"}
    if kind == "folder":
        path = tmp_path / "folder"
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    else:
        path = {"tar": tar_of, "zip": zip_of}[kind](tmp_path / f"a.{kind}", [*files.items()])
    assert contents(path) == {"a%0Ab/ü%1B[2J.png": b"1", "a%0Ab/%250A.png": b"2"}


@pytest.mark.parametrize("name", ["a%20b.png", "100%.png", "%E4%B8%AD.png", "grün.png"])
def test_names_in_utf_8_stay_as_they_are(name):
    assert name_of_bytes(name.encode()) == name


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def test_links_in_a_tar_are_followed_inside_it(tmp_path):
    members = [
        ("a/1.png", b"one"),
        (link("b/2.png", "../a/1.png"), b""),
        (link("c.png", "a/1.png", tarfile.LNKTYPE), b""),
    ]
    assert contents(tar_of(tmp_path / "a.tar", members)) == {"a/1.png": b"one", "b/2.png": b"one", "c.png": b"one"}


def test_links_to_the_outside_and_devices_have_a_problem(tmp_path):
    device = tarfile.TarInfo("tty.png")
    device.type = tarfile.CHRTYPE
    members = [(link("out.png", "/etc/passwd"), b""), (link("me.png", "me.png"), b""), (device, b""), ("1.png", b"one")]
    assert problems(tar_of(tmp_path / "a.tar", members)) == {
        "out.png": "broken link",
        "me.png": "circular link",
        "tty.png": "not a regular file",
    }


def test_unusual_files_in_a_folder_have_a_problem(tmp_path, make):
    folder = make.folder(tmp_path / "x", {"1.png": b"one", "sub/2.png": b"two", "long" + "g" * 240 + ".png": b"three"})
    (folder / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")  # opening it would block forever
    Path(os.fsdecode(os.fsencode(str(folder)) + b"/bad\xff.png")).write_bytes(b"four")
    (folder / "sub" / "round").symlink_to(folder)
    (folder / "other.png").symlink_to("1.png")
    assert problems(folder) == {"gone.png": "broken link", "pipe.png": "not a regular file"}
    found = contents(folder)
    assert found["other.png"] == b"one" and found["bad%FF.png"] == b"four" and len(found) == 5


def test_unreadable_files_and_folders_have_a_problem(tmp_path, make, monkeypatch):
    """Permissions do not apply to root, who may run the tests, so the refusal is simulated."""
    folder = make.folder(tmp_path / "x", {"1.png": b"one", "2.png": b"two", "closed/3.png": b"three"})
    read, scan = Path.read_bytes, os.scandir

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path) if path.name == "2.png" else read(path))
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if str(path).endswith("closed") else scan(path))
    assert problems(folder) == {
        "2.png": "cannot be read (Permission denied)",
        "closed": "unreadable folder (Permission denied)",
    }
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
        check_source(str(folder / "closed"))


def test_encrypted_and_damaged_entries_of_a_zip_have_a_problem(tmp_path):
    path = zip_of(tmp_path / "a.zip", [("1.png", b"one" * 50), ("2.png", b"two"), ("3.png", b"three")])
    data = bytearray(path.read_bytes())
    data[data.index(b"oneone")] ^= 1  # invalidates its checksum
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        place = archive.start_dir
    second = data.index(b"PK\x01\x02", place + 4)
    data[second + 8] |= 1  # the encryption flag
    path.write_bytes(data)
    found = problems(path)
    assert found["2.png"] == "encrypted" and found["1.png"].startswith("damaged archive entry") and len(found) == 2


@pytest.mark.parametrize("kind", TARS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.97])
def test_a_truncated_archive_is_an_error(tmp_path, kind, share):
    members = [(f"{i}.png", os.urandom(3000)) for i in range(9)]
    path = tar_of(tmp_path / f"a.{kind}", members, TARS[kind])
    size = int(path.stat().st_size * share) if kind != "tar" else int(9 * (512 + 3072) * share)
    os.truncate(path, size)
    with pytest.raises(UserError, match=r"a\.\S+: damaged archive"), open_source(str(path)):
        pass


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0"])
def test_a_few_bytes_that_begin_like_a_compressed_archive_are_an_error(tmp_path, start):
    (tmp_path / "a.tar.gz").write_bytes(start + b"garbage")
    with pytest.raises(UserError, match=r"a\.tar\.gz: damaged archive"), open_source(str(tmp_path / "a.tar.gz")):
        pass


def test_a_tar_cut_between_two_files_is_an_error(tmp_path):
    path = tar_of(tmp_path / "a.tar", [(f"{i}.png", bytes(512)) for i in range(4)])
    os.truncate(path, 2 * 1024)
    with pytest.raises(UserError, match="end marker is missing"), open_source(str(path)):
        pass


def test_a_truncated_zip_is_an_error(tmp_path):
    path = zip_of(tmp_path / "a.zip", [*FILES.items()])
    os.truncate(path, path.stat().st_size - 30)
    with pytest.raises(UserError, match="damaged archive"):
        check_source(str(path))


@pytest.mark.parametrize("use", [check_source, source_fingerprint])
def test_a_missing_source_is_a_one_line_error(tmp_path, use):
    with pytest.raises(UserError, match=r"nowhere: does not exist; expected a folder, a tar") as error:
        use(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


def test_a_source_that_is_neither_folder_nor_archive(tmp_path, make):
    path = tmp_path / "photo.jpg"
    path.write_bytes(make.file(0, "JPEG"))
    with pytest.raises(UserError, match="neither a folder nor an archive"):
        check_source(str(path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a folder nor a regular file"):
        check_source(str(tmp_path / "pipe"))


@pytest.mark.parametrize("files", [{}, {"a.txt": b"x"}, {".hidden/1.png": b"x", "Thumbs.db": b"y", "data.csv": b"z"}])
def test_a_source_without_images(tmp_path, make, files):
    folder = make.folder(tmp_path / "x", files)
    folder.mkdir(exist_ok=True)
    for path in (folder, tar_of(tmp_path / "x.tar", [*files.items()]), zip_of(tmp_path / "x.zip", [*files.items()])):
        with pytest.raises(UserError, match=r"x\S*: no images in it"):
            check_source(str(path))


def test_files_without_a_suffix_may_be_images(tmp_path, make):
    check_source(str(make.folder(tmp_path / "x", {"0123abcd": make.file(0)})))


def test_a_full_disk_during_decompression_is_an_infrastructure_error(tmp_path, monkeypatch):
    path = tar_of(tmp_path / "a.tar.gz", [*FILES.items()], "w:gz")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esvit_core.data.ingest.archives.shutil.copyfileobj", full)
    with pytest.raises(InfrastructureError, match="to decompress it"), open_source(str(path)):
        pass
