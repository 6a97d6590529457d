"""Records of files: JSON (an array, or one record per line, gzipped or not), CSV, Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from dlm.errors import DataError, first_line

RECORD_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".tsv", ".parquet")

_LONGEST_FIELD = 2**31 - 1
"""Characters in a field of a CSV file; the module's own limit is 131,072."""


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file, by the ending of its name.

    Raises:
        DataError: naming the file, and where there is one the line, that cannot be read.
    """
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if path.name.endswith((".csv", ".tsv")):
        return _read_csv(path)
    return _read_lines(path) if ".jsonl" in path.name else _read_array(path)


def decoded(data: bytes, where: str) -> str:
    """Bytes of a text in UTF-8, with or without a byte-order mark.

    Raises:
        DataError: naming what the text is in, as far as that can be told.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise DataError(f"{where}: the text is in UTF-16 or UTF-32; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = data[error.start]
        raise DataError(
            f"{where}: not UTF-8 (byte 0x{wrong:02x} at place {error.start}); if it is Latin-1 (Windows): "
            "iconv -f WINDOWS-1252 -t UTF-8"
        ) from error


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: naming the file that cannot be read, or is not in UTF-8.
    """
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def parsed(text: str, where: str, hint: str = "") -> Any:
    """A value in JSON.

    Raises:
        DataError: for what is none, is nested too deeply, or has numbers without measure.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({first_line(error)}){hint}") from error


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _read_array(path: Path) -> Iterator[Any]:
    try:
        with _opened(path) as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    text = decoded(data, str(path))
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    records = parsed(text, str(path), "; one record per line needs the ending .jsonl")
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a JSON array of rows, got {type(records).__name__}")
    yield from records


def _read_lines(path: Path) -> Iterator[Any]:
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                text = decoded(line, where)
                if text.strip():
                    yield parsed(text, where)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read ({error})") from error


def _read_csv(path: Path) -> Iterator[Any]:
    """Rows by the names in the first line.

    The mark between fields is a tab in a .tsv file, else the most frequent one in that line.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    lines = list(io.StringIO(read_text(path), newline=""))  # which ends lines at \n and \r alone
    if not lines:
        raise DataError(f"{path}: the file is empty")
    mark = "\t" if path.name.endswith(".tsv") else max(",;\t", key=lines[0].count)
    rows: Iterable[dict[Any, Any]] = csv.DictReader(lines, delimiter=mark, strict=True)
    if mark == "\t" and not _is_quoted(lines):
        rows = csv.DictReader(lines, delimiter=mark, quoting=csv.QUOTE_NONE)
    try:
        _refuse_repeated(path, next(csv.reader(lines[:1], delimiter=mark), []))
        for number, row in enumerate(rows):
            if None in row or None in row.values():
                raise DataError(f"{path}, row {number}: has not as many fields as the first line names")
            yield row
    except csv.Error as error:
        raise DataError(f"{path}: not valid CSV ({error})") from error


def _refuse_repeated(path: Path, names: list[str]) -> None:
    """Refuse columns of one name, of which one would count."""
    repeated = [name for name, count in Counter(names).items() if name and count > 1]
    if repeated:
        raise DataError(f"{path}: has several columns called {repeated[0]!r}")


def _is_quoted(lines: list[str]) -> bool:
    """False for fields between tabs in which quotation marks are text, as they do not go in pairs."""
    try:
        for _ in csv.reader(lines, delimiter="\t", strict=True):
            pass
    except csv.Error:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        with ParquetFile(path) as file:
            _refuse_repeated(path, file.schema_arrow.names)
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from error
