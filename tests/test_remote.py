"""Recordings carried away in parts, weights brought back: whole, on any Python 3.11, checked."""

import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile

import pytest
from contractor import lines_of, name_of, write_pair

from minecraft_jepa.config import preset
from minecraft_jepa.data import checks
from minecraft_jepa.data.checks import CHECKS_FILE, check_folder, find_recordings, read_checks
from minecraft_jepa.data.splits import load_split
from minecraft_jepa.planning.inverse_model import InverseModel
from minecraft_jepa.planning.temporal_distance import TemporalDistance
from minecraft_jepa.training import remote, weight_parts
from minecraft_jepa.training.model_card import write_model_card
from minecraft_jepa.training.packing import MIB, pack, unpack
from minecraft_jepa.training.run_identity import PLANNING_FILES
from minecraft_jepa.training.run_lock import FolderLock, InUseError
from minecraft_jepa.training.weight_parts import join_weights, split_weights

NAMES = [name_of(player) for player in ("a", "b", "c", "d", "e")]
WHOLE_NAMES, BROKEN_NAME = NAMES[:4], NAMES[4]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Five recordings of five players, one of them broken, and their split."""
    folder = tmp_path_factory.mktemp("recordings")
    for seed, name in enumerate(NAMES):
        write_pair(folder, name, 20, lines_of(19), seed)
    (folder / f"{BROKEN_NAME}.mp4").write_bytes(b"no video")
    a, b, c, d, e = NAMES
    split = {"train": [a, b, e], "validation": [c], "test": [d]}
    (folder / "split.json").write_text(json.dumps(split))
    check_folder(folder, decode=True, progress=False)
    return folder


def pack_and_unpack(folder, tmp_path):
    """The recordings of a folder, where they arrive."""
    pack(folder, tmp_path / "parts")
    unpack(tmp_path / "parts", tmp_path / "arrived")
    return tmp_path / "arrived"


def file_bytes(folder, names):
    """{file: bytes} of these recordings."""
    files = [f"{name}{suffix}" for name in names for suffix in (".mp4", ".jsonl")]
    return {file: (folder / file).read_bytes() for file in files}


def without_files(check):
    """A recording's check without size and time of its files."""
    return {key: value for key, value in check.items() if key != "files"}


# Recordings


def test_what_was_left_out_is_known_where_the_rest_arrives(recordings, tmp_path):
    arrived = pack_and_unpack(recordings, tmp_path)
    assert [path.stem for path in find_recordings(arrived)] == sorted(WHOLE_NAMES)
    assert file_bytes(arrived, WHOLE_NAMES) == file_bytes(recordings, WHOLE_NAMES)
    assert load_split(arrived) == load_split(recordings)
    packed_checks, arrived_checks = read_checks(recordings), read_checks(arrived)
    assert set(arrived_checks) == set(NAMES)  # every check holds where it arrives
    for name in NAMES:
        assert without_files(arrived_checks[name]) == without_files(packed_checks[name])
    assert not arrived_checks[BROKEN_NAME]["used"]
    assert arrived_checks[BROKEN_NAME]["why"]
    rows = check_folder(arrived, progress=False)
    assert [row["used"] for row in rows] == [True] * 4
    assert all(row["decoded"] for row in rows)


def test_split_holds_when_others_unpack_the_parts(recordings, tmp_path):
    arrived = tmp_path / "arrived"
    for part in pack(recordings, tmp_path / "parts"):
        with tarfile.open(part) as tar:
            tar.extractall(arrived)
    assert load_split(arrived) == load_split(recordings)
    assert set(read_checks(arrived)) == set(NAMES)


