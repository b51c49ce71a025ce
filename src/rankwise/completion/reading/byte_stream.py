"""The bytes of a file, unpacked if they are gzip, with a count of how far reading has come."""

import gzip
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO

from rankwise.errors import UserError

_GZIP = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def existing_file(path: str | os.PathLike[str], expected: str) -> Path:
    """The path of a regular file that is not empty.

    Raises:
        UserError: it does not exist, is a folder or something else that is no file, cannot be opened, or is empty.
    """
    if not os.path.isfile(path):  # noqa: PTH113  # unlike Path.is_file, no exception for a name that is too long
        kind = "is a folder" if os.path.isdir(path) else "does not exist"  # noqa: PTH112
        if kind == "does not exist" and os.path.exists(path):  # noqa: PTH110
            kind = "is no regular file and cannot be read twice"
        raise UserError(f"the file {os.fspath(path)} {kind}; expected {expected}")
    file = Path(path)
    try:
        with file.open("rb") as opened:
            if not opened.read(1):
                raise UserError(f"{file} is empty (0 bytes); expected {expected}")
    except OSError as error:
        raise UserError(f"{file} cannot be opened ({error.strerror or error}); expected {expected}") from None
    return file


def is_gzip(path: Path) -> bool:
    """By content, not by name: browsers unpack and servers pack without renaming."""
    with path.open("rb") as opened:
        return opened.read(len(_GZIP)) == _GZIP


class ByteStream:
    """A readable file object over text: unpacked, without a byte order mark and without empty lines at the start.

    Attributes:
        size: bytes of the file as it lies on the disk.
        done: how many of them have been read.
        quotes: double quotes seen so far; an odd number at the end may mean that one never closes.
    """

    def __init__(self, path: Path):
        self._path = path
        self.size = path.stat().st_size
        self.done = 0
        self.quotes = 0
        self._started = False
        self._file = path.open("rb")
        self._bytes: IO[bytes] = gzip.GzipFile(fileobj=self._file) if is_gzip(path) else self._file  # type: ignore[assignment]

    def read(self, count: int = -1) -> bytes:
        """The next ``count`` bytes or more, b"" at the end.

        Raises:
            UserError: the gzip file is cut short or damaged, or the disk fails.
        """
        data = self._read(count)
        if not self._started:
            data = data.removeprefix(_BYTE_ORDER_MARK).lstrip(b"\r\n")
            while not data:  # nothing but empty lines so far
                more = self._read(count)
                if not more:
                    break
                data = more.lstrip(b"\r\n")
            self._started = True
        self.quotes += data.count(b'"')
        return data

    def _read(self, count: int) -> bytes:
        try:
            data = self._bytes.read(count)
        except EOFError:
            raise UserError(f"{self._path} is cut short: its gzip data ends early; fetch or pack it again") from None
        except (OSError, zlib.error) as error:
            raise UserError(f"{self._path} cannot be read ({error}); fetch or pack it again") from None
        self.done = self._file.tell()
        return data

    @property
    def closed(self) -> bool:
        return self._file.closed

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._bytes.close()
        self._file.close()

    def __enter__(self) -> "ByteStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
