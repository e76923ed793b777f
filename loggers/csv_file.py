"""metrics.csv, appended row by row: a resumed run continues the file, and a killed one keeps what it wrote."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsCSV(Logger):
    """Writes one row for each call, columns ``step`` and one for each metric.

    Lightning's CSVLogger deletes the file of the run that is resumed. A metric not seen before adds a column: the file is
    rewritten beside the old one and put in its place at once.

    Args:
        path: the file.
        begin: the optimiser step that training goes on from, 0 for a start. Rows of a session that came further before it was
            cut off, which are logged again, and damaged ones are taken out with the first new row. ``None`` keeps all.
    """

    def __init__(self, path: str, begin: int | None = None) -> None:
        super().__init__()
        self.path, self.begin = Path(path), begin
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """The file's name without its ending: Lightning puts checkpoints of one's own into a folder that is named so."""
        return self.path.stem

    @property
    def version(self) -> str:
        """No versions: a run directory has one file."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config has a file of its own."""

    @rank_zero_only
    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Looks at the file: Lightning asks for this before it trains, so that what cannot be continued is refused then."""
        with self._reading() as rows:
            for _ in rows:
                pass

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row."""
        if self._columns is None:
            with self._reading() as rows:
                columns = list(rows.fieldnames or [])
            if columns:
                self._rewrite(columns, lambda row: self._stands(row, metrics))
            self._columns = columns
        row = {"step": step} | metrics
        if step == self.begin and any(name.startswith("val/") for name in row):
            self._rewrite(self._columns, lambda old: not _is_again(old, row))
        if new := [name for name in row if name not in self._columns]:
            self._columns = [*self._columns, *new]
            self._rewrite(self._columns)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @contextmanager
    def _reading(self) -> Iterator[csv.DictReader]:
        """Opens the file to read its columns and its rows, one at a time: it is long where every step is logged.

        Raises:
            ValueError: if the file is no text of this kind, which nothing can be appended to.
        """
        if not self.path.exists():
            yield csv.DictReader(())
            return
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                rows = csv.DictReader(line for line in file if line.endswith("\n"))  # a last one without was cut off
                if rows.fieldnames and "step" not in rows.fieldnames:
                    raise ValueError("it has no column step")
                yield rows
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise ValueError(f"{self.path} is damaged ({reason}): bring it in order or take it away, and go on") from None

    def _stands(self, row: dict[str, str], new: dict[str, float]) -> bool:
        """Whether a row stays beside the first new one.

        Training numbers its steps from 0, what is evaluated after one may be numbered one higher. One test of a step is kept.
        """
        if self.begin is None:
            return True
        if None in row or not (row["step"] or "").isdecimal():  # more fields than columns, or none that says where it belongs
            return False
        kinds, its_kinds = ({name.split("/")[0] for name in names} for names in (new, (name for name in row if row[name])))
        if "test" in kinds & its_kinds and int(row["step"]) == self.begin:
            return False
        return int(row["step"]) < self.begin + ("train" not in its_kinds)

    def _rewrite(self, columns: list[str], stays: Callable[[dict[str, str]], bool] = lambda row: True) -> None:
        """Puts a file with these columns, and those rows that stay, in the place of the one that is there, if any."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        try:
            with self._reading() as rows, draft.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(filter(stays, rows))
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        draft.replace(self.path)


def _is_again(old: dict[str, str], row: dict[str, float]) -> bool:
    """Whether a row is of the same validation as one on disk: a session was killed between its row and its checkpoint."""
    same = all(old.get(name) == str(row.get(name)) for name in ("step", "images_seen"))
    return same and any(name.startswith("val/") and old.get(name) for name in row)
