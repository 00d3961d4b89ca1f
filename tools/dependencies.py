# SPDX-License-Identifier: Apache-2.0
"""Lock and check what `pidecode[dev]` resolves to in this environment.

    python tools/dependencies.py lock        # write constraints/dev.txt
    python tools/dependencies.py licenses    # fail for a license that is unknown or does not go with Apache-2.0
    python tools/dependencies.py audit       # fail for a known vulnerability, or if the service cannot be asked

`make lock` and the CI job `supply` run it. `audit` needs pip-audit on the path, and PyPI.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints" / "dev.txt"
HEADER = """\
# What `pidecode[dev]` resolved to when it was last tested; `make setup` installs it and `make lock` writes it.
# torch stands in torch.txt, because its build depends on the machine.
"""
ACCEPTED = re.compile(
    r"MIT|BSD|Apache|Python Software Foundation|PSF|CNRI|ISC|MPL|Mozilla Public|Unlicense|HPND|CMU|zlib|CC0"
    r"|Public Domain|Zero-Clause",
    re.IGNORECASE,
)
TOOLS = {"python-debian"}  # under the GPL; a recipe's script reads lists of photographs with it, and nothing ships it
REFUSED = re.compile(r"(?<!L)GPL|Proprietary|Non-?Commercial|CC-BY-NC", re.IGNORECASE)


def asked(extra: str) -> list[Requirement]:
    """What pyproject.toml asks for, with an extra and those it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(line) for line in project["optional-dependencies"][extra]]
    inner = [item for own in wanted if own.name == "pidecode" for name in own.extras for item in asked(name)]
    others = [item for item in wanted if item.name != "pidecode"]
    return [*map(Requirement, project["dependencies"]), *others, *inner]


def resolved() -> dict[str, str]:
    """Installed version of everything that development needs, by name."""
    queue = [(canonicalize_name(item.name), extra) for item in asked("dev") for extra in ("", *item.extras)]
    seen, versions = set[tuple[str, str]](), dict[str, str]()
    while queue:
        name, wanted = queue.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"{name} is not installed; run `make setup` first.")
        versions[name] = distribution.version
        for line in distribution.requires or []:
            item = Requirement(line)
            if item.marker is None or item.marker.evaluate({"extra": wanted}):
                queue += [(canonicalize_name(item.name), inner) for inner in ("", *item.extras)]
    return versions


def license_of(name: str) -> str:
    """A distribution's license as its metadata has it: expression, classifiers, or the field's first line."""
    about: Any = metadata.metadata(name)
    classifiers = [
        text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or [] if text.startswith("License")
    ]
    first = (about.get("License") or "").strip().partition("\n")[0]
    return str(about.get("License-Expression") or ", ".join(classifiers) or first or _license_file(name))


def _license_file(name: str) -> str:
    """The first lines of a distribution's license file, for metadata that name only the file."""
    for path in metadata.files(name) or []:
        if path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            return " ".join(path.read_text(encoding="utf-8").split())[:300]
    return ""


def lock() -> None:
    """Write the lock file."""
    lines = [f"{name}=={version}\n" for name, version in sorted(resolved().items()) if name != "torch"]
    LOCK.write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"{LOCK.relative_to(ROOT)}: {len(lines)} distributions")


def check_licenses() -> None:
    """Exit with 1 if a license is unknown or refused."""
    licenses = {name: license_of(name) for name in sorted(resolved())}
    others = {name: text for name, text in licenses.items() if name not in TOOLS}
    bad = {name: text for name, text in others.items() if REFUSED.search(text) or not ACCEPTED.search(text)}
    for name, text in bad.items():
        print(f"{name}: {text[:80] or 'says no license'}")
    print(f"{len(licenses)} distributions, {len(bad)} with a license to look at")
    sys.exit(1 if bad else 0)


def audit() -> None:
    """Exit with 1 if pip-audit knows a vulnerability of a locked version, or could not look each of them up.

    By itself pip-audit ends well where it reaches nothing: it says "not found" of each distribution and goes on.
    """
    tool = shutil.which("pip-audit") or sys.exit("pip-audit is not installed: python -m pip install pip-audit")
    files = [f"--requirement={ROOT / 'constraints' / name}" for name in ("dev.txt", "torch.txt")]
    done = subprocess.run(
        [tool, "--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off", *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        sys.exit(f"pip-audit did not answer; nothing was checked.\n{done.stderr[-2000:]}")
    skipped = [item["name"] for item in found if "skip_reason" in item]
    bad = {f"{item['name']} {item['version']}": item["vulns"] for item in found if item.get("vulns")}
    for name, vulnerabilities in bad.items():
        print(f"{name}: {', '.join(one['id'] for one in vulnerabilities)}")
    print(f"{len(found) - len(skipped)} of {len(found)} distributions looked up, {len(bad)} with known vulnerabilities")
    if skipped:
        print(f"Not looked up: {', '.join(skipped[:5])}{' ...' if len(skipped) > 5 else ''}. Can PyPI be reached?")
    sys.exit(1 if bad or skipped else 0)


if __name__ == "__main__":
    commands = {"lock": lock, "licenses": check_licenses, "audit": audit}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: dependencies.py {'|'.join(commands)}")
    commands[sys.argv[1]]()
