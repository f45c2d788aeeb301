"""Sources: the openly licensed packages behind the images, by name, version and digest."""

import base64
import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final


class WrongPackage(Exception):
    """Package that cannot be downloaded, or whose digest is not the one in this file."""


@dataclass(frozen=True)
class Package:
    """npm package. `sha512` is the registry's own `integrity`, in base64."""

    name: str
    version: str
    license: str
    attribution: str
    sha512: str

    @property
    def file_name(self) -> str:
        """Name that `npm pack` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


#: Images, by the style that a prompt may ask for. The first is that of a prompt without a style.
PICTURES: Final = {
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Fluent Emoji Flat, Microsoft",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "MIT",
        "Fluent Emoji 3D, Microsoft",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "Noto Emoji, Google",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "Twemoji, Twitter Inc and other contributors",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "outline": Package(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "CC-BY-4.0",
        "Streamline Emojis, Streamline",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
    ),
    "silhouette": Package(
        "@iconify-json/game-icons",
        "1.2.4",
        "CC-BY-3.0",
        "Game-icons.net: Lorc, Delapouite and contributors",
        "/HDDZxowXgDJcOEwPspUCq5RuDdl25OyZKdtxqqiPJQNTrWIym7r4StLzIVs77DyNzOWWhH5wDqwYR3WHeDfkg==",
    ),
}

#: Names, groups and keywords of the things in the images.
UNICODE_NAMES: Final = Package(
    "unicode-emoji-json",
    "0.9.0",
    "MIT",
    "unicode-emoji-json, Mu-An Chiou",
    "HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
)
KEYWORDS: Final = Package(
    "emojilib",
    "4.0.3",
    "MIT",
    "emojilib, Mu-An Chiou",
    "KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
)
WORDS: Final = (UNICODE_NAMES, KEYWORDS)
PACKAGES: Final = (*PICTURES.values(), *WORDS)


_LICENSES: Final = {
    "MIT": "https://spdx.org/licenses/MIT.html",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
}


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's archive in `folder`, downloaded by npm if absent. Raise WrongPackage."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / package.file_name
    if not archive.exists():
        what = f"{package.name}@{package.version}"
        command = ["npm", "pack", what, "--ignore-scripts", "--silent"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not archive.exists():
            raise WrongPackage(f"npm pack {what} failed: {done.stderr.strip()[-500:]}")
    verify(package, archive)
    return archive


def verify(package: Package, archive: Path) -> None:
    """Raise WrongPackage unless the archive has the digest of the package."""
    with archive.open("rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if found != package.sha512:
        raise WrongPackage(f"{archive.name} has SHA-512 {found}, not {package.sha512}")


def read_json(archive: Path, member: str) -> Any:
    """Read a JSON file in an npm archive."""
    with tarfile.open(archive) as package:
        file = package.extractfile(f"package/{member}")
        assert file is not None, member
        return json.load(file)


def read_assets(archive: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yield (stem, content) of every file with this suffix in an npm archive, by name."""
    with tarfile.open(archive) as package:
        members = [m for m in package.getmembers() if m.isfile() and m.name.endswith(suffix)]
        for member in sorted(members, key=lambda m: m.name):
            file = package.extractfile(member)
            assert file is not None, member.name
            yield Path(member.name).stem, file.read()


def attribution_text(packages: tuple[Package, ...] = PACKAGES, *, started_from: str = "") -> str:
    """Render the weights' ATTRIBUTION.md. `started_from`: that of older weights."""
    lines = [f"- {p.attribution} (npm {p.name} {p.version}): {p.license}" for p in packages]
    text = (
        "# Sources of the training images and their names\n\n"
        + "\n".join(lines)
        + "\n\nThis project's own code draws the scenes and writes the captions.\n"
        "The images were recolored, scaled and put on other backgrounds.\n\n"
        "The licenses:\n"
        + ",\n".join(f"[{name}]({link})" for name, link in _LICENSES.items())
        + ".\n"
    )
    if started_from.startswith(text):  # the same images once more
        return started_from
    if started_from:
        older = started_from.replace("\n#", "\n##").removeprefix("# ")
        text += (
            "\n## Sources of the weights that these started from\n\n"
            "These weights began as an older model's, so its sources are sources of these too:\n\n"
            f"### {older}"
        )
    return text