def test_checks_kept_in_the_cache_travel_too(recordings, tmp_path, monkeypatch):
    """The checks of a folder that may only be read are not beside the recordings."""
    monkeypatch.setenv("MINECRAFT_JEPA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "read only"
    shutil.copytree(recordings, folder)
    (folder / CHECKS_FILE).unlink()
    write_json, refused = checks.write_json, []

    def refuse(path, value):
        if path == folder / CHECKS_FILE:
            refused.append(path)
            raise PermissionError(13, "Permission denied")
        write_json(path, value)

    monkeypatch.setattr(checks, "write_json", refuse)
    check_folder(folder, progress=False)
    assert refused
    assert not (folder / CHECKS_FILE).exists()
    arrived = pack_and_unpack(folder, tmp_path)
    assert set(read_checks(arrived)) == set(NAMES)
    assert load_split(arrived) == load_split(folder)


@pytest.mark.parametrize("by", ["manifest", "nothing"])
def test_split_is_the_same_without_a_split_file(tmp_path, by):
    folder = tmp_path / "recordings"
    for name in NAMES:
        write_pair(folder, name, 20, lines_of(19))
    (folder / f"{BROKEN_NAME}.jsonl").write_text("{")
    if by == "manifest":
        splits = zip(NAMES, ("train", "validation", "test", "train", "train"))
        rows = {name: {"url": f"http://a/{name}.mp4", "side": split} for name, split in splits}
        manifest = {"split_by": "player", "recordings": rows}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    check_folder(folder, progress=False)
    arrived = pack_and_unpack(folder, tmp_path)
    assert load_split(arrived) == load_split(folder)


def test_suffixes_in_capitals_arrive_in_small_letters(recordings, tmp_path):
    folder, name = tmp_path / "capitals", WHOLE_NAMES[0]
    folder.mkdir()
    shutil.copy(recordings / f"{name}.mp4", folder / f"{name}.MP4")
    shutil.copy(recordings / f"{name}.jsonl", folder / f"{name}.Jsonl")
    arrived = pack_and_unpack(folder, tmp_path)
    assert file_bytes(arrived, [name]) == file_bytes(recordings, [name])


def test_links_are_carried_as_the_files_they_point_to(recordings, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for path in recordings.iterdir():
        if path.name not in (CHECKS_FILE, "split.json") and not path.name.startswith(BROKEN_NAME):
            (links / path.name).symlink_to(path)
    for suffix in (".mp4", ".jsonl"):  # the same file once more
        os.link(recordings / f"{NAMES[0]}{suffix}", links / f"again{suffix}")
    split = load_split(recordings)
    split = {part: [n for n in names if n != BROKEN_NAME] for part, names in split.items()}
    split["train"].append("again")
    (links / "split.json").write_text(json.dumps(split))
    arrived = pack_and_unpack(links, tmp_path)
    assert file_bytes(arrived, WHOLE_NAMES) == file_bytes(recordings, WHOLE_NAMES)
    first_video = (recordings / f"{NAMES[0]}.mp4").read_bytes()
    assert (arrived / "again.mp4").read_bytes() == first_video
    assert not any(path.is_symlink() for path in arrived.iterdir())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("store.json", "a clip store, not recordings"),
        ("shards.json", "a folder of shards, not recordings"),
    ],
)
def test_clip_store_in_place_of_recordings_is_told(tmp_path, file, message):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        pack(tmp_path, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def largest_file(folder):
    return max(map(len, file_bytes(folder, WHOLE_NAMES).values()))


def test_parts_are_of_the_size_asked_for(recordings, tmp_path):
    largest, out = largest_file(recordings), tmp_path / "parts"
    limit = largest + 12 * 1024
    parts = pack(recordings, out, limit)
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) <= limit
    with pytest.raises(ValueError, match="raise limit"):
        pack(recordings, out, largest)
    assert sorted(out.iterdir()) == parts  # the earlier ones


# Parts that can't be trusted


def write_part(folder, *members):
    """part-000-of-001.tar of (TarInfo, bytes), as `pack` would never write it."""
    folder.mkdir()
    with tarfile.open(folder / "part-000-of-001.tar", "w") as tar:
        for member, contents in members:
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return folder


def make_member(name, kind=tarfile.REGTYPE, target="", **headers):
    member = tarfile.TarInfo(name)
    member.pax_headers = headers
    member.type, member.linkname = kind, target
    return member


