"""What is committed names no machine: no absolute path, no user, no host."""

import getpass
import re
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
BINARY = {".png", ".safetensors"}
ABSOLUTE = re.compile(r"(?<![\w.:/<$}\]])/(?:home|root|Users|work|tmp|opt|mnt|usr|var|private)/\w")


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path.suffix not in BINARY:
            yield name, path.read_text(encoding="utf-8")


def test_no_tracked_text_names_a_machine():
    names = {name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 4}
    seen = 0
    for name, text in tracked():
        seen += 1
        for number, line in enumerate(text.splitlines(), 1):
            assert line.startswith("#!") or not ABSOLUTE.search(line), (
                f"{name}:{number} holds an absolute path: {line.strip()[:80]}"
            )
            assert not any(re.search(rf"\b{re.escape(word)}\b", line) for word in names), f"{name}:{number}"
    assert seen > 40


def test_the_pattern_finds_what_it_should():
    slash = "/"
    assert ABSOLUTE.search(f"see {slash}home{slash}anna{slash}x")
    assert ABSOLUTE.search(f'"{slash}tmp{slash}x"')
    assert not ABSOLUTE.search("https://example.org/home/x")


def test_every_requirement_of_the_constraints_is_a_plain_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 10
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line
