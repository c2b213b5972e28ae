"""Run folders: whose they are, that one process writes, and that nothing is written through links."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from earlysift import folders

HOLD = """
import sys
from pathlib import Path
from earlysift import folders
with folders.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_folder_is_held_by_one_process_until_it_ends_even_by_a_kill(tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FileExistsError, match="Another process trains in"), folders.locked(out):
            pytest.fail("held twice")
        with pytest.raises(FileExistsError, match="Another process trains in"):
            folders.require_unlocked(out)
        other.kill()
    folders.require_unlocked(out)
    with folders.locked(out):
        assert sorted(path.name for path in out.iterdir()) == [".lock"]


def test_looking_whether_a_folder_is_held_makes_nothing(tmp_path):
    folders.require_unlocked(tmp_path / "run")
    folders.require_unlocked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_a_link_is_not_opened(tmp_path):
    target = tmp_path / "precious"
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").symlink_to(target)
    with pytest.raises(OSError, match="Nothing can be written into"), folders.locked(out):
        pytest.fail("held through a link")
    assert not target.exists()


def test_a_marker_says_whose_a_folder_is_and_what_was_written_down(tmp_path):
    assert folders.marker(tmp_path) == {}
    folders.mark(tmp_path, "pretrain", threads=3)
    marker = folders.marker(tmp_path)
    assert (marker["program"], marker["threads"]) == ("pretrain", 3)
    assert marker["version"]


@pytest.mark.parametrize("content", ["", "5", "null", "[]", "{}", '{"program": 5}', "[" * 100_000, "\xff"])
def test_a_marker_of_something_else_says_nothing(content, tmp_path):
    (tmp_path / folders.MARKER).write_text(content, encoding="latin-1")
    assert folders.marker(tmp_path) == {}


def test_a_marker_that_is_a_link_says_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    folders.mark(tmp_path / "mine", "compare")
    (tmp_path / folders.MARKER).symlink_to(tmp_path / "mine" / folders.MARKER)
    assert folders.marker(tmp_path) == {}


def test_only_plain_files_are_deleted_and_only_by_name(tmp_path):
    (tmp_path / "known").write_text("ours")
    (tmp_path / "other").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (tmp_path / "folder").mkdir()
    folders.remove_known(tmp_path, ["known", "link", "folder", "absent"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "other"]


def test_links_and_things_of_another_kind_are_refused_where_a_run_writes(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    folders.require_plain(tmp_path, files=["file", "absent"], folders=["folder", "absent"])
    with pytest.raises(FileExistsError, match="is a link to"):
        folders.require_plain(tmp_path, files=["link"])
    with pytest.raises(FileExistsError, match="is not the file"):
        folders.require_plain(tmp_path, files=["folder"])
    with pytest.raises(FileExistsError, match="is not the folder"):
        folders.require_plain(tmp_path, folders=["file"])


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from earlysift import folders
if os.getuid() == 0:  # whom no permission stops
    os.setuid(65534)
out = Path(sys.argv[1])
for do in (folders.require_available, lambda out: folders.locked(out).__enter__()):
    try:
        do(out)
    except OSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize("name", ["", "run", "deep/run"])
def test_a_folder_that_cannot_be_written_into_is_refused_and_says_so(name):
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        Path(home).chmod(0o555)
        out = Path(home) / name
        done = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, str(out)], capture_output=True, text=True, check=True, timeout=60
        )
        looked, tried = done.stdout.splitlines()
        assert looked.startswith(f"PermissionError Nothing can be written into {home}. Make it writable, or choose")
        assert "Nothing can be written into" in tried
        assert list(Path(home).iterdir()) == []


def test_what_is_marked_is_json_that_anybody_can_read(tmp_path):
    folders.mark(tmp_path, "compare")
    assert json.loads((tmp_path / ".earlysift.json").read_text())["program"] == "compare"
