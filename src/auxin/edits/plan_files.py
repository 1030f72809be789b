"""Files that belong to a plan: matrices that were learned, a tokenizer that changed.

Each is known by the SHA-256 of its content, which its name holds. It lies beside the plan's YAML file and travels into
the checkpoint that the plan makes, so that plan and checkpoint stay whole wherever they are copied. Other content under
its name is refused.
"""

import hashlib
import shutil
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field

from auxin.errors import OtherModelError, PlanError, reason
from auxin.files import write_bytes
from auxin.settings import Settings


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise ValueError("must lie in the folder of the plan and of the checkpoint; give a relative path")
    return path


def _replaceable(path: str) -> str:
    parts = PurePosixPath(_inside(path)).parts
    own = parts[:1] == ("training",) or parts[-1:] in (("config.json",), ("ledger.json",))
    if (
        not parts
        or own
        or "\0" in path
        or len(path) > 200
        or path.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise ValueError("must name a file beside the model's weights, config, training state and ledger")
    return path


def _plain(name: str) -> str:
    if name != PurePosixPath(_inside(name)).name or "\0" in name:
        raise ValueError("must be the name of a file, without folders")
    return name


CheckpointFile = Annotated[str, AfterValidator(_replaceable)]
"""The path of a file in a checkpoint that a plan may replace or drop."""
FOLDER = "plan-files"
"""Where a checkpoint keeps the files of the plans that made it."""


class PlanFile(Settings):
    """One file of a plan."""

    name: Annotated[str, AfterValidator(_plain)]
    """Its name beside the plan: "operator-3fa94c21.safetensors", with the first digits of its SHA-256."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of its content."""
    into: CheckpointFile | None = None
    """The file of the checkpoint that it becomes, for example "tokenizer.json"; None: a file in `plan-files`."""
    instead_of: str | None = None
    """SHA-256 of the checkpoint's file of that name that it takes the place of; None: whatever is there, or nothing."""

    @classmethod
    def write(
        cls, folder: Path, name: str, content: bytes, into: str | None = None, instead_of: str | None = None
    ) -> "PlanFile":
        """Write `content` into `folder` under `name` ("operator.safetensors") with its hash.

        Raises:
            PlanError: the folder can't be written to.
        """
        digest = hashlib.sha256(content).hexdigest()
        stem, dot, ending = name.partition(".")
        file = cls(name=f"{stem}-{digest[:8]}{dot}{ending}", sha256=digest, into=into, instead_of=instead_of)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / file.name, content)
        except OSError as error:
            raise PlanError(f"{folder / file.name} can't be written: {reason(error)}. Give another folder.") from error
        return file

    def place(self) -> str:
        """Its path in the checkpoint."""
        return self.into or f"{FOLDER}/{self.name}"

    def find(self, folder: Path | None) -> Path:
        """The file in the plan's `folder`.

        Raises:
            PlanError: it is not there, or has other content.
        """
        if folder is None:
            raise PlanError(
                f"The plan's file {self.name} is needed and where the plan lies is not known. Read the plan with "
                "Plan.from_yaml, or say where its files are with plan.beside(folder)."
            )
        for path in (folder / self.name, folder / FOLDER / self.name):
            if path.is_file():
                if sha256(path) != self.sha256:
                    raise PlanError(
                        f"{path} has other content than the plan was made with (SHA-256 {sha256(path)[:8]}..., wanted "
                        f"{self.sha256[:8]}...). Restore it, or plan again."
                    )
                return path
        if self.into is not None and (folder / self.into).is_file() and sha256(folder / self.into) == self.sha256:
            return folder / self.into
        raise PlanError(f"The plan's file {self.name} is not in {folder}. Copy it there: it belongs beside the plan.")

    def put(self, source: Path | None, checkpoint: Path) -> None:
        """Copy the file from the plan's folder `source` into a `checkpoint`.

        Raises:
            PlanError: as `find`.
            OtherModelError: the checkpoint's file that it replaces is another one than the plan was made for.
        """
        target = checkpoint / self.place()
        self.check(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.find(source), target)

    def check(self, checkpoint: Path) -> None:
        """OtherModelError when the `checkpoint`'s file that it replaces is not the one that the plan was made for."""
        target = checkpoint / self.place()
        if self.instead_of is not None and (not target.is_file() or sha256(target) != self.instead_of):
            raise OtherModelError(
                f"{target} is not the file that the plan was made for and that it replaces. Plan again for this "
                "checkpoint."
            )


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
