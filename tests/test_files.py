import subprocess
import sys

import pytest

from earlysift.files import write_whole


def test_disk_full_while_writing_leaves_the_previous_file_whole(tmp_path):
    path = tmp_path / "results.json"
    write_whole(path, lambda part: part.write_text("old"))
    # A limit on file size stops the write in the middle for real, for root, too.
    code = (
        "import resource, signal, sys; from pathlib import Path; from earlysift.files import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_whole(Path(sys.argv[1]), lambda part: part.write_text('new' * 10_000))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_writer_that_raises_leaves_the_previous_file_whole(tmp_path):
    path = tmp_path / "results.json"
    write_whole(path, lambda part: part.write_text("old"))

    def broken(part):
        part.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, broken)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
