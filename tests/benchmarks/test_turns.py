"""What counts as the trainer's time."""

from benchmarks.jobs import Job, Turns


def test_writing_checkpoints_counts(tmp_path):
    job = Job.build(tmp_path, "model=vae", "trainer.max_epochs=1", "logger.mode=disabled")
    names = [type(callback).__name__ for callback in job.run(Turns(lambda steps: 0.0, 5)).callbacks]
    assert names.index("Turns") < names.index("RunCheckpoint")
