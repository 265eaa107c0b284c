"""Formats for programs that manage photos of camera traps: MegaDetector's files and Camtrap DP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from retrieval_tip.errors import Skipped, UsageError
from retrieval_tip.hooks import option
from retrieval_tip.plugins.camera_traps.paths import ANIMAL
from retrieval_tip.writers import Answered, Outcome, Wants, write_folder, write_json

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo


@dataclass(frozen=True)
class MegaDetector:
    """MegaDetector's format, with the classes of each detection."""

    wants: ClassVar[Wants] = Wants(top=5, categories=(ANIMAL,))

    def check(self, out: Path | None) -> None:
        """Accept any file."""

    def write(self, answers: Answered, out: Path | None) -> Outcome:
        """Write the file of boxes with the answers, or a file in which each photo is one detection."""
        from retrieval_tip.plugins.camera_traps.megadetector import clear, megadetector

        clear(answers.boxes)
        write_json(lambda: megadetector(answers), out)
        return Outcome()


def zone(_: click.Context, __: click.Parameter, name: str | None) -> ZoneInfo | None:
    """Open a time zone by its IANA name."""
    from zoneinfo import ZoneInfo  # slow

    try:
        return None if name is None else ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise click.BadParameter(
            f"{name}: unknown; give a name such as Europe/Berlin, or pip install tzdata"
        ) from None


@dataclass(frozen=True)
class CamtrapDP:
    """Camtrap DP, a folder of tables about deployments, photos and observations.

    Options:
        timezone: Time zone of the cameras, such as Europe/Berlin.
        deployments: Table of the deployments, which are named like folders of photos. [default: each folder is a
            deployment]
    """

    wants: ClassVar[Wants] = Wants(exif=True, categories=(ANIMAL,))
    timezone: ZoneInfo | None = option(metavar="ZONE", callback=zone)
    deployments: Path | None = option(click.Path(path_type=Path, dir_okay=False))

    def check(self, out: Path | None) -> None:
        """Raise UsageError without a folder or a time zone, and InputError if the deployments cannot be read."""
        if self.timezone is None or out is None:
            raise UsageError(
                "--format camtrap-dp: needs --out FOLDER and --timezone ZONE, such as Europe/Berlin"
            )
        self._known  # noqa: B018 - reads the table before photos are classified

    @cached_property
    def _known(self) -> dict[str, dict[str, Any]]:
        from retrieval_tip.plugins.camera_traps.camtrap_dp import read_deployments

        return {} if self.deployments is None else read_deployments(self.deployments, self.timezone)

    def write(self, answers: Answered, out: Path | None) -> Outcome:
        """Write the folder."""
        from retrieval_tip.plugins.camera_traps.camtrap_dp import camtrap_dp

        assert out is not None  # see check
        zone = self.timezone
        assert zone is not None
        skipped = list[Skipped]()

        def files() -> dict[str, str]:
            texts, left_out = camtrap_dp(answers, zone, self._known)
            skipped.extend(left_out)
            return texts

        write_folder(files, out)
        return Outcome(skipped=skipped)
