"Files, text and locks that several modules share."

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minecraft_jepa import utils
from minecraft_jepa.folders import lock_file, lock_folder, open_alone
from minecraft_jepa.utils import atomic_path, decode_text, read_or_make, write_json

ROOT = Path(__file__).parent.parent


def test_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"steps": 3})
    with pytest.raises(TypeError):
        write_json(path, {"steps": object()})

    def write_half():
        with atomic_path(path) as tmp_path:
            tmp_path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == '{\n "steps": 3\n}\n'
    assert os.listdir(tmp_path) == ["run.json"]


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "run.json"
    with atomic_path(path) as first, atomic_path(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["run.json"]


def test_what_a_killed_writer_left_is_removed_later(tmp_path):
    with atomic_path(tmp_path / "run.json") as path:
        old, new = (path.with_name(path.name.replace(path.name[10:20], 10 * c)) for c in "ab")
        path.write_text("now")
    for leftover in (old, new, tmp_path / ".run.json.mine.part", tmp_path / "run.json.part"):
        leftover.write_text("half")
    for leftover in tmp_path.iterdir():
        if leftover != new:
            os.utime(leftover, (0, 0))
    write_json(tmp_path / "run.json", 3)
    expected = {new.name, ".run.json.mine.part", "run.json.part", "run.json"}
    assert set(os.listdir(tmp_path)) == expected


def test_name_of_many_bytes_is_written(tmp_path):
    path = tmp_path / ("\u4e16" * 72 + ".json")  # 221 bytes
    write_json(path, [1])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_result_is_made_once_and_anew_where_what_decides_it_changes(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return {"value": made[-1]}

    path = tmp_path / "seed-0.json"
    first = read_or_make(path, {"steps": (3, 4)}, make)
    assert first["value"] == 0 and first["what"] == {"steps": [3, 4]} and first["seconds"] >= 0
    assert read_or_make(path, {"steps": (3, 4)}, make) == first
    assert read_or_make(path, {"steps": (3, 5)}, make)["value"] == 1
    assert read_or_make(path, {"steps": (3, 5)}, make)["value"] == 1
    for damaged in ("{", "[]", "{}"):
        path.write_text(damaged)
        assert read_or_make(path, {}, make)["what"] == {}
    assert len(made) == 5


def test_name_of_any_length_is_written(tmp_path):
    write_json(tmp_path / (250 * "n" + ".json"), 3)
    assert len(os.listdir(tmp_path)) == 1


def test_bytes_that_do_not_fit_on_the_disk_leave_nothing_behind(tmp_path, monkeypatch):
    def no_space(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with (
        pytest.raises(OSError, match="No space"),
        utils.atomic_path(tmp_path / "figure.png") as path,
    ):
        path.write_bytes(b"data")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"],
)
@pytest.mark.parametrize("text", ['{"a": "é\u2028"}', "[]", ""])
def test_text_is_decoded_whatever_program_wrote_it(encoding, text):
    assert decode_text(text.encode(encoding)) == text


def test_broken_bytes_are_refused_or_replaced():
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"{\xe2}")
    assert decode_text(b"{\xe2}", "replace") == "{\ufffd}"
    assert decode_text(b"\0\0{}") == "\0\0{}"  # zeros of a power cut are no UTF-16


# takes the lock of a folder, says so, and holds it until its input ends
HOLD = """
import sys
from minecraft_jepa.folders import lock_folder
with lock_folder(sys.argv[1]) as is_locked:
    print(is_locked, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"True\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_folder_is_locked_until_the_other_process_ends(tmp_path, other_process):
    with lock_folder(tmp_path) as is_locked:
        assert is_locked is False
    other_process.kill()
    with lock_folder(tmp_path, wait=True) as is_locked:
        assert is_locked is True
    assert os.listdir(tmp_path) == [".lock"]


def test_file_that_another_process_writes_is_left_alone(tmp_path):
    path = tmp_path / "a.part"
    first = open_alone(path)
    os.write(first, b"first")
    assert open_alone(path) is None
    os.replace(path, tmp_path / "a")
    second = open_alone(path)  # the name is free, and what was written stays
    os.write(second, b"2")
    os.close(first)
    os.close(second)
    assert [(tmp_path / name).read_text() for name in ("a", "a.part")] == ["first", "2"]
    os.close(open_alone(path))
    assert path.read_text() == ""


def test_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        1 / 0  # noqa: B018
    with lock_folder(tmp_path) as is_locked:
        assert is_locked is True


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_disk_without_locks_is_told(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(tmp_path) as is_locked:
        assert is_locked is None


def test_system_without_flock_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with open(tmp_path / "file", "w") as file:
        assert lock_file(file) is None


def test_lock_file_of_another_user_is_opened_for_reading(tmp_path, monkeypatch):
    "Files are opened as for a user who may not write them; root always may."
    (tmp_path / ".lock").touch()
    real_open = open

    def refuse_to_write(path, mode="r"):
        if mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, mode)

    monkeypatch.setattr("builtins.open", refuse_to_write)
    with lock_folder(tmp_path) as is_locked:
        assert is_locked is True
    (tmp_path / ".lock").unlink()
    with pytest.raises(PermissionError), lock_folder(tmp_path):
        pass


def test_lists_of_numbers_stand_on_one_line(tmp_path):
    value = {"a": [1, -2.5e-07, None], "b": ["x", "[\n1"], "c": [[1, 2], []], "d": {"e": [3]}}
    utils.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value
    assert '"a": [1, -2.5e-07, null]' in text and '"e": [3]' in text and "[1, 2]" in text
