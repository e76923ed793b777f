"""One comparison: run directories -> groups -> a table, comparison.csv, comparison.md and comparison.html."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

from comparison.collect import EVALUATED, Run, collect, evaluated
from comparison.groups import group, other_images, other_matching, pooled_settings
from comparison.page import page
from comparison.tables import as_csv, as_markdown, terminal
from runs.build import SettingError
from runs.directory import first_free, whole
from runs.names import check_names


def run(cfg: DictConfig) -> None:
    """Compares what ``cfg`` names, prints the table and writes three files.

    Raises:
        SettingError: if there is nothing to compare, or a setting names nothing.
    """
    check_names(cfg, "compare")
    if not cfg.out:
        raise SettingError(f"out={cfg.out}: give the folder to write to, as in out=comparison")
    if OmegaConf.is_missing(cfg, "runs"):
        raise SettingError("runs= is missing: give sweeps, run directories or globs, as in runs=outputs/sweeps/*")
    patterns = _listed(cfg.runs)
    if not all(patterns):
        raise SettingError(f"runs={','.join(patterns)}: a name is empty, give sweeps, run directories or globs")
    runs, skipped = collect(patterns)
    finished = [one for one in runs if one.result]
    left_out = [*(_line(one) for one in runs if not one.result), *(f"skipped: {line}" for line in skipped)]
    if not finished:
        raise SettingError(f"runs={','.join(patterns)}: none of the {len(runs)} runs is finished ({left_out[0]})")
    if str(cfg.metric).startswith(EVALUATED):
        finished = [evaluated(one) for one in finished]
        if not any(one.result["metrics"] for one in finished):
            raise SettingError(
                f"metric={cfg.metric}: no run here has an evaluation of its tested weights on its test set; python evaluate.py "
                "run=RUN leaves one"
            )
    groups = group(finished, _listed(cfg.by) if cfg.by else None, str(cfg.metric))
    measured = {one.path for own in groups for one in own.runs}
    missing = [one for one in finished if one.path not in measured]
    left_out += [f"no finite {cfg.metric}{_instead(one, cfg.metric)}: {one.path}" for one in missing]
    if images := other_images(groups):
        left_out.append(images)
    if matching := other_matching(groups):
        left_out.append(matching)
    pooled = pooled_settings(groups)
    if pooled:
        left_out.append(f"not in by=, so means are over runs that differ in it: {', '.join(pooled)}")
    seeds = [{str(run.seed) for run in own.runs} for own in groups]
    if any(own != seeds[0] for own in seeds):
        left_out.append("the seeds differ: rows stand by the means over all their runs, differences are over common seeds")
    if any(len({str(run.seed) for run in own.runs}) < len(own.runs) for own in groups):
        left_out.append("some rows have several runs of one seed, so their sd is not one over seeds")
    with _new_directory(Path(str(cfg.out))) as out:
        console = Console()
        console = console if console.is_terminal else Console(width=10**4)  # a file has no edge
        console.print(terminal(groups, cfg.metric, console))
        for line in left_out:
            print(line)
        title = f"{cfg.metric}: {', '.join(groups[0].values) or 'runs'}"
        texts = {
            "csv": as_csv(groups, cfg.metric),
            "md": as_markdown(groups, cfg.metric, left_out),
            "html": page(groups, cfg.metric, left_out, title),
        }
        for ending, text in texts.items():
            with whole(out / f"comparison.{ending}") as draft:
                draft.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    print(f"wrote {out}/comparison.html, .csv and .md", flush=True)


def _listed(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, ListConfig) else [str(value)]


def _instead(one: Run, metric: str) -> str:
    if metric.startswith(EVALUATED) and not one.result["metrics"]:
        return " (python evaluate.py run=RUN leaves one)"
    own = f"{EVALUATED if metric.startswith(EVALUATED) else 'test/'}elbo"
    return f" (continuous data has none: metric={own})" if one.continuous and metric.endswith("bpd") else ""


def _line(one: Run) -> str:
    return f"{one.reason}: {one.path}"


@contextmanager
def _new_directory(wished: Path) -> Iterator[Path]:
    """Makes the directory, under the next free number if it holds a comparison already, or part of one.

    A block that does not reach its end leaves none there: else an empty page would lie under the name.
    """

    def place(number: int) -> Path:
        name = f"{wished.name or 'comparison'}-{number}"
        return wished if number == 1 else wished.with_name(name) if wished.name else Path(name)

    out = place(first_free(lambda number: not _claimed(place(number))))
    try:
        yield out
    except BaseException:  # Ctrl-C too
        for path in out.glob("comparison.*"):
            path.unlink()
        raise


def _claimed(out: Path) -> bool:
    """Makes a directory this comparison's own, unless another's is there: of two that start at once, one gets it."""
    if any(out.glob("comparison.*")):
        return False
    page = out / "comparison.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        page.touch(exist_ok=False)
    except OSError as error:
        if page.exists():
            return False
        raise SettingError(f"out={out} cannot be made: {error.strerror}") from error
    return True
