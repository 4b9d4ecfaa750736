"""Recordings carried away in parts, weights brought back: on any Python 3.11, whole, and nobody else's."""

import hashlib
import io
import json
import os
import shutil
import tarfile

import pytest
from contractor import lines_of, name_of, write_pair

from minecraft_jepa.data import checks
from minecraft_jepa.data.checks import CHECKED, check_folder, find_recordings, read_checks
from minecraft_jepa.data.splits import split_recordings
from minecraft_jepa.training import remote
from minecraft_jepa.training.remote import MIB, bring, cut_weights, pack, unpack, write_card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Five recordings of five players, one of them broken, and their split."""
    folder = tmp_path_factory.mktemp("recordings")
    names = [name_of(player) for player in ("a", "b", "c", "d", "e")]
    for seed, name in enumerate(names):
        write_pair(folder, name, 20, lines_of(19), seed)
    (folder / f"{names[4]}.mp4").write_bytes(b"no video")
    split = {"train": [names[0], names[1], names[4]], "validation": [names[2]], "test": [names[3]]}
    (folder / "split.json").write_text(json.dumps(split))
    check_folder(folder, decode=True, progress=False)
    return folder, names


def content(folder, names):
    """{file: bytes} of these recordings."""
    return {f"{n}{s}": (folder / f"{n}{s}").read_bytes() for n in names for s in (".mp4", ".jsonl")}


def test_what_was_left_out_is_known_where_the_rest_arrives(made, tmp_path):
    folder, names = made
    pack(folder, tmp_path / "parts")
    unpack(tmp_path / "parts", tmp_path / "there")
    there = tmp_path / "there"
    assert [p.stem for p in find_recordings(there)] == sorted(names[:4])
    assert content(there, names[:4]) == content(folder, names[:4])
    assert split_recordings(there) == split_recordings(folder)
    here, checks = read_checks(folder), read_checks(there)
    assert set(checks) == set(names)  # every row holds where it arrives
    for name in names:
        assert {k: v for k, v in checks[name].items() if k != "files"} == {
            k: v for k, v in here[name].items() if k != "files"
        }
    assert not checks[names[4]]["used"] and checks[names[4]]["why"]
    rows = check_folder(there, progress=False)
    assert [r["used"] for r in rows] == [True] * 4 and all(r["decoded"] for r in rows)


def test_split_holds_when_others_unpack_the_parts(made, tmp_path):
    folder, names = made
    for part in pack(folder, tmp_path / "parts"):
        with tarfile.open(part) as tar:
            tar.extractall(tmp_path / "there")
    assert split_recordings(tmp_path / "there") == split_recordings(folder)
    assert set(read_checks(tmp_path / "there")) == set(names)


def test_checks_kept_in_the_cache_travel_too(made, tmp_path, monkeypatch):
    """Of a folder that may only be read they are not beside the recordings."""
    folder, names = made
    monkeypatch.setenv("MINECRAFT_JEPA_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    shutil.copytree(folder, here)
    (here / CHECKED).unlink()
    write, refused = checks.write_json, []

    def refuse(path, value):
        if path == here / CHECKED:
            refused.append(path)
            raise PermissionError(13, "Permission denied")
        write(path, value)

    monkeypatch.setattr(checks, "write_json", refuse)
    check_folder(here, progress=False)
    assert refused and not (here / CHECKED).exists()
    unpack(pack(here, tmp_path / "parts")[0].parent, tmp_path / "there")
    assert set(read_checks(tmp_path / "there")) == set(names)
    assert split_recordings(tmp_path / "there") == split_recordings(here)


@pytest.mark.parametrize("by", ["manifest", "nothing"])
def test_split_is_the_same_without_a_split_file(made, tmp_path, by):
    folder, names = tmp_path / "here", made[1]
    for name in names:
        write_pair(folder, name, 20, lines_of(19))
    (folder / f"{names[4]}.jsonl").write_text("{")
    if by == "manifest":
        sides = dict(zip(names, ("train", "validation", "test", "train", "train")))
        rows = {n: {"url": f"http://a/{n}.mp4", "side": side} for n, side in sides.items()}
        (folder / "manifest.json").write_text(
            json.dumps({"split_by": "player", "recordings": rows})
        )
    check_folder(folder, progress=False)
    pack(folder, tmp_path / "parts")
    unpack(tmp_path / "parts", tmp_path / "there")
    assert split_recordings(tmp_path / "there") == split_recordings(folder)


def test_links_are_carried_as_the_files_they_point_to(made, tmp_path):
    folder, names = made
    links = tmp_path / "links"
    links.mkdir()
    for path in folder.iterdir():
        if path.name != CHECKED and not path.name.startswith(names[4]):
            (links / path.name).symlink_to(path)
    split = {
        s: [n for n in found if n != names[4]] for s, found in split_recordings(folder).items()
    }
    (links / "split.json").unlink()
    (links / "split.json").write_text(json.dumps(split))
    os.link(folder / f"{names[0]}.mp4", links / "again.mp4")  # the same file once more
    os.link(folder / f"{names[0]}.jsonl", links / "again.jsonl")
    split["train"].append("again")
    (links / "split.json").write_text(json.dumps(split))
    unpack(pack(links, tmp_path / "parts")[0].parent, tmp_path / "there")
    assert content(tmp_path / "there", names[:4]) == content(folder, names[:4])
    assert (tmp_path / "there/again.mp4").read_bytes() == (folder / f"{names[0]}.mp4").read_bytes()
    assert not any(p.is_symlink() for p in (tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    "file, told",
    [
        ("store.json", "a clip store, not recordings"),
        ("shards.json", "a folder of shards, not recordings"),
    ],
)
def test_clip_store_in_place_of_recordings_is_told(tmp_path, file, told):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=told):
        pack(tmp_path, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_parts_are_of_the_size_asked_for(made, tmp_path):
    folder, names = made
    largest = max(map(len, content(folder, names[:4]).values()))
    parts = pack(folder, tmp_path / "parts", largest + 12 * 1024)
    assert len(parts) > 2 and max(p.stat().st_size for p in parts) <= largest + 12 * 1024
    with pytest.raises(ValueError, match="raise limit"):
        pack(folder, tmp_path / "parts", largest)
    assert sorted((tmp_path / "parts").iterdir()) == parts  # those of before


def made_part(folder, *members):
    """part-000.tar of (TarInfo, bytes), as nobody honest would write it."""
    folder.mkdir()
    with tarfile.open(folder / "part-000.tar", "w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder


def member(name, kind=tarfile.REGTYPE, target=""):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    return found


HOSTILE = {
    "absolute": member("/tmp/outside.mp4"),
    "up": member("../outside.mp4"),
    "deep": member("a/b.mp4"),
    "up from within": member("a/../../outside.mp4"),
    "back slash": member("..\\outside.mp4"),
    "hidden": member(".bashrc"),
    "hidden recording": member(".a.mp4"),
    "a program": member("train.py"),
    "symbolic link": member("a.mp4", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": member("a.mp4", tarfile.LNKTYPE, "../outside"),
    "pipe": member("a.mp4", tarfile.FIFOTYPE),
    "device": member("a.mp4", tarfile.CHRTYPE),
    "block device": member("a.mp4", tarfile.BLKTYPE),
    "folder": member("a.mp4", tarfile.DIRTYPE),
}


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_parts_that_lead_out_of_the_folder_are_refused(tmp_path, bad):
    parts = made_part(tmp_path / "parts", (member("first.mp4"), b"fine"), (bad, b""))
    with pytest.raises(ValueError, match="do not trust these parts"):
        unpack(parts, tmp_path / "there")
    assert not (tmp_path / "there").exists() and sorted(tmp_path.iterdir()) == [parts]


def test_link_where_a_file_is_unpacked_is_not_followed(tmp_path):
    outside, there = tmp_path / "outside", tmp_path / "there"
    outside.write_text("mine")
    there.mkdir()
    for name in ("a.mp4", "a.mp4.part"):
        (there / name).symlink_to(outside)
    strange = member("a.mp4")
    strange.mode, strange.uid, strange.mtime = 0o6777, 0, 2**40
    unpack(made_part(tmp_path / "parts", (strange, b"theirs")), there)
    assert outside.read_text() == "mine" and not (there / "a.mp4").is_symlink()
    assert (there / "a.mp4").read_bytes() == b"theirs" and (
        there / "a.mp4"
    ).stat().st_mode & 0o7000 == 0


def test_part_that_is_missing_or_cut_is_named(made, tmp_path):
    folder, names = made
    largest = max(map(len, content(folder, names[:4]).values()))
    parts = pack(folder, tmp_path / "parts", largest + 12 * 1024)
    assert len(parts) > 2
    whole = parts[1].read_bytes()
    for size in (0, 100, 700, len(whole) // 2, len(whole) - 10240, len(whole) - 1):
        parts[1].write_bytes(whole[:size])
        with pytest.raises(ValueError, match="part-001.tar: no whole tar file"):
            unpack(tmp_path / "parts", tmp_path / "there")
    parts[1].unlink()
    with pytest.raises(ValueError, match="part-001.tar is missing; bring it too"):
        unpack(tmp_path / "parts", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_nothing_newer_than_the_first_python_3_11_is_used(made, tmp_path, monkeypatch):
    """3.11.2's tarfile has neither `filter` nor what comes with it."""
    for name in ("data_filter", "tar_filter", "fully_trusted_filter", "FilterError"):
        monkeypatch.delattr(tarfile, name, raising=False)
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)
    monkeypatch.setattr(tarfile.TarFile, "extract", None)
    unpack(pack(made[0], tmp_path / "parts")[0].parent, tmp_path / "there")
    assert split_recordings(tmp_path / "there")


