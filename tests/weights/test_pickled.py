"""Files that try to execute code while they are read, and files that are not checkpoints."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from esvit_core.errors import UserError
from esvit_core.weights.pickled import load_pickled


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def harmful(mark: Path) -> dict[str, object]:
    run = f"open({str(mark)!r}, 'w')"
    return {
        "os.system": Calls(os.system, f"touch {mark}"),
        "builtins.eval": Calls(eval, run),
        "builtins.exec": Calls(exec, run),
        "builtins.getattr": Calls(getattr, "text", "upper"),
        "subprocess": Calls(__import__("subprocess").check_call, ["touch", str(mark)]),
        "pickle.loads": Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {mark}"))),
        "numpy.load": Calls(np.load, str(mark)),
        "numpy array of objects": np.array([Calls(os.system, f"touch {mark}")], dtype=object),
        "numpy number of objects": Calls(np.float64(1).__reduce__()[0], np.dtype("O"), pickle.dumps(1)),
        "numpy array": np.zeros(3),
        "torch.hub": Calls(torch.hub.load, "a", "b"),
    }


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", harmful(Path("x")))
def test_calls_in_a_pickle_are_refused_and_not_executed(name, new_format, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "bad.pth"
    payload = {"student": {"a": torch.zeros(2)}, "args": harmful(mark)[name]}
    torch.save(payload, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError) as caught:
        load_pickled(path)
    assert not mark.exists()
    assert str(path) in str(caught.value)
    if not name.startswith("numpy number"):
        assert "refused, because reading it would call" in str(caught.value)
        assert "nothing was executed" in str(caught.value)


@pytest.mark.parametrize("value", [np.float64(0.25), np.float32(-2), np.int64(7), np.int32(-7), np.bool_(True)])
def test_numpys_numbers_become_pythons(value, tmp_path):
    torch.save({"lr": value}, tmp_path / "a.pth")
    read = load_pickled(tmp_path / "a.pth")["lr"]
    assert read == value.item() and type(read) is type(value.item())


def test_the_legacy_format_is_read(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickled(tmp_path / "a.pth")["a"], torch.arange(3))


def broken(kind: str) -> bytes:
    whole = io.BytesIO()
    torch.save({"a": torch.randn(1000)}, whole)
    if kind == "half":
        return whole.getvalue()[: len(whole.getvalue()) // 2]
    if kind == "another zip":
        other = io.BytesIO()
        with zipfile.ZipFile(other, "w") as archive:
            archive.writestr("readme.txt", "hello")
        return other.getvalue()
    if kind == "torchscript":
        scripted = io.BytesIO()
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), scripted)
        return scripted.getvalue()
    return {"empty": b"", "text": b"epoch 1: 77.0 %\n" * 20, "image": b"\x89PNG\r\n\x1a\n" + bytes(200)}[kind]


@pytest.mark.parametrize("kind", ["half", "another zip", "torchscript", "empty", "text", "image"])
def test_an_invalid_checkpoint_is_one_line(kind, tmp_path):
    path = tmp_path / "odd.pth"
    path.write_bytes(broken(kind))
    with pytest.raises(UserError) as caught:
        load_pickled(path)
    expected = (
        "damaged, or not a checkpoint" if kind in ("half", "another zip", "torchscript") else "not a file of torch.save"
    )
    assert expected in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_cut_anywhere_is_an_error_of_the_users(tmp_path):
    whole = io.BytesIO()
    torch.save({"a": torch.randn(20), "b": np.float64(2)}, whole)
    data = whole.getvalue()
    for end in range(0, len(data) - 1, 37):
        (tmp_path / "cut.pth").write_bytes(data[:end])
        with pytest.raises(UserError):
            load_pickled(tmp_path / "cut.pth")


def test_a_missing_file_and_a_folder_are_reported(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load_pickled(path)
