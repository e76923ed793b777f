import csv

from loggers import MetricsCSV


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_columns_added_and_resuming_continues(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    logger = MetricsCSV(str(path))
    logger.log_metrics({"train/loss": 2.0}, step=1)
    logger.log_metrics({"val/bpd": 1.5}, step=2)
    MetricsCSV(str(path)).log_metrics({"val/bpd": 1.25, "train/loss": 1.0}, step=3)  # another process, the same run
    assert read(path) == [
        {"step": "1", "train/loss": "2.0", "val/bpd": ""},
        {"step": "2", "train/loss": "", "val/bpd": "1.5"},
        {"step": "3", "train/loss": "1.0", "val/bpd": "1.25"},
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.csv"]
