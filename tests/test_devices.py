"""The commit that a record names."""

import subprocess

from deltadiff import devices


def test_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    source, results = tmp_path / "deltadiff" / "devices.py", tmp_path / "benchmarks" / "results"
    for folder in (source.parent, results):
        folder.mkdir(parents=True)
    monkeypatch.setattr(devices, "__file__", str(source))
    assert devices.commit() is None

    def git(*args):
        author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *author, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    source.write_text("one")
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert devices.commit() == commit
    (results / "checks-gpu.json").write_text("[]")
    assert devices.commit() == commit
    source.write_text("two")
    assert devices.commit() == commit + "+"
