"""Mounts, each test in a mount namespace that ends with it."""

from __future__ import annotations

import errno
import os
import re

import pytest

from sandrun.linux import mounts, process
from tests.kernel.children import errno_of, in_child


def in_mount_namespace(probe):
    """Run `probe` with an empty tmpfs at /mnt that nobody else sees."""

    def prepared():
        mounts.set_attributes("/", propagation=mounts.MS_PRIVATE, recursive=True)
        mounts.move_mount(mounts.new_filesystem("tmpfs", {"mode": "0755", "source": "test"}), "/mnt")
        return probe()

    return in_child(prepared, process.CLONE_NEWNS)


def mountinfo(target: str) -> list[str]:
    """Options of the mounts at `target`, the topmost last."""
    with open("/proc/self/mountinfo") as file:
        return [line.split()[5] for line in file if line.split()[4] == target]


def write(path: str, size: int = 1) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, b"x" * size)
    finally:
        os.close(descriptor)


@pytest.mark.requirement(3)
def test_attributes_of_a_new_file_system_are_in_force():
    def probe():
        flags = mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV | mounts.MOUNT_ATTR_NOEXEC
        os.mkdir("/mnt/a")
        mounts.move_mount(mounts.new_filesystem("tmpfs", {}, flags), "/mnt/a")
        return mountinfo("/mnt/a")

    [options] = in_mount_namespace(probe)
    assert {"rw", "nosuid", "nodev", "noexec"} <= set(options.split(","))


@pytest.mark.parametrize(("option", "fitting"), [({"size": "16k"}, 4), ({"nr_inodes": "3"}, 2)])
def test_size_and_inode_options_limit_a_tmpfs(option, fitting):
    def probe():
        os.mkdir("/mnt/a")
        mounts.move_mount(mounts.new_filesystem("tmpfs", option), "/mnt/a")
        for number in range(fitting):  # the root directory is an inode too
            write(f"/mnt/a/{number}", 4096)
        return errno_of(write, "/mnt/a/more", 4096)

    assert in_mount_namespace(probe) == errno.ENOSPC


@pytest.mark.requirement(17)
@pytest.mark.parametrize(
    ("fstype", "options", "words"),
    [
        ("tmpfs", {"size": "much"}, r"fsconfig: tmpfs: size=much: Invalid argument \(tmpfs: Bad value for 'size'\)"),
        ("tmpfs", {"mode": "755", "typo": None}, r"fsconfig: tmpfs: typo: .*Unknown parameter 'typo'"),
        ("proc", {"hidepid": "no"}, r"fsconfig: proc: hidepid=no: Invalid argument"),
    ],
)
def test_refused_option_is_named_with_the_file_systems_own_words(fstype, options, words):
    def probe():
        before = os.listdir("/proc/self/fd")
        try:
            mounts.new_filesystem(fstype, options)
        except OSError as error:
            return str(error), before == os.listdir("/proc/self/fd")

    text, nothing_left_open = in_mount_namespace(probe)
    assert re.search(words, text)
    assert nothing_left_open


def test_unknown_file_system_is_named():
    with pytest.raises(OSError, match="fsopen: nosuchfs: No such device"):
        in_mount_namespace(lambda: mounts.new_filesystem("nosuchfs", {}))


@pytest.mark.requirement(9)
def test_read_only_copy_of_a_tree_cannot_be_written_at_any_depth():
    def probe():
        os.makedirs("/mnt/tree/below")
        mounts.move_mount(mounts.new_filesystem("tmpfs", {}), "/mnt/tree/below")
        os.mkdir("/mnt/copy")
        copy = mounts.open_tree("/mnt/tree")
        mounts.set_attributes(copy, set=mounts.MOUNT_ATTR_RDONLY | mounts.MOUNT_ATTR_NOSUID, recursive=True)
        mounts.move_mount(copy, "/mnt/copy")
        return [
            errno_of(write, f"/mnt/{path}/file") for path in ("tree", "tree/below", "copy", "copy/below")
        ], mountinfo("/mnt/copy/below")

    codes, [options] = in_mount_namespace(probe)
    assert codes == [0, 0, errno.EROFS, errno.EROFS]
    assert "nosuid" in options.split(",")


