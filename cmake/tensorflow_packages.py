"""TensorFlow's packages: which releases tfops is tested with, where one is installed, and how to have several at once.

python cmake/tensorflow_packages.py fetch FOLDER   # headers and libraries of each release, into FOLDER/<release>
python cmake/tensorflow_packages.py find [FOLDER]  # those there, or the installed one: folder|version, a line for each
python cmake/tensorflow_packages.py newest         # the newest release
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

RELEASES = {"2.18": "3.12", "2.19": "3.12", "2.20": "3.13", "2.21": "3.13"}
"""Oldest first, with the newest Python that has wheels of it. The extras in pyproject.toml have the same bounds."""

LIBRARIES = ("libtensorflow_framework.so.2", "libtensorflow_cc.so.2")


def name() -> str:
    """The package that holds TensorFlow without CUDA: the same headers and ABI as with it."""
    return "tensorflow-cpu" if platform.machine() in ("x86_64", "AMD64") else "tensorflow"


def version(folder: Path) -> str:
    """The version of the package `tensorflow` in that folder, by the metadata beside it; "" if there are none.

    Raises RuntimeError where several packages claim the folder: the files are of the one that was installed last.
    """
    found = {}
    for distribution in importlib.metadata.distributions(path=[str(folder.parent)]):
        files = map(str, distribution.files or ())
        if "tensorflow/include/tensorflow/core/public/version.h" in files:
            found[distribution.metadata["Name"]] = distribution.version
    if len(set(found.values())) > 1:
        packages = " and ".join(f"{name} {version}" for name, version in sorted(found.items()))
        raise RuntimeError(f"{folder} is of {packages}: uninstall them all, and install the one that you want")
    return next(iter(found.values()), "")


def installed() -> Path | None:
    """The folder of the package beside this Python, which is not imported."""
    spec = importlib.util.find_spec("tensorflow")
    # What has no __init__.py is left of one that was uninstalled.
    locations = spec and spec.origin and spec.submodule_search_locations
    return Path(locations[0]) if locations else None


def fetch(release: str, folder: Path) -> None:
    """Puts the headers and libraries of a release's newest version into folder/tensorflow, unless they are there.

    They are the same for every Python.
    """
    if version(folder / "tensorflow"):
        return
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        options = ["--no-deps", "--only-binary=:all:", f"--python-version={RELEASES[release]}", f"--dest={downloads}"]
        subprocess.run([*pip, "download", *options, f"{name()}=={release}.*"], check=True)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = rf"tensorflow/include/|tensorflow/({'|'.join(map(re.escape, LIBRARIES))})$|[^/]*\.dist-info/"
            names = [name for name in archive.namelist() if re.match(wanted, name)]
            # What `version` goes by is last: a folder that was left half full is filled again.
            for member in sorted(names, key=lambda name: ".dist-info/" in name):
                archive.extract(member, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch").add_argument("folder", type=Path)
    commands.add_parser("find").add_argument("folder", type=Path, nargs="?")
    commands.add_parser("newest")
    arguments = parser.parse_args()
    if arguments.command == "newest":
        print([*RELEASES][-1])
    elif arguments.command == "fetch":
        for release in RELEASES:
            fetch(release, arguments.folder / release)
    else:
        found = arguments.folder.resolve().glob("*/tensorflow") if arguments.folder else [installed()]
        try:
            packages = [(package, version(package)) for package in found if package]
        except RuntimeError as error:
            sys.exit(f"tensorflow_packages.py: {error}")
        for package, number in sorted(packages, key=lambda found: [int(part) for part in re.findall(r"\d+", found[1])]):
            print(package, number, sep="|")


if __name__ == "__main__":
    main()