HOSTILE = {
    "absolute": make_member("/tmp/outside.mp4"),
    "up": make_member("../outside.mp4"),
    "deep": make_member("a/b.mp4"),
    "up from within": make_member("a/../../outside.mp4"),
    "back slash": make_member("..\\outside.mp4"),
    "hidden": make_member(".bashrc"),
    "hidden recording": make_member(".a.mp4"),
    "a program": make_member("train.py"),
    "symbolic link": make_member("a.mp4", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": make_member("a.mp4", tarfile.LNKTYPE, "../outside"),
    "pipe": make_member("a.mp4", tarfile.FIFOTYPE),
    "device": make_member("a.mp4", tarfile.CHRTYPE),
    "block device": make_member("a.mp4", tarfile.BLKTYPE),
    "folder": make_member("a.mp4", tarfile.DIRTYPE),
    "sparse": make_member("a.mp4", **{"GNU.sparse.map": "0,0", "GNU.sparse.size": "1000000000"}),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_parts_that_lead_out_of_the_folder_are_refused(tmp_path, hostile):
    honest = make_member("first.mp4")
    parts = write_part(tmp_path / "parts", (honest, b"fine"), (hostile, b""))
    with pytest.raises(ValueError, match="do not trust these parts"):
        unpack(parts, tmp_path / "arrived")
    assert sorted(tmp_path.iterdir()) == [parts]


def test_link_where_a_file_is_unpacked_is_not_followed(tmp_path):
    outside, arrived = tmp_path / "outside", tmp_path / "arrived"
    outside.write_text("mine")
    arrived.mkdir()
    for name in ("a.mp4", "a.mp4.part"):
        (arrived / name).symlink_to(outside)
    member = make_member("a.mp4")
    member.mode, member.uid, member.mtime = 0o6777, 0, 2**40
    unpack(write_part(tmp_path / "parts", (member, b"theirs")), arrived)
    assert outside.read_text() == "mine"
    unpacked = arrived / "a.mp4"
    assert not unpacked.is_symlink()
    assert unpacked.read_bytes() == b"theirs"
    assert unpacked.stat().st_mode & 0o7000 == 0


def test_part_that_is_missing_or_cut_is_named(recordings, tmp_path):
    out, arrived = tmp_path / "parts", tmp_path / "arrived"
    parts = pack(recordings, out, largest_file(recordings) + 12 * 1024)
    assert len(parts) > 2
    contents = parts[1].read_bytes()
    num_bytes = len(contents)
    for size in (0, 100, 700, num_bytes // 2, num_bytes - 10240, num_bytes - 1):
        parts[1].write_bytes(contents[:size])
        with pytest.raises(ValueError, match=r"part-001-of-\d+.tar: no whole tar file"):
            unpack(out, arrived)
    parts[1].write_bytes(contents)
    for part in (parts[1], parts[0], parts[-1]):  # the last one has the split
        part.rename(tmp_path / part.name)
        with pytest.raises(ValueError, match=rf"{part.name} is missing; bring it too"):
            unpack(out, arrived)
        (tmp_path / part.name).rename(part)
    (out / "part-000-of-001.tar").write_bytes(contents)
    with pytest.raises(ValueError, match="parts of several packings"):
        unpack(out, arrived)
    assert not arrived.exists()


def test_nothing_newer_than_the_first_python_3_11_is_used(recordings, tmp_path, monkeypatch):
    """3.11.2's tarfile has neither `filter` nor what comes with it."""
    for name in ("data_filter", "tar_filter", "fully_trusted_filter", "FilterError"):
        monkeypatch.delattr(tarfile, name, raising=False)
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)
    monkeypatch.setattr(tarfile.TarFile, "extract", None)
    assert load_split(pack_and_unpack(recordings, tmp_path))


def test_several_processes_are_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process: start it without torchrun"):
        remote.train_packed(tmp_path / "parts", tmp_path / "run", preset("tiny"))
    assert not (tmp_path / "run").exists()


def test_recordings_of_other_parts_are_not_trained_on_too(recordings, tmp_path, monkeypatch):
    parts, run = tmp_path / "parts", tmp_path / "run"
    monkeypatch.setattr(remote, "run_training", lambda *args: {})
    pack(recordings, parts)
    remote.train_packed(parts, run, None, device="cpu")
    remote.train_packed(parts, run, None, device="cpu")  # again after a stop
    write_pair(run / "recordings", "stray", 4, lines_of(4))
    with pytest.raises(ValueError, match=r"stray.jsonl is there, and not in .*parts"):
        remote.train_packed(parts, run, None, device="cpu")


def test_two_trainings_in_one_folder_do_not_unpack_at_once(recordings, tmp_path, monkeypatch):
    parts, run = tmp_path / "parts", tmp_path / "run"
    monkeypatch.setattr(remote, "run_training", lambda *args: {})
    pack(recordings, parts)
    lock = FolderLock(run)
    with pytest.raises(InUseError, match="a run is at work here already"):
        remote.train_packed(parts, run, None, device="cpu")
    assert not (run / "recordings").exists()
    lock.release()
    remote.train_packed(parts, run, None, device="cpu")


# Weights: no networks are needed, files of bytes will do


SUMMARY = {
    "preset": "tiny",
    "steps": 7,
    "decoder_steps": 3,
    "seed": 1,
    "device": "cpu",
    "seconds": {"world_model": 60, "decoders": 60},
    "train": ["a"],
    "validation": ["b"],
}
CONFIG = {
    "train": {"batch_size": 4, "decoder_batch_size": 4},
    "frame": {"height": 48, "width": 80},
    "jepa": {"anti_collapse": "ema"},
}
METHODS = "model", "copy_last", "shuffled_actions", "no_op"
REPORT = {
    "recordings": ["c"],
    "horizons": {"1": {method: {"mean": 0.125} for method in METHODS}},
}


def write_run(folder, weights, with_log=True, **changes):
    """A folder as training leaves it."""
    folder.mkdir(parents=True)
    for name in ("world_model", "dit", "head"):
        (folder / f"{name}.safetensors").write_bytes(f"{name} {weights}".encode() * 99)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "training.json").write_text(json.dumps(SUMMARY | changes))
    if with_log:
        rows = [json.dumps({"step": i, "loss": 1.0 / (i + 1)}) for i in range(5)]
        (folder / "world_model.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def evaluate(folder, **changes):
    """An evaluation beside the weights; returns their card."""
    (folder / "evaluate.json").write_text(json.dumps(REPORT | changes))
    write_model_card(folder)
    return (folder / "README.md").read_text()


def test_nothing_of_the_old_weights_stays_beside_new_ones(tmp_path):
    target = write_run(tmp_path / "weights", "old", seed=1)
    (target / "world_model.png").write_bytes(b"old picture")
    (target / "mine.txt").write_text("kept")
    for name in PLANNING_FILES:
        (target / name).write_bytes(b"learned from the old latents")
    assert "| 1 | 0.125 |" in evaluate(target)
    assert (target / "curves.png").is_file()
    run = write_run(tmp_path / "run", "new", with_log=False, seed=2)
    split_weights(run, run / "parts", 1000)
    join_weights(run / "parts", target)
    card = (target / "README.md").read_text()
    assert "seed 2" in card
    assert "0.125" not in card
    assert "curves.png" not in card
    brought = {path.name for path in run.iterdir() if path.is_file()}
    assert {path.name for path in target.iterdir()} == brought | {"README.md", "mine.txt"}


def test_the_same_weights_brought_again_keep_their_evaluation(tmp_path):
    run, target = write_run(tmp_path / "run", "new", with_log=False), tmp_path / "weights"
    split_weights(run, run / "parts")
    join_weights(run / "parts", target)
    assert "0.125" in evaluate(target)
    join_weights(run / "parts", target)
    assert "0.125" in (target / "README.md").read_text()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt_replacing(monkeypatch, number):
    """The file of this number is not put in its place: Ctrl-C comes before it."""
    replace, numbers = os.replace, itertools.count()

    def replace_or_stop(source, place):
        if next(numbers) == number:
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr(os, "replace", replace_or_stop)


@pytest.mark.parametrize("weights", ["old", "new"])
def test_weights_stay_whole_wherever_joining_is_interrupted(tmp_path, monkeypatch, weights):
    run, target = write_run(tmp_path / "run", "new", with_log=False), tmp_path / "weights"
    split_weights(run, run / "parts")
    write_run(target, weights, with_log=weights == "old")
    before, num_interrupted = files_of(target), 0
    monkeypatch.setattr(weight_parts, "write_model_card", lambda target: None)
    while True:
        with monkeypatch.context() as m:
            interrupt_replacing(m, num_interrupted)
            try:
                join_weights(run / "parts", target)
                break
            except KeyboardInterrupt:
                assert files_of(target) == before
        num_interrupted += 1
    assert num_interrupted >= 10
    assert files_of(target) == {path.name: path.read_bytes() for path in run.glob("*.*")}


@pytest.mark.parametrize("number", range(1, 11, 3))
def test_weights_that_a_kill_left_aside_come_back(tmp_path, monkeypatch, number):
    run, target = write_run(tmp_path / "run", "new"), write_run(tmp_path / "weights", "old")
    split_weights(run, run / "parts")
    before = files_of(target)
    with monkeypatch.context() as m:
        m.setattr(weight_parts, "_complete_or_undo", lambda *_: None)
        interrupt_replacing(m, number)
        with pytest.raises(KeyboardInterrupt):
            join_weights(run / "parts", target)
    assert files_of(next(target.glob(".earlier*")))
    for interrupted_at in (3, number + 6):  # the first while they are put back, or soon after
        with monkeypatch.context() as m:
            interrupt_replacing(m, interrupted_at)
            with pytest.raises(KeyboardInterrupt):
                join_weights(run / "parts", target)
    assert files_of(target) == before
    join_weights(run / "parts", target)
    assert not list(target.glob(".earlier*"))
    brought = {path.name: path.read_bytes() for path in run.glob("*.*")}
    assert files_of(target).items() >= brought.items()


def test_card_shows_no_evaluation_of_other_weights(tmp_path, capsys):
    folder = write_run(tmp_path / "weights", "mine", with_log=False)
    sha256 = hashlib.sha256((folder / "world_model.safetensors").read_bytes()).hexdigest()
    assert "0.125" in evaluate(folder, weights_identity={"sha256": sha256})
    assert not capsys.readouterr().out
    assert "0.125" not in evaluate(folder, weights_identity={"sha256": sha256, "seed": 4242})
    assert "of other weights" in capsys.readouterr().out
    assert "0.125" not in evaluate(folder, weights_identity={"sha256": "0" * 64})
    assert "evaluate.json: of other weights" in capsys.readouterr().out
    # An evaluation that names no weights counts if it is not older than they are.
    assert "0.125" in evaluate(folder)
    os.utime(folder / "evaluate.json", (1, 1))
    write_model_card(folder)
    assert "0.125" not in (folder / "README.md").read_text()


def test_card_draws_a_log_whose_last_line_was_cut_off(tmp_path):
    folder = write_run(tmp_path / "weights", "mine")
    with (folder / "world_model.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    write_model_card(folder)
    assert (folder / "curves.png").is_file()


def test_card_says_how_many_recordings_it_does_not_list(tmp_path):
    names = [f"r{i:02d}" for i in range(30)]
    folder = write_run(tmp_path / "weights", "mine", with_log=False, train=names)
    write_model_card(folder)
    card = (folder / "README.md").read_text()
    assert "trained on 30 recordings: r00, r01" in card
    assert "r23 and 6 more" in card


@pytest.mark.parametrize("missing", ["config.json", "training.json", "world_model.safetensors"])
def test_parts_without_a_whole_model_change_nothing(tmp_path, missing):
    run = write_run(tmp_path / "run", "new", with_log=False)
    target = write_run(tmp_path / "weights", "old", with_log=False)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    (run / missing).unlink()
    split_weights(run, run / "parts")
    with pytest.raises(ValueError, match=f"{missing} is not listed"):
        join_weights(run / "parts", target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize(
    "entry",
    [None, 1, {}, {"parts": []}, {"sha256": "0", "parts": "a"}, {"sha256": 0, "parts": [1]}],
)
def test_list_of_parts_that_is_malformed_is_told(tmp_path, entry):
    files = ["config.json", "training.json", "world_model.safetensors"]
    content = files if entry is None else dict.fromkeys(files, entry)
    (tmp_path / "parts.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"parts.json: expected {file: .* bring it again"):
        join_weights(tmp_path, tmp_path / "weights")


def test_no_folder_of_something_else_is_emptied_for_parts(tmp_path):
    run = write_run(tmp_path / "run", "new", with_log=False)
    before = sorted(run.iterdir())
    with pytest.raises(ValueError, match="give another folder for the parts"):
        split_weights(run, run)
    assert sorted(run.iterdir()) == before
    split_weights(run, run / "parts", MIB)
    (run / "parts/parts.json").unlink()  # a kill came before it
    split_weights(run, run / "parts", MIB)
    join_weights(run / "parts", tmp_path / "weights")


def test_the_files_of_planning_are_known_by_name():
    networks = {network.file for network in (InverseModel, TemporalDistance)}
    assert set(PLANNING_FILES) == networks | {"action_prior.json"}