def test_copy_that_is_not_recursive_has_nothing_mounted_below():
    def probe():
        os.makedirs("/mnt/tree/below")
        mounts.move_mount(mounts.new_filesystem("tmpfs", {}), "/mnt/tree/below")
        write("/mnt/tree/below/file")
        os.mkdir("/mnt/copy")
        mounts.move_mount(mounts.open_tree("/mnt/tree", recursive=False), "/mnt/copy")
        return os.listdir("/mnt/copy/below")

    assert in_mount_namespace(probe) == []


def test_a_mount_is_put_on_a_descriptor_and_opened_by_one():
    def probe():
        os.mkdir("/mnt/a")
        os.mkdir("/mnt/b")
        directory = os.open("/mnt/a", os.O_PATH)
        mounts.move_mount(mounts.new_filesystem("tmpfs", {}), "", dirfd=directory)
        write("/mnt/a/file")
        mounts.move_mount(
            mounts.open_tree("", dirfd=os.open("/mnt/a", os.O_PATH)), "b", dirfd=os.open("/mnt", os.O_PATH)
        )
        return os.listdir("/mnt/b")

    assert in_mount_namespace(probe) == ["file"]


@pytest.mark.requirement(9)
def test_a_mount_is_never_put_where_a_symbolic_link_points():
    def probe():
        os.mkdir("/mnt/real")
        os.symlink("real", "/mnt/link")
        code = errno_of(mounts.move_mount, mounts.new_filesystem("tmpfs", {}), "/mnt/link")
        return code, mountinfo("/mnt/real")

    code, found = in_mount_namespace(probe)
    assert code != 0
    assert found == []


def test_detached_mount_goes_away_with_its_descriptor():
    def probe():
        descriptor = mounts.new_filesystem("tmpfs", {})
        os.close(descriptor)
        return errno_of(mounts.move_mount, descriptor, "/mnt")

    assert in_mount_namespace(probe) == errno.EBADF


@pytest.mark.root
@pytest.mark.requirement(9)
def test_read_only_is_locked_for_an_inner_user_namespace():
    def probe():
        mounts.set_attributes("/mnt", set=mounts.MOUNT_ATTR_RDONLY)
        process.unshare(process.CLONE_NEWUSER | process.CLONE_NEWNS)
        return errno_of(lambda: mounts.set_attributes("/mnt", clear=mounts.MOUNT_ATTR_RDONLY)), errno_of(
            write, "/mnt/x"
        )

    assert in_mount_namespace(probe) == (errno.EPERM, errno.EROFS)


def test_attributes_are_set_and_cleared():
    def probe():
        mounts.set_attributes("/mnt", set=mounts.MOUNT_ATTR_RDONLY)
        refused = errno_of(write, "/mnt/x")
        mounts.set_attributes("/mnt", clear=mounts.MOUNT_ATTR_RDONLY)
        return refused, errno_of(write, "/mnt/x")

    assert in_mount_namespace(probe) == (errno.EROFS, 0)


def test_classic_mount_and_umount_name_what_they_were_about():
    def probe():
        os.mkdir("/mnt/a")
        mounts.mount("none", "/mnt/a", "tmpfs", mounts.MS_NOSUID, "size=8k")
        mounts.mount("/mnt/a", "/mnt", None, mounts.MS_BIND)
        shown = mountinfo("/mnt/a"), len(mountinfo("/mnt"))
        mounts.umount("/mnt", mounts.MNT_DETACH)
        errors = []
        for call in (
            lambda: mounts.mount("none", "/mnt/none", "tmpfs"),
            lambda: mounts.mount("/mnt/none", "/mnt/a", None, mounts.MS_BIND),
            lambda: mounts.umount("/mnt/none"),
        ):
            with pytest.raises(FileNotFoundError) as caught:
                call()
            errors.append(str(caught.value))
        return shown, errors

    ([options], count), errors = in_mount_namespace(probe)
    assert "nosuid" in options.split(",")
    assert count == 2
    assert [error.partition("] ")[2] for error in errors] == [
        "mount: tmpfs on /mnt/none: No such file or directory",
        "mount: /mnt/none on /mnt/a: No such file or directory",
        "umount2: /mnt/none: No such file or directory",
    ]


@pytest.mark.requirement(1)
def test_nothing_mounted_inside_shows_outside():
    before = os.stat("/mnt").st_dev
    assert in_mount_namespace(lambda: os.stat("/mnt").st_dev) != before
    assert os.stat("/mnt").st_dev == before
