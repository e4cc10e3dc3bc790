"""Which files are below the folder that is to be packed, so that none is lost without a word?

Links are followed, and a folder that cannot be listed ends the packing. What programs leave beside images is not input.
"""

import errno
import logging
import os
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from data_pipeline.archives import READ_DEADLINE_SECONDS
from data_pipeline.storage import EXIT_CORRUPT, DataError, Store, with_retries
from data_pipeline.wording import counted

log = logging.getLogger(__name__)

# Folders of thumbnails (Synology, QNAP), of archives made by macOS, and of removed files (Samba, Windows). Those of
# Jupyter, git, Linux and macOS begin with a dot.
FOLDERS_OF_PROGRAMS = (
    *("@eaDir", "@Recycle", "@Recently-Snapshot", "__MACOSX", "#recycle", "#snapshot", "$RECYCLE.BIN"),
    *("System Volume Information", "lost+found"),  # of a whole disk; only its administrator reads them
)
PART_OF_A_SET = re.compile(r"(?<!\d)(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(?!\d)")
LAST_NUMBER = re.compile(r"\d{1,9}(?=\D*$)")  # of a name
FORK_OF_MACOS = "._"  # begins the name of a file that holds what other systems cannot store of the file beside it


def input_files(url: str) -> dict[str, int]:
    """Size in bytes of every file below a folder, at any depth, by its name relative to the folder.

    Raises DataError when there is no such folder, nothing in it, or a part of it that cannot be listed.
    """
    store = Store(url, READ_DEADLINE_SECONDS)
    if store.is_local:
        path = store.local_path or "/"
        found = with_retries(lambda: local_files(path), f"list {url}", READ_DEADLINE_SECONDS, None)
    else:
        found = store.walk()
    if "" in found:
        raise DataError(f"{url} is a file, and a folder is expected")
    if not found:
        raise DataError(f"nothing at {url}: {store.missing_part() or 'there is no file in it'}")
    left_out = [name for name in found if is_of_programs(name)]
    if left_out:
        log.warning(
            "%s: left out %s, as programs leave them beside images: %s",
            url,
            counted(len(left_out), "hidden file or folder", "hidden files or folders"),
            ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else ""),
        )
    return {name: size for name, size in found.items() if not is_of_programs(name)}


def refuse_gaps(names: Iterable[str], url: str) -> None:
    """DataError where names like ``train-00000-of-00294.parquet`` say that files of their set are missing.

    Of each number one file is expected, and all names have to speak of one set.
    """
    parts = [(name, match) for name in names if (match := PART_OF_A_SET.search(name.rpartition("/")[2]))]
    numbers: dict[int, str] = {}
    for name, match in parts:
        if match["total"] != parts[0][1]["total"]:
            raise DataError(f"{url} holds files of two sets, {parts[0][0]} and {name}: keep one of them there")
        if (twin := numbers.setdefault(int(match["number"]), name)) != name:
            raise DataError(f"{url} holds a file twice: {twin} and {name}")
    total = int(parts[0][1]["total"]) if parts else 0
    if missing := [number for number in range(total) if number not in numbers]:
        width = len(parts[0][1]["number"])
        first = f"{missing[0]:0{width}d}-of-{parts[0][1]['total']}"
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{url} lacks file {first}{others}, as the name {parts[0][0]} says: get the whole set")


def warn_of_gaps(names: Iterable[str], url: str) -> None:
    """A warning where numbered names, such as ``data-0000.tar`` and ``data-0002.tar``, leave out a number.

    No more than that, as a part of a set may have been chosen. Names that say how many they are have ``refuse_gaps``.
    """
    series: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        match = LAST_NUMBER.search(name)
        if match and not PART_OF_A_SET.search(name.rpartition("/")[2]):
            series.setdefault((name[: match.start()], name[match.end() :]), {})[int(match[0])] = name
    lacking, first = 0, ""
    for (before, behind), found in series.items():
        numbers = sorted(found)
        for number, following in pairwise(numbers):
            lacking += following - number - 1
            if following > number + 1 and not first:
                width = len(found[number]) - len(before) - len(behind)
                first = f"{before}{number + 1:0{width}d}{behind}, between {found[number]} and {found[following]}"
    if lacking:
        log.warning("%s has no %s%s", url, first, f", and lacks {lacking - 1:,} more" if lacking > 1 else "")


def is_of_programs(name: str) -> bool:
    """Whether a file is one of those that programs leave between others: in a hidden folder, or a fork of macOS."""
    *folders, base = name.split("/")
    return base.startswith(FORK_OF_MACOS) or any(
        folder.startswith(".") or folder in FOLDERS_OF_PROGRAMS for folder in folders
    )


def local_files(path: str) -> dict[str, int]:
    """Size of every file below a local folder by its relative name; "" is the name of the path when it is a file.

    Below each entry of the folder, which may be a class, a folder is read once, however many links lead to it; one that
    holds the link is not read. A warning names what is passed over. Of a folder that a program left there is
    the name alone, with a slash. Raises OSError for what cannot be listed, and DataError (exit code 65) for a link that
    leads nowhere.
    """
    if os.path.isfile(path):
        return {"": os.path.getsize(path)}
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    root = Folder(path, "", (os.path.realpath(path),))
    found: dict[str, int] = {}
    passed_over: list[str] = []
    for entry in add_files(root, found):
        seen: set[str] = set()
        pending = deque([entry])
        while pending:
            folder = pending.popleft()
            *holders, real = folder.opened
            if real in seen or any(os.path.commonpath([real, holder]) == real for holder in holders):
                passed_over.append(folder.prefix.removesuffix("/"))
                continue
            seen.add(real)
            for below in add_files(folder, found):
                # Links come last, so that names do not depend on where a link leads.
                (pending.append if below.is_link else pending.appendleft)(below)
    if passed_over:
        log.warning(
            "%s: passed over %s that links lead to, as they are read already or hold the link: %s",
            path,
            counted(len(passed_over), "folder"),
            ", ".join(sorted(passed_over)[:3]) + (", ..." if len(passed_over) > 3 else ""),
        )
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Folder:
    """A folder on a way from the input, which may lead through links."""

    path: str
    prefix: str
    """Of the names of its files."""
    opened: tuple[str, ...]
    """Where the folders on the way to it, and it, really are."""
    is_link: bool = False


def add_files(folder: Folder, found: dict[str, int]) -> list[Folder]:
    """Add the files that are in a folder itself; returns its folders, sorted by name."""
    with os.scandir(folder.path) as entries:
        listing = sorted(entries, key=lambda entry: entry.name)
    folders = []
    for entry in listing:
        name = f"{folder.prefix}{entry.name}"
        try:
            is_folder = entry.is_dir()
            size = 0 if is_folder else entry.stat().st_size
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            if is_of_programs(f"{name}/") or not entry.is_symlink():  # what is no link was removed a moment ago
                continue
            raise DataError(
                f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there: bring it back, or remove "
                "the link",
                EXIT_CORRUPT,
            ) from error
        if not is_folder:
            found[name] = size
        elif is_of_programs(f"{name}/"):
            found[f"{name}/"] = 0
        else:
            is_link = entry.is_symlink()
            real = os.path.realpath(entry.path) if is_link else os.path.join(folder.opened[-1], entry.name)
            folders.append(Folder(entry.path, f"{name}/", (*folder.opened, real), is_link))
    return folders
