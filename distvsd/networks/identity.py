"""The identity of a prior: a hash of exactly what loading it reads, after the version of the hashing rule, now `v2:`.

`PipelineFolder` lists the files that are loaded; the same files are hashed. Older checkpoints hold 64 hex digits
without a version, by a rule that hashed most of the files; a run resumes from them where that hash fits.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from distvsd.errors import PriorError
from distvsd.networks.folder import PipelineFolder

_VERSION = "v2"


class Identity:
    """Hashes the files of one folder; each file is hashed once, even where both rules are used."""

    def __init__(self, folder: PipelineFolder) -> None:
        self._folder = folder
        self._digests: dict[Path, bytes] = {}

    def current(self) -> str:
        """`v2:` and SHA-256 over a line for each configuration and file that is loaded, with its name and its own hash.

        It does not depend on the folder's path, nor on whether the fp16 variant has its own file name or the usual one.
        Reads every file. Raises PriorError where one cannot be read.
        """
        folder = self._folder
        lines = [f"text_encoder class {folder.text_encoder_class}"]
        lines += [f"{component} config {_text(folder.settings(component))}" for component in folder.configs]
        for component, weights in folder.weights.items():
            if weights.index is not None:
                lines.append(f"{component} index {_text(weights.index[1])}")
            lines += [f"{component} file {name} {self._of(file).hex()}" for name, file in weights.files.items()]
        lines += [f"tokenizer file {name!r} {self._of(file).hex()}" for name, file in folder.tokenizer.items()]
        return f"{_VERSION}:{hashlib.sha256(chr(10).join(sorted(lines)).encode()).hexdigest()}"

    def fits(self, stored: str) -> bool:
        """Whether an identity from a checkpoint, by either rule, is this folder's."""
        return stored == (self.current() if ":" in stored else self._before_versions())

    def _before_versions(self) -> str:
        """The identity by the rule of older checkpoints; it is only compared with theirs."""
        folder = self._folder
        digest = hashlib.sha256()
        for component in sorted(folder.configs):
            digest.update(f"{component} {_text(folder.settings(component))}\n".encode())
            if component in folder.weights:
                for _, file in sorted(folder.weights[component].files.items()):
                    digest.update(self._of(file))
        for file in sorted((folder.path / "tokenizer").iterdir()):
            if file.is_file() and not file.name.startswith("."):
                digest.update(f"tokenizer/{file.name}\n".encode() + self._of(file))
        return digest.hexdigest()

    def _of(self, file: Path) -> bytes:
        if file not in self._digests:
            try:
                with file.open("rb") as stream:
                    self._digests[file] = hashlib.file_digest(stream, "sha256").digest()
            except OSError as error:
                raise PriorError(f"{file} cannot be read ({error}); fetch or save the pipeline again") from error
        return self._digests[file]


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)
