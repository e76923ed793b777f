import csv
import tracemalloc

import pytest

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


def test_rows_beyond_where_training_goes_on_are_taken_out_once_and_a_torn_one_is(tmp_path):
    path = tmp_path / "metrics.csv"
    earlier = MetricsCSV(str(path))
    for step in (1, 3, 5):
        earlier.log_metrics({"train/loss": step / 2}, step=step)
    earlier.log_metrics({"test/bpd": 2.0}, step=4)
    with path.open("a") as file:
        file.write("2,1.")  # what a full disk leaves
    assert len(read(path)) == 5
    logger = MetricsCSV(str(path), 4)
    assert len(read(path)) == 5  # nothing is taken out before there is something new
    logger.log_metrics({"train/loss": 2.0}, step=4)
    logger.log_metrics({"val/bpd": 3.0}, step=9)
    rows = [(row["step"], row["train/loss"] or row["test/bpd"] or row["val/bpd"]) for row in read(path)]
    assert rows == [("1", "0.5"), ("3", "1.5"), ("4", "2.0"), ("4", "2.0"), ("9", "3.0")]


def test_damaged_rows_are_taken_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\r\n1,0.5\r\n2,0.4,0.1\r\n1.5,0.3\r\n,0.1\r\n3,0.2\r\n")
    MetricsCSV(str(path), 4).log_metrics({"train/loss": 0.25}, step=4)
    assert [row["step"] for row in read(path)] == ["1", "3", "4"]
    path.write_text("train/loss,step\r\n0.5,1\r\n0.4\r\n0.2,3\r\n")  # columns that were put in another order
    MetricsCSV(str(path), 4).log_metrics({"train/loss": 0.25}, step=4)
    assert [row["step"] for row in read(path)] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"step,train/loss\r\n1,0.5\x98\r\n", "it is not UTF-8"),
        (b"step,train/loss\r\n" + b"1,0.5\r\n" * 10**4 + b"\x98\r\n", "it is not UTF-8"),
        (b"train/loss\r\n0.5\r\n", "it has no column step"),
    ],
    ids=range(3),
)
def test_a_file_that_cannot_be_continued_is_named_before_training_and_left_as_it_is(tmp_path, content, reason):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    logger = MetricsCSV(str(path), 4)
    for looks in (lambda: logger.log_graph(None), lambda: logger.log_metrics({"train/loss": 0.25}, step=4)):
        with pytest.raises(ValueError, match=r"metrics\.csv is damaged") as error:
            looks()
        assert str(error.value) == f"{path} is damaged ({reason}): bring it in order or take it away, and go on"
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_a_spreadsheet_has_marked_as_utf_8_is_continued(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\r\n1,0.5\r\n", encoding="utf-8-sig")
    MetricsCSV(str(path), 4).log_metrics({"train/loss": 0.25}, step=4)
    assert [row["step"] for row in read(path)] == ["1", "4"]


def test_a_validation_whose_checkpoint_was_not_written_any_more_stands_once(tmp_path):
    path = tmp_path / "metrics.csv"
    killed = MetricsCSV(str(path), 0)
    for step in range(4):
        killed.log_metrics({"train/loss": 1.0, "images_seen": 10 * step + 10}, step=step)
        killed.log_metrics({"val/bpd": 2.0 + step, "images_seen": 10.0 * step + 10}, step=step)
    again = MetricsCSV(str(path), 3)  # the last checkpoint is of three steps
    again.log_metrics({"train/loss": 1.0, "images_seen": 40}, step=3)
    again.log_metrics({"val/bpd": 5.0, "images_seen": 40.0}, step=3)
    assert [(row["step"], row["val/bpd"]) for row in read(path)] == [
        (str(step), figure) for step in range(4) for figure in ("", str(2.0 + step))
    ]


def test_a_validation_within_an_accumulated_step_stays(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(str(path), 0).log_metrics({"val/bpd": 2.0, "images_seen": 35.0}, step=3)
    again = MetricsCSV(str(path), 3)
    again.log_metrics({"train/loss": 1.0, "images_seen": 40}, step=3)
    again.log_metrics({"val/bpd": 5.0, "images_seen": 40.0}, step=3)
    assert [row["val/bpd"] for row in read(path)] == ["2.0", "", "5.0"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    path, num = tmp_path / "metrics.csv", 20_000
    rows = [f"{step},0.5,{10 * step}\r\n" for step in range(num)]
    path.write_text("".join(["step,train/loss,images_seen\r\n", *rows]))
    tracemalloc.start()
    try:
        logger = MetricsCSV(str(path), num)
        logger.log_graph(None)
        logger.log_metrics({"train/loss": 0.25}, step=num)
        logger.log_metrics({"val/bpd": 2.0, "images_seen": 10 * num}, step=num)  # a new column
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [row["step"] for row in read(path)] == [*map(str, range(num)), str(num), str(num)]
    assert peak < 2**18