def test_recordings_of_other_parts_are_not_trained_on_too(made, tmp_path, monkeypatch):
    folder, names = made
    monkeypatch.setattr(remote, "train_all", lambda *words: {})
    monkeypatch.setattr(remote, "make_accelerator", lambda *words: None)
    pack(folder, tmp_path / "parts")
    remote.train(tmp_path / "parts", tmp_path / "run", None)
    remote.train(tmp_path / "parts", tmp_path / "run", None)  # again after a stop
    write_pair(tmp_path / "run/recordings", "stray", 4, lines_of(4))
    with pytest.raises(ValueError, match="stray.jsonl is there, and not in .*parts"):
        remote.train(tmp_path / "parts", tmp_path / "run", None)


# Weights: no networks are needed, files of bytes will do


def told(**over):
    found = {
        "preset": "tiny",
        "steps": 7,
        "decoder_steps": 3,
        "seed": 1,
        "device": "cpu",
        "seconds": {"world_model": 60, "decoders": 60},
        "train": ["a"],
        "validation": ["b"],
    }
    return found | over


CONFIG = {
    "train": {"batch": 4, "decoder_batch": 4},
    "frame": {"height": 48, "width": 80},
    "jepa": {"anti_collapse": "ema"},
}
JUDGED = {
    "recordings": ["c"],
    "horizons": {
        "1": {m: {"mean": 0.125} for m in ("model", "copy_last", "other_actions", "noop")}
    },
}


