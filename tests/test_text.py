"""Text files to samples."""

import sys
import types

import pytest

from support import text
from support.command import UserError


class Parquet:
    """Stands in for pyarrow.parquet, which is an extra: a file of two blocks of rows."""

    columns: list = [("text", ["one", "two"]), ("text", ["three"])]  # noqa: RUF012

    class ParquetFile:
        def __init__(self, path):
            names = [name for name, _ in Parquet.columns]
            self.schema_arrow = types.SimpleNamespace(names=names)

        def iter_batches(self, columns):
            assert columns == ["text"]
            for _, values in Parquet.columns:
                column = types.SimpleNamespace(to_pylist=lambda values=values: values)
                yield types.SimpleNamespace(column=[column].__getitem__)


def test_parquet_is_read_if_pyarrow_is_there(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "b.txt").write_text("four")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it fails
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow; pip install pyarrow"):
        list(text.read_documents(tmp_path))
    stand_in = types.SimpleNamespace(parquet=Parquet, ArrowException=ValueError)
    monkeypatch.setitem(sys.modules, "pyarrow", stand_in)
    assert list(text.read_documents(tmp_path)) == ["one", "two", "three", "four"]
    monkeypatch.setattr(Parquet, "columns", [("text", ["one", None])])
    with pytest.raises(UserError, match="`text` holds None"):
        list(text.read_documents(tmp_path))
    monkeypatch.setattr(Parquet, "columns", [("body", ["one"])])
    with pytest.raises(UserError, match="no column `text`"):
        list(text.read_documents(tmp_path))


def test_parquet_for_real(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", "two"], "id": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(text.read_documents(tmp_path / "a.parquet")) == ["one", "two"]
    parquet.write_table(table.drop(["text"]), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="no column `text`"):
        list(text.read_documents(tmp_path / "b.parquet"))
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"c\.parquet is damaged"):
        list(text.read_documents(tmp_path / "c.parquet"))
