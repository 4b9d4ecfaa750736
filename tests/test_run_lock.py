"""One run in a folder: the lock, also on disks without locks and on another machine."""

import json

import pytest
from training_runs import (
    FORKS,
    store_fixture,  # noqa: F401
    train_small,
)

from minecraft_jepa.training import run_lock
from minecraft_jepa.training.run_lock import InUseError


def test_a_folder_in_use_is_refused(store, tmp_path):
    lock = run_lock.FolderLock(tmp_path / "out")
    with pytest.raises(InUseError, match=r"a run is at work here already \(process"):
        train_small(store, tmp_path / "out")
    lock.release()
    train_small(store, tmp_path / "out", steps=1)
    assert not (tmp_path / "out/.running").exists()


def test_the_same_run_started_twice_is_told_on_a_disk_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "lock_file", lambda file: None)
    lock = run_lock.FolderLock(tmp_path)
    with pytest.raises(InUseError):
        run_lock.FolderLock(tmp_path)
    lock.release()

    ended = FORKS.Process(target=int)
    ended.start()
    ended.join()
    identity = run_lock._process_identity()
    killed = {"pid": ended.pid}  # it left its file
    of_another_process = {"started": "1"}  # its number is another process's now
    for change in (killed, of_another_process):
        (tmp_path / ".running").write_text(json.dumps(identity | change))
        run_lock.FolderLock(tmp_path).release()


def test_a_run_on_another_machine_is_told_while_its_heartbeat_moves(tmp_path, monkeypatch):
    process_identity = run_lock._process_identity

    def identity_elsewhere():
        return process_identity() | {"host": "elsewhere", "boot": "another"}

    monkeypatch.setattr(run_lock.FolderLock, "heartbeat_seconds", 0.1)
    monkeypatch.setattr(run_lock.FolderLock, "watch_seconds", 20.0)
    # A lock that holds on one machine alone.
    monkeypatch.setattr(run_lock, "lock_file", lambda file: True)
    with monkeypatch.context() as m:
        m.setattr(run_lock, "_process_identity", identity_elsewhere)
        lock = run_lock.FolderLock(tmp_path)
    with pytest.raises(InUseError, match="on elsewhere"):
        run_lock.FolderLock(tmp_path)
    lock.stop.set()
    lock.thread.join()
    monkeypatch.setattr(run_lock.FolderLock, "watch_seconds", 0.6)
    run_lock.FolderLock(tmp_path).release()
