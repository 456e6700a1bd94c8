"""A volume with a Secret in it."""

import os
from pathlib import Path


class Volume:
    """A Secret's volume as a kubelet makes it: every change is one rename of a link."""

    def __init__(self, path: Path, **entries: str) -> None:
        self.path = path
        self._version = 0
        path.mkdir()
        self.put(**entries)

    def put(self, **entries: str) -> None:
        self._version += 1
        data = self.path / f"..v{self._version}"
        data.mkdir()
        for name, text in entries.items():
            (data / name).write_text(text)
        (self.path / "..new").symlink_to(data.name)
        os.replace(self.path / "..new", self.path / "..data")
        for name in entries:
            if not (self.path / name).is_symlink():
                (self.path / name).symlink_to(f"..data/{name}")
        for link in self.path.iterdir():
            if not link.name.startswith("..") and link.name not in entries:
                link.unlink()
