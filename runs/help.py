"""What ``--help`` prints: the text of the config's ``hydra.help``, at once.

Hydra composes the text too, but lists every group of the search path twice, each time with copies of all that plugins
registered: most of a second where launchers and sweepers are installed.
"""

from __future__ import annotations

from string import Template

from omegaconf import OmegaConf

from runs.commands import CONF

ELSEWHERE = {"evaluation", "fabric", "sampler", "recipe", "wandb"}  # read by evaluate.py, sample.py, models' configs and W&B


def help_text(name: str) -> str:
    """Returns the help of the entry point whose config is ``conf/<name>.yaml``."""
    template = Template(OmegaConf.load(CONF / f"{name}.yaml").hydra.help.template)
    return template.safe_substitute(APP_CONFIG_GROUPS="\n".join(groups()))


def groups() -> list[str]:
    """Returns a line for each group: its name and its choices."""
    folders = sorted({path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."})
    chosen = [folder for folder in folders if folder.split("/")[0] not in ELSEWHERE]
    return [f"{folder}: {', '.join(sorted(path.stem for path in (CONF / folder).glob('*.yaml')))}" for folder in chosen]
