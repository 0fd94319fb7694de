"""The files that name versions agree."""

import json
import re
import sys
from itertools import chain

import pytest
import yaml
from conftest import ROOT, module
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHONS = ["3.10", "3.11", "3.12"]
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"].values())]
LOCK = (ROOT / "requirements.lock").read_text()
LINES = [Requirement(line) for line in LOCK.splitlines() if line and not line.startswith("#")]


def environment(python: str, platform: tuple[str, str] = PLATFORMS[0]) -> dict[str, str]:
    """The markers' values on another Python and platform."""
    names = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
    return {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform[0],
        "platform_machine": platform[1],
        "platform_system": names[platform[0]],
        "os_name": "nt" if platform[0] == "win32" else "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def pins(env: dict[str, str]) -> list[tuple[str, Version]]:
    """What the lock installs there: names and versions."""
    wanted = [line for line in LINES if line.marker is None or line.marker.evaluate(env)]
    return [(canonicalize_name(line.name), Version(next(iter(line.specifier)).version)) for line in wanted]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_every_dependency_once_and_within_its_range(python, platform):
    env = environment(python, platform)
    found = pins(env)
    pinned = dict(found)
    assert len(pinned) == len(found)
    for asked in map(Requirement, ASKED):
        if asked.marker is None or asked.marker.evaluate(env):
            assert pinned[canonicalize_name(asked.name)] in asked.specifier, asked


def test_lock_is_exact_and_names_no_index():
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^ ;]+( ; .+)?", line) for line in lines)
    assert LOCK.splitlines()[1].startswith("#    uv pip compile --universal --python-version 3.10")


def test_requires_python_is_what_dev_py_checks():
    dev, allowed = module("dev.py"), SpecifierSet(PROJECT["requires-python"])
    for minor in range(8, 16):
        assert (f"3.{minor}.1" in allowed) == (dev.OLDEST <= (3, minor) <= dev.NEWEST)


def test_conda_installs_the_same_lock():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(d for d in dependencies if isinstance(d, str) and d.startswith("python="))
    assert f"{python.removeprefix('python=')}.1" in SpecifierSet(PROJECT["requires-python"])
    assert dependencies[-1] == {"pip": ["-r requirements.lock", "-e ."]}


def test_npm_lock_pins_with_checksums_and_names_no_registry():
    lock = json.loads((ROOT / "package-lock.json").read_text())
    asked = json.loads((ROOT / "package.json").read_text())["dependencies"]
    root = lock["packages"].pop("")
    assert root["dependencies"] == asked
    assert all(lock["packages"][f"node_modules/{name}"]["version"] == asked[name] for name in asked)
    assert all(package["integrity"] and "resolved" not in package for package in lock["packages"].values())