def run_of(folder, weights, log=True, **over):
    """A folder as training leaves it."""
    folder.mkdir(parents=True)
    for name in ("world_model", "dit", "head"):
        (folder / f"{name}.safetensors").write_bytes(f"{name} {weights}".encode() * 99)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "training.json").write_text(json.dumps(told(**over)))
    if log:
        rows = [{"step": i, "loss": 1.0 / (i + 1)} for i in range(5)]
        (folder / "world_model.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def judge(folder, **over):
    """An evaluation beside the weights."""
    (folder / "evaluate.json").write_text(json.dumps(JUDGED | over))
    write_card(folder)
    return (folder / "README.md").read_text()


def test_nothing_of_the_old_weights_stays_beside_new_ones(tmp_path):
    target = run_of(tmp_path / "weights", "old", seed=1)
    (target / "world_model.png").write_bytes(b"old picture")
    (target / "mine.txt").write_text("kept")
    assert "| 1 | 0.125 |" in judge(target) and (target / "curves.png").is_file()
    run = run_of(tmp_path / "run", "new", log=False, seed=2)
    cut_weights(run, run / "parts", 1000)
    bring(run / "parts", target)
    card = (target / "README.md").read_text()
    assert "seed 2" in card and "0.125" not in card and "curves.png" not in card
    kept = {p.name for p in run.iterdir() if p.is_file()} | {"README.md", "mine.txt"}
    assert {p.name for p in target.iterdir()} == kept


def test_the_same_weights_brought_again_keep_their_evaluation(tmp_path):
    run = run_of(tmp_path / "run", "new", log=False)
    cut_weights(run, run / "parts")
    bring(run / "parts", tmp_path / "weights")
    assert "0.125" in judge(tmp_path / "weights")
    bring(run / "parts", tmp_path / "weights")
    assert "0.125" in (tmp_path / "weights/README.md").read_text()


def test_card_shows_no_evaluation_of_other_weights(tmp_path, capsys):
    folder = run_of(tmp_path / "weights", "mine", log=False)
    mine = hashlib.sha256((folder / "world_model.safetensors").read_bytes()).hexdigest()
    assert (
        "0.125" in judge(folder, weights_identity={"sha256": mine}) and not capsys.readouterr().out
    )
    assert "0.125" not in judge(folder, weights_identity={"sha256": mine, "seed": 4242})
    assert "of other weights" in capsys.readouterr().out
    assert "0.125" not in judge(folder, weights_identity={"sha256": "0" * 64})
    assert "evaluate.json: of other weights" in capsys.readouterr().out
    assert "0.125" in judge(
        folder
    )  # an evaluation that names no weights, and is not older than they are
    os.utime(folder / "evaluate.json", (1, 1))
    write_card(folder)
    assert "0.125" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("lacks", ["config.json", "training.json", "world_model.safetensors"])
def test_parts_without_a_whole_model_change_nothing(tmp_path, lacks):
    run, target = run_of(tmp_path / "run", "new", False), run_of(tmp_path / "weights", "old", False)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    (run / lacks).unlink()
    cut_weights(run, run / "parts")
    with pytest.raises(ValueError, match=f"{lacks} is not listed"):
        bring(run / "parts", target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before


def test_no_folder_of_something_else_is_emptied_for_parts(tmp_path):
    run = run_of(tmp_path / "run", "new", log=False)
    before = sorted(run.iterdir())
    with pytest.raises(ValueError, match="give another folder for the parts"):
        cut_weights(run, run)
    assert sorted(run.iterdir()) == before
    cut_weights(run, run / "parts", MIB)
    (run / "parts/parts.json").unlink()  # a kill came before it
    cut_weights(run, run / "parts", MIB)
    bring(run / "parts", tmp_path / "weights")
