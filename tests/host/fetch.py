"""Fetches the host library's common tests for the installed version of Transformers.

The tests come from the source distribution that PyPI serves for exactly the installed version. They are never
copied into the repository: the few files needed go to ``.cache/host-tests/VERSION/`` beside it, together with our own
small stand-ins (``stubs/``) for the tools that the source distribution leaves out.
"""

import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from functools import lru_cache
from pathlib import Path

PACKAGE = "transformers_host_tests"
"""Import name of the fetched tests; they import each other relatively, so they need a package."""

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "host-tests"
STUBS = Path(__file__).resolve().parent / "stubs"
TIMEOUT_SECONDS = 120

TEST_FILES = (
    "test_configuration_common.py",
    "test_expert_parallel_mixin.py",
    "test_fsdp_mixin.py",
    "test_modeling_common.py",
    "test_tensor_parallel_mixin.py",
    "test_training_mixin.py",
)

STUB_FILES = {
    "__init__.py": "package.py",
    "distributed_testing_utils.py": "distributed.py",
    "exporters/__init__.py": "package.py",
    "exporters/test_export.py": "export.py",
    "generation/__init__.py": "package.py",
    "generation/test_utils.py": "generation.py",
    "utils/__init__.py": "package.py",
    "utils/test_configuration_utils.py": "configuration.py",
}
"""Path inside the fetched package -> our file in ``stubs/``."""


LEFT_OUT = "ST_MOE_HOST_TESTS"
"""Environment variable; the value `skip` leaves the host's tests out knowingly."""


class HostTestsUnavailableError(RuntimeError):
    """The host library's tests could not be fetched; the message says why and what to do."""


def install() -> Path:
    """Make ``transformers_host_tests`` importable and return its folder; raises HostTestsUnavailableError."""
    version = installed_version()
    root = CACHE / version
    package = root / PACKAGE
    if not package.is_dir():
        _publish(_extract(_download(version), version), package)
    for target, source in STUB_FILES.items():
        _write_if_different(package / target, (STUBS / source).read_bytes())
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return package


def installed_version() -> str:
    """Version of Transformers whose tests are wanted."""
    return importlib.metadata.version("transformers")


def left_out() -> bool:
    """Whether the user asked to leave the host's tests out; raises ValueError for a value that means nothing."""
    value = os.environ.get(LEFT_OUT, "")
    if value not in ("", "skip"):
        raise ValueError(f"{LEFT_OUT}: must be unset or 'skip', got {value!r}")
    return value == "skip"


@lru_cache
def unavailable() -> str | None:
    """Why the host's tests cannot be fetched, or None when they are there."""
    try:
        install()
    except HostTestsUnavailableError as error:
        return str(error)
    return None


def _download(version: str) -> bytes:
    """The source distribution of this version, checked against the sha256 that the index states for it."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/transformers/"
    place = urllib.parse.urlsplit(index).hostname or index  # messages leave out the credentials that an index may hold
    file_name = f"transformers-{version}.tar.gz"
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    try:
        listing = json.loads(_read(urllib.request.Request(index, headers=accept)))
        stated = next((entry for entry in listing["files"] if entry["filename"] == file_name), None)
        if stated is None:
            raise HostTestsUnavailableError(_message(version, f"{place} lists no {file_name}"))
        archive = _read(urllib.request.Request(urllib.parse.urljoin(index, stated["url"])))
    except (OSError, json.JSONDecodeError) as error:
        raise HostTestsUnavailableError(_message(version, f"{place}: {error}")) from error
    found = hashlib.sha256(archive).hexdigest()
    if found != stated["hashes"]["sha256"]:
        problem = f"{file_name} has sha256 {found}, but the index states {stated['hashes']['sha256']}"
        raise HostTestsUnavailableError(_message(version, problem))
    return archive


def _read(request: urllib.request.Request) -> bytes:
    """The body of one answer; urllib's errors are all OSErrors."""
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        return response.read()


def _extract(archive: bytes, version: str) -> dict[str, bytes]:
    """File name -> content of the test files we use; nothing else of the archive is looked at."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        names = set(tar.getnames())
        wanted = {name: f"transformers-{version}/tests/{name}" for name in TEST_FILES}
        missing = sorted(name for name, member in wanted.items() if member not in names)
        if missing:
            raise HostTestsUnavailableError(_message(version, f"its source distribution has no {', '.join(missing)}"))
        streams = {name: tar.extractfile(member) for name, member in wanted.items()}
        return {name: stream.read() for name, stream in streams.items() if stream is not None}


def _publish(files: dict[str, bytes], package: Path) -> None:
    """Write the files to a folder beside their place and rename it, so that parallel runs never see half of it."""
    package.parent.mkdir(parents=True, exist_ok=True)
    _write_if_different(CACHE / ".gitignore", b"*\n")
    staging = Path(tempfile.mkdtemp(dir=package.parent))
    for name, content in files.items():
        (staging / name).write_bytes(content)
    try:
        staging.rename(package)
    except OSError:  # another process was faster: its folder holds the same files
        shutil.rmtree(staging)
        if not package.is_dir():
            raise


def _write_if_different(path: Path, content: bytes) -> None:
    """Write through a temporary file and a rename, and only when needed: parallel runs may be reading it."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
    os.replace(staging, path)


def _message(version: str, problem: str) -> str:
    return (
        f"The host library's own tests for transformers {version} could not be fetched: {problem}. They are downloaded "
        "once from the package index (PIP_INDEX_URL or pypi.org) and then kept in .cache/host-tests. Connect and run "
        f"again, or set {LEFT_OUT}=skip to leave them out knowingly."
    )
